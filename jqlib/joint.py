"""Joint R1, and R2: a learning-rate-free solver on the orthogonal group.

Minimise the mean over ALL tokens of all layers of f(xR), R orthogonal. h(y) = λy²/2 − exp(−|y|) is convex
for λ ≥ 1 and Σ‖xR‖² does not depend on R: minimising Whip is maximising a convex function, and its
linearisation gives a step that can only descend (minorise–maximise; Journée et al. 2010):

    R⁺ = polar( λ XᵀX R − ∇f(R) ),    polar(M) = UVᵀ of M's singular value decomposition.

A smaller λ goes further. We start at λ = ‖∇f‖ / ‖XᵀX R‖ (for Whip about 0.3), extrapolate along the last
two steps (Nesterov), and take back any step that raises the loss: then plainly, then with a larger λ.
"""

import contextlib
import logging
import time

import torch
from torch import Tensor
from tqdm import tqdm

from jqlib import baselines
from jqlib.hadamard import random_hadamard
from jqlib.objectives import Objective, get_objective, mean_loss

log = logging.getLogger(__name__)

INIT_MODES = ("hadamard", "random", "identity")
SOLVERS = ("mm", "sgd", "greedy")
TOLERANCE = 2e-4  # stop when a step lowers the loss by less than this share of it
MAX_STEPS = 60
RIDGE = 1e-3


def train_r1_joint(
    acts: dict[str, Tensor],
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
    `collect_activations` gives them. ``solver``: ``"mm"`` descends on all layers at every step and needs
    no learning rate; ``"sgd"`` is DartQuant's published optimiser (``lr``, ``epochs``); ``"greedy"`` goes
    layer after layer. ``max_steps=0`` returns the start. ``history`` receives a dict a step: step, seconds
    since the call, loss over all tokens, orthogonality (largest entry of \\|RᵀR − I\\|).

    Raises ValueError for shapes and names that don't fit, FloatingPointError for NaN or Inf in ``acts``
    (with the module's name) and for a loss that turns NaN (with the learning rate).
    """
    if len(acts) < num_layers:
        raise ValueError(f"joint R1 needs the activations of all {num_layers} layers; got {len(acts)} modules: "
                         f"{', '.join(acts)}")  # fmt: skip
    for name, x in acts.items():
        _check(name, x, hidden_size)
    layers = [x.float().to(device)[None] for x in acts.values()]  # (1, tokens, n) each
    start = initial_rotation(hidden_size, init_mode, seed)[None].to(device)
    return _solve(layers, start, solver, objective, lr, epochs, max_steps, seed, history)[0].cpu()


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
    ``history`` is the mean over heads.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    heads = []
    for name, x in r2_acts.items():
        _check(name, x, x.shape[-1] // num_heads * num_heads)
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
    R = _solve([X], start, solver, objective, lr, epochs, max_steps, seed, history).cpu()
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


def polar(M: Tensor) -> Tensor:
    """The orthogonal polar factor of (..., n, n): the rotation nearest to M."""
    R = torch.full_like(M, torch.nan)
    with contextlib.suppress(torch.linalg.LinAlgError):
        U, _, Vh = torch.linalg.svd(M)
        R = U @ Vh
    if not orthogonality_error(R) < 1e-3:  # float32 can fail on ill-conditioned data
        U, _, Vh = torch.linalg.svd(M.double())
        R = (U @ Vh).to(M)
    return 1.5 * R - 0.5 * R @ (R.mT @ R)  # one Newton–Schulz step takes what rounding left


def nearby_polar(M: Tensor) -> Tensor:
    """`polar` for an M that is not far from a rotation, by Newton–Schulz: products only."""
    bound = (M.mT @ M).abs().sum(-1).amax(-1).sqrt()  # of the largest singular value; scaling keeps the polar factor
    R = M / bound[..., None, None]
    for _ in range(15):
        R = 1.5 * R - 0.5 * R @ (R.mT @ R)
        if orthogonality_error(R) < 1e-6:
            return R
    return polar(M)


class Recorder:
    """Fills ``history``. The time it spends on measuring the loss over all tokens is not counted.

    ``falling``: a step counts only if it is the lowest so far (one on a sample may raise the loss over all tokens).
    """

    def __init__(self, history: list[dict] | None, layers: list[Tensor], objective: Objective, falling: bool):
        self.history, self.layers, self.objective, self.falling = history, layers, objective, falling
        self.start = time.perf_counter()

    def __call__(self, R: Tensor, loss: float | None = None) -> None:
        """Record R; ``loss`` over all tokens, where the solver knows it, need not be measured."""
        if self.history is None:
            return
        now = time.perf_counter()
        loss = self._loss(R) if loss is None else loss
        if not (self.falling and self.history) or loss <= self.history[-1]["loss"]:
            self.history.append({
                "step": len(self.history),
                "seconds": now - self.start,
                "loss": loss,
                "orthogonality": orthogonality_error(R),
            })  # fmt: skip
        self.start += time.perf_counter() - now

    def _loss(self, R: Tensor) -> float:
        total = sum(mean_loss(x, R, self.objective)[0].mean().item() * x.shape[1] for x in self.layers)
        return total / sum(x.shape[1] for x in self.layers)


def orthogonality_error(R: Tensor) -> float:
    """The largest entry of \\|RᵀR − I\\|."""
    return (R.mT @ R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).abs().max().item()


def minimise(
    X: Tensor, R: Tensor, objective: Objective, *, record, max_steps: int | None = None, seed: int = 0
) -> Tensor:
    """The solver: rotations (B, n, n) for B problems with data X, (B, tokens, n), from the start R.

    The first steps use a growing random sample of the tokens, the last ones all of them.
    """
    start, steps = R, MAX_STEPS if max_steps is None else max_steps
    order = torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(seed)).to(X.device)
    sizes = [X.shape[1] // share for share in (16, 4) if X.shape[1] // share >= 8 * X.shape[-1]]
    with tqdm(total=steps, desc="rotation", unit="step") as bar:
        for size in sizes:
            sample = X[:, order[:size]]
            R, steps = _descend(sample, R, objective, steps, 20 * TOLERANCE, lambda R, _: record(R), bar)
        if sizes:  # what helped the samples must have helped ALL tokens
            better = mean_loss(X, R, objective)[0] <= mean_loss(X, start, objective)[0]
            R = torch.where(better[:, None, None], R, start)
        R, _ = _descend(X, R, objective, steps, TOLERANCE, record, bar)
    return R


def _descend(X, R, objective, steps: int, tolerance: float, record, bar) -> tuple[Tensor, int]:
    """Steps on one sample until they gain little; returns R and the steps left. Each problem is judged alone."""
    gram = X.mT @ X / X.shape[1]
    diagonal = gram.diagonal(dim1=1, dim2=2)  # a little of R itself: where X says nothing, R stays as it is
    diagonal += RIDGE * diagonal.mean(1, keepdim=True)
    loss, gradient = mean_loss(X, R, objective)
    pull = (gram @ R).norm(dim=(1, 2)).clamp(min=1e-20)
    damping = (gradient.double().norm(dim=(1, 2)) / pull).float().clamp(min=1e-6)[:, None, None]  # λ
    previous, momentum = R, torch.zeros_like(damping)  # momentum: accepted steps in a row
    while steps > 0:
        steps -= 1
        point = polar(damping * (gram @ R) - gradient)
        beta = (momentum / (momentum + 3)).clamp(max=0.9)
        trial = nearby_polar(point + beta * (point - previous)) if beta.any() else point
        trial_loss, trial_gradient = mean_loss(X, trial, objective)
        better = trial_loss <= loss
        gain = ((loss - trial_loss) / loss.abs().clamp(min=1e-20)).where(better, 0)
        accept = better[:, None, None]
        damping = torch.where(accept | (beta > 0), damping, 2 * damping)
        momentum = torch.where(accept, momentum + 1, 0)
        previous = torch.where(accept, point, previous)
        R, gradient = torch.where(accept, trial, R), torch.where(accept, trial_gradient, gradient)
        loss = torch.where(better, trial_loss, loss)
        bar.update()
        bar.set_postfix(loss=f"{loss.mean().item():.4f}", refresh=False)
        if better.any():
            record(R, loss.mean().item())
        plain = ~better & (beta.flatten() == 0)  # a plain step failed: λ has doubled
        stuck = plain & (damping.flatten() > 1e4 * gradient.double().norm(dim=(1, 2)) / pull)
        if (stuck | (better & (gain < tolerance))).all():
            break
    return R, steps


def _solve(layers, start, solver, objective, lr, epochs, max_steps, seed, history) -> Tensor:
    """``layers``: the data, a list of (B, tokens, n); ``start``: (B, n, n)."""
    function = get_objective(objective)
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; there are {', '.join(SOLVERS)}")
    record = Recorder(history, layers, function, falling=solver == "mm")
    record(start)
    if max_steps == 0:
        return start
    if solver == "sgd":
        return baselines.sgd(layers, start, function, lr, epochs, max_steps, seed, record)
    log.warning("solver=%r needs no learning rate: lr and epochs have no effect", solver)
    if solver == "greedy":
        return baselines.greedy(layers, start, function, max_steps, seed, record, minimise)
    return minimise(torch.cat(layers, dim=1), start, function, record=record, max_steps=max_steps, seed=seed)


def _check(name: str, x: Tensor, features: int) -> None:
    if x.ndim != 2 or x.shape[-1] != features or len(x) == 0:
        raise ValueError(f"activations of {name} have shape {tuple(x.shape)}, expected (tokens, {features})")
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"NaN or Inf in the activations of {name}: collect them again in float32")
