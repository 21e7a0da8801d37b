"""Joint R1, and R2: rotations found on the activations of all layers at once (`jqlib.learn.solver`)."""

import logging
import re
from collections.abc import Mapping, Sized

import torch
from torch import Tensor, distributed

from jqlib.choices import InitMode, Objective, Solver, check_choice
from jqlib.learn import baselines
from jqlib.learn.baselines import Training
from jqlib.learn.history import Recorder
from jqlib.learn.objectives import OBJECTIVES, over_ranks
from jqlib.learn.solver import Minibatches, minimise
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.orthogonal import polar
from jqlib.transform.transform import Transform

log = logging.getLogger(__name__)


def train_r1_joint(
    acts: dict[str, Tensor] | Sized,
    hidden_size: int,
    num_layers: int,
    device: str | torch.device = "cpu",
    lr: float = 1e-3,
    epochs: int = 10,
    init_mode: InitMode = "hadamard",
    *,
    solver: Solver = "mm",
    objective: Objective = "whip",
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
    per step: step, seconds since the call, loss over all tokens, orthogonality (largest entry of \\|RᵀR − I\\|).
    Of ``"mm"``, whose steps on minibatches may rise in passing, it holds the steps that reached a new low, and the end.

    Raises ValueError for shapes and names that don't fit, FloatingPointError for NaN or Inf in ``acts``
    (with the module's name) and for a loss that turns NaN (with the learning rate).
    """
    training = Training(solver, objective, lr, epochs, max_steps, seed, history)
    start = initial_rotation(hidden_size, init_mode, seed)[None].to(device)
    if not isinstance(acts, Mapping):
        data: dict[str, Tensor] | Stream = Stream(acts, hidden_size, device)
        return _solve(data, start, training)[0].cpu()
    found = {(re.search(r"\.(\d+)\.", name) or (name, name))[1] for name in acts}  # layers, by their numbers
    layers = torch.tensor(len(found), device=device)
    over_ranks(layers)
    if layers < num_layers:
        raise ValueError(f"joint R1 needs the activations of all {num_layers} layers; got those of {layers}: "
                         f"{', '.join(acts)}")  # fmt: skip
    for name, x in acts.items():
        _check(f"the activations of {name}", x, hidden_size)
    data = {name: x[None] for name, x in acts.items()}  # (1, tokens, n) each
    return _solve(data, start, training)[0].cpu()


def train_r2_independent(
    r2_acts: dict[str, Tensor],
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    device: str | torch.device = "cpu",
    lr: float = 1e-3,
    epochs: int = 5,
    init_mode: InitMode = "hadamard",
    *,
    smooth_scale: dict[str, Tensor] | None = None,
    solver: Solver = "mm",
    objective: Objective = "whip",
    max_steps: int | None = None,
    seed: int = 0,
    history: list[dict] | None = None,
) -> dict[str, Tensor]:
    """A rotation for every kv head of every layer: ``{o_proj name: (num_kv_heads, head_dim, head_dim)}``.

    ``r2_acts``: the inputs of the o_proj, ``{name: (tokens, num_heads · head_dim)}``; the query heads of a
    group share their kv head's rotation. If the model is smoothed, give ``smooth_scale``: R2 acts
    behind it. All heads are solved in one batch. The rest is as in `train_r1_joint`; the loss in
    ``history`` is the mean over heads. Under torch.distributed each process gives its tokens of every layer.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    heads = []
    for name, x in r2_acts.items():
        _check(f"the activations of {name}", x, x.shape[-1] // num_heads * num_heads)
        x = Transform((smooth_scale or {}).get(name), heads=num_kv_heads).apply(x.float())
        x = x.view(len(x), num_kv_heads, num_heads // num_kv_heads, -1)  # (tokens, kv, group, d)
        heads.append(x.permute(1, 0, 2, 3).flatten(1, 2))  # (kv, tokens · group, d)
    if not heads:
        raise ValueError("R2 needs the inputs of the o_proj; got no activations")
    if len({x.shape[1] for x in heads}) > 1:
        raise ValueError(
            f"R2 is solved in one batch: every module needs as many tokens, got {[len(x) for x in r2_acts.values()]}"
        )
    X = torch.cat(heads).to(device)  # (layers · kv, tokens · group, d)
    start = torch.stack([initial_rotation(X.shape[-1], init_mode, seed + i) for i in range(len(X))]).to(device)
    training = Training(solver, objective, lr, epochs, max_steps, seed, history)
    R = _solve({"heads": X}, start, training).cpu()
    return dict(zip(r2_acts, R.split(num_kv_heads), strict=True))


def initial_rotation(n: int, init_mode: InitMode, seed: int) -> Tensor:
    """``"hadamard"`` (random signs), ``"random"`` (Haar) or ``"identity"``: (n, n)."""
    check_choice("init_mode", init_mode, InitMode)
    if init_mode == "hadamard":
        return random_hadamard(n, seed)
    if init_mode == "random":
        return polar(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))
    return torch.eye(n)


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


def _solve(data, start: Tensor, training: Training) -> Tensor:
    """``data``: (B, tokens, n) by layer, or a Stream; ``start``: (B, n, n)."""
    solver, history, max_steps = training.solver, training.history, training.max_steps
    check_choice("objective", training.objective, Objective)
    check_choice("solver", solver, Solver)
    if solver != "mm" and isinstance(data, Stream):
        raise ValueError(f"solver={solver!r} needs the activations of all layers in memory: give a dict")
    if training.epochs < 1:
        raise ValueError(f"epochs={training.epochs}: at least 1 is needed")
    if max_steps is not None and max_steps < 0:
        raise ValueError(f"max_steps={max_steps}: 0 or more are needed")
    if history:
        raise ValueError(f"history holds {len(history)} steps already: give an empty list")
    loss = OBJECTIVES[training.objective]
    batches = data if isinstance(data, Stream) else Minibatches(data, training.seed, start.device)
    _check_processes(solver, len(batches), history is not None)
    record = Recorder(history, batches, loss, falling=solver == "mm")
    record(start)
    if max_steps == 0:
        return start
    if solver in ("mm", "greedy"):
        log.info("solver=%r needs no learning rate: lr and epochs have no effect", solver)
    if solver == "mm":
        R = minimise(batches, start, loss, record=record, max_steps=max_steps)
    else:
        train = {"sgd": baselines.sgd, "adam": baselines.adam, "cayley": baselines.cayley, "greedy": baselines.greedy}
        layers = [x.to(start.device, torch.float32) for x in data.values()]
        R = train[solver](layers, start, loss, training, record)
    record.finish(R)
    return R


def _check_processes(solver: str, *same) -> None:
    """Processes of torch.distributed that differ would wait for each other for ever."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    if solver != "mm":
        raise ValueError(f"solver={solver!r} runs in one process; torch.distributed is for 'mm'")
    every: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, same)
    if len(set(every)) > 1:
        raise ValueError(f"the processes differ in (number of batches, history asked for): {every}")


def _check(what: str, x: Tensor, features: int) -> None:
    if x.ndim != 2 or x.shape[-1] != features or len(x) == 0:
        raise ValueError(f"{what} have shape {tuple(x.shape)}, expected (tokens, {features})")
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"NaN or Inf in {what}: collect them again in float32")
