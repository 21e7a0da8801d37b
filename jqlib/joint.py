"""Joint R1, and R2: rotations found on the activations of all layers at once (`jqlib.solver`)."""

import logging
import time
from collections.abc import Mapping, Sized

import torch
from torch import Tensor, distributed

from jqlib import baselines
from jqlib.hadamard import random_hadamard
from jqlib.objectives import Objective, get_objective, mean_value, over_ranks
from jqlib.solver import Minibatches, minimise, orthogonality_error, polar

log = logging.getLogger(__name__)

INIT_MODES = ("hadamard", "random", "identity")
SOLVERS = ("mm", "sgd", "adam", "cayley", "greedy")


def train_r1_joint(
    acts: dict[str, Tensor] | Sized,
    hidden_size: int,
    num_layers: int,
    device: str | torch.device = "cpu",
    lr: float = 1e-3,
    epochs: int = 10,
    init_mode: str = "hadamard",
    *,
    solver: str = "mm",
    objective: str = "whip",
    max_steps: int | None = None,
    seed: int = 0,
    history: list[dict] | None = None,
) -> Tensor:
    """One rotation of the residual stream for the whole model: float32 on the CPU, (hidden_size, hidden_size).

    ``acts``: ``{module name: (tokens, hidden_size)}`` of all layers, without the norms' gamma, as
    `collect_activations` gives them; the tensors may be memory-mapped. Or, for ``"mm"``, a stream: anything with a
    length that can be read many times and gives (tokens, hidden_size), such as a DataLoader; shuffled over
    layers it is best. Under torch.distributed each process gives its share of layers or tokens, all get one R.

    ``solver``: ``"mm"`` descends on all layers at every step and needs no learning rate; ``"sgd"`` is
    DartQuant's published optimiser (``lr``, ``epochs``), ``"adam"`` the same with Adam, ``"cayley"`` SpinQuant's
    (Cayley SGD); ``"greedy"`` goes layer after layer. ``max_steps=0`` returns the start. ``history`` receives a dict
    a step: step, seconds since the call, loss over all tokens, orthogonality (largest entry of \\|RᵀR − I\\|).
    Of ``"mm"``, whose steps on minibatches may rise in passing, it holds the steps that reached a new low, and the end.

    Raises ValueError for shapes and names that don't fit, FloatingPointError for NaN or Inf in ``acts``
    (with the module's name) and for a loss that turns NaN (with the learning rate).
    """
    start = initial_rotation(hidden_size, init_mode, seed)[None].to(device)
    if not isinstance(acts, Mapping):
        data: dict[str, Tensor] | Stream = Stream(acts, hidden_size, device)
        return _solve(data, start, solver, objective, lr, epochs, max_steps, seed, history)[0].cpu()
    modules = torch.tensor(len(acts), device=device)
    over_ranks(modules)
    if modules < num_layers:
        raise ValueError(f"joint R1 needs the activations of all {num_layers} layers; got {modules} modules: "
                         f"{', '.join(acts)}")  # fmt: skip
    for name, x in acts.items():
        _check(f"the activations of {name}", x, hidden_size)
    data = {name: x[None] for name, x in acts.items()}  # (1, tokens, n) each
    return _solve(data, start, solver, objective, lr, epochs, max_steps, seed, history)[0].cpu()


def train_r2_independent(
    r2_acts: dict[str, Tensor],
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    device: str | torch.device = "cpu",
    lr: float = 1e-3,
    epochs: int = 5,
    init_mode: str = "hadamard",
    *,
    smooth_scale: dict[str, Tensor] | None = None,
    solver: str = "mm",
    objective: str = "whip",
    max_steps: int | None = None,
    seed: int = 0,
    history: list[dict] | None = None,
) -> dict[str, Tensor]:
    """A rotation for every kv head of every layer: ``{o_proj name: (num_kv_heads, head_dim, head_dim)}``.

    ``r2_acts``: the inputs of the o_proj, ``{name: (tokens, num_heads · head_dim)}``; the query heads of a
    group share their kv head's rotation. Where the model is smoothed, give ``smooth_scale``: R2 acts
    behind it. All heads are solved in one batch. The rest is as in `train_r1_joint`; the loss in
    ``history`` is the mean over heads. Under torch.distributed each process gives its tokens of every layer.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    heads = []
    for name, x in r2_acts.items():
        _check(f"the activations of {name}", x, x.shape[-1] // num_heads * num_heads)
        x = x.float().view(len(x), num_kv_heads, num_heads // num_kv_heads, -1)  # (tokens, kv, group, d)
        if smooth_scale and name in smooth_scale:
            x = x / smooth_scale[name].view(num_kv_heads, 1, -1)
        heads.append(x.permute(1, 0, 2, 3).flatten(1, 2))  # (kv, tokens · group, d)
    if not heads:
        raise ValueError("R2 needs the inputs of the o_proj; got no activations")
    if len({x.shape[1] for x in heads}) > 1:
        raise ValueError(
            f"R2 is solved in one batch: every module needs as many tokens, got {[len(x) for x in r2_acts.values()]}"
        )
    X = torch.cat(heads).to(device)  # (layers · kv, tokens · group, d)
    start = torch.stack([initial_rotation(X.shape[-1], init_mode, seed + i) for i in range(len(X))]).to(device)
    R = _solve({"heads": X}, start, solver, objective, lr, epochs, max_steps, seed, history).cpu()
    return dict(zip(r2_acts, R.split(num_kv_heads), strict=True))


def initial_rotation(n: int, init_mode: str, seed: int) -> Tensor:
    """``"hadamard"`` (random signs), ``"random"`` (Haar) or ``"identity"``: (n, n)."""
    if init_mode == "hadamard":
        return random_hadamard(n, seed)
    if init_mode == "random":
        return polar(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))
    if init_mode == "identity":
        return torch.eye(n)
    raise ValueError(f"init_mode {init_mode!r} is unknown; there are {', '.join(INIT_MODES)}")


class Recorder:
    """Fills ``history``. The time it spends on measuring the loss over all tokens is not counted.

    Where the loss must be measured only every so many steps are, ever fewer: each 10% later than the last.
    ``falling``: a step counts only if it is the lowest so far (one on a minibatch may raise the loss over all tokens).
    """

    def __init__(self, history: list[dict] | None, batches, objective: Objective, falling: bool):
        self.history, self.batches, self.objective, self.falling = history, batches, objective, falling
        self.step = self.due = 0
        self.start = time.perf_counter()

    def __call__(self, R: Tensor, loss: float | None = None) -> None:
        """Record R; ``loss`` over all tokens, where the solver knows it, need not be measured."""
        if self.history is None:
            return
        if loss is not None or self.step >= self.due:
            self._add(R, loss)
            self.due = self.step + 1 + self.step // 10
        self.step += 1

    def finish(self, R: Tensor) -> None:
        """The history ends now and with the R that is returned: forget what minibatch steps reached in passing."""
        if self.history is None:
            return
        self.step -= 1
        now = time.perf_counter()
        loss = mean_value(self.batches, R, self.objective).mean().item()
        self.start += time.perf_counter() - now
        while self.history and (self.history[-1]["step"] >= self.step or self._in_passing(loss)):
            self.history.pop()
        self._add(R, min(loss, self.history[-1]["loss"]) if self.falling and self.history else loss)

    def _in_passing(self, loss: float) -> bool:
        return self.falling and self.history[-1]["loss"] < loss * (1 - 1e-6)

    def _add(self, R: Tensor, loss: float | None = None) -> None:
        now = time.perf_counter()
        loss = mean_value(self.batches, R, self.objective).mean().item() if loss is None else loss
        if not (self.falling and self.history) or loss <= self.history[-1]["loss"]:
            error = orthogonality_error(R)
            self.history.append({"step": self.step, "seconds": now - self.start, "loss": loss, "orthogonality": error})
        self.start += time.perf_counter() - now


class Stream:
    """A user's batches (tokens, n) as the solver wants them, each checked: (1, tokens, n), float32 on the device."""

    def __init__(self, batches, features: int, device: str | torch.device):
        if not hasattr(batches, "__len__") or iter(batches) is batches:
            raise ValueError(f"acts is a {type(batches).__name__}: give a dict, or batches that have a length and can "
                             "be read many times, such as a list of memory-mapped tensors or a DataLoader")  # fmt: skip
        if len(batches) == 0:
            raise ValueError("acts holds no batches")
        self.batches, self.features, self.device = batches, features, device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            x = batch[0] if isinstance(batch, (list, tuple)) else batch  # a DataLoader of a TensorDataset gives [x]
            _check(f"batch {i} of the activations", x, self.features)
            yield x[None].to(self.device, torch.float32)


def _solve(data, start, solver, objective, lr, epochs, max_steps, seed, history) -> Tensor:
    """``data``: (B, tokens, n) by layer, or a Stream; ``start``: (B, n, n)."""
    function = get_objective(objective)
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; there are {', '.join(SOLVERS)}")
    if solver != "mm" and isinstance(data, Stream):
        raise ValueError(f"solver={solver!r} needs the activations of all layers in memory: give a dict")
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")
    if history:
        raise ValueError(f"history holds {len(history)} steps already: give an empty list")
    batches = data if isinstance(data, Stream) else Minibatches(data, seed, start.device)
    _check_processes(solver, len(batches), history is not None)
    record = Recorder(history, batches, function, falling=solver == "mm")
    record(start)
    if max_steps == 0:
        return start
    if solver in ("mm", "greedy"):
        log.info("solver=%r needs no learning rate: lr and epochs have no effect", solver)
    if solver == "mm":
        R = minimise(batches, start, function, record=record, max_steps=max_steps)
    elif solver == "greedy":
        R = baselines.greedy(data.values(), start, function, max_steps, seed, record)
    else:
        train = {"sgd": baselines.sgd, "adam": baselines.adam, "cayley": baselines.cayley}[solver]
        layers = [x.to(start.device, torch.float32) for x in data.values()]
        R = train(layers, start, function, lr, epochs, max_steps, seed, record)
    record.finish(R)
    return R


def _check_processes(solver: str, *same) -> None:
    """Processes of torch.distributed that went different ways would wait for each other for ever."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    if solver != "mm":
        raise ValueError(f"solver={solver!r} runs in one process; torch.distributed is for 'mm'")
    every: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, same)
    if len(set(every)) > 1:
        raise ValueError(f"the processes differ in (number of batches, history wanted): {every}")


def _check(what: str, x: Tensor, features: int) -> None:
    if x.ndim != 2 or x.shape[-1] != features or len(x) == 0:
        raise ValueError(f"{what} have shape {tuple(x.shape)}, expected (tokens, {features})")
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"NaN or Inf in {what}: collect them again in float32")
