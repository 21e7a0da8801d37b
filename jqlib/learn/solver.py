"""The solver: minimise the mean of a loss f(xR) over rotations R, on all tokens of all layers at once.

**The step.** h(y) = λy²/2 − f(y) is convex where λ is large enough (for Whip: λ ≥ 1), and Σ‖xR‖² does not
depend on R. So minimising f is maximising a convex function, and its linearisation gives a step that, on the tokens it
is taken on, can only descend (minorise–maximise; Journée et al. 2010), with no learning rate:

    R⁺ = polar( λ XᵀX R − ∇f(R) ),    polar(M) = UVᵀ of M's singular value decomposition,

XᵀX and ∇f being means over tokens.

A smaller λ goes further, without that guarantee: we start at ‖∇f‖ / ‖XᵀXR‖ (for Whip about 0.3), and the last steps,
on all tokens, are checked.

**The passes.** First every minibatch gives a step. Each pass over the data takes minibatches twice as large as the
pass before, so that their noise dies away; early steps cost a twentieth of a full one. Then steps on all tokens,
extrapolated along the last two (Nesterov), until nothing is gained. One that raises the loss is taken back: the next is
not extrapolated, and where that fails too, λ is doubled.

Losses that no moderate λ majorises (range, kurtosis, lp, quant_error) begin with 300 Adam steps on minibatches, in the
Lie algebra: an angle per step is given, the same for every loss and size.
"""

from itertools import islice
from zlib import crc32

import torch
from torch import Tensor
from tqdm import tqdm

from jqlib.learn.objectives import Loss, mean_loss, mean_value, over_ranks, second_moment, whip
from jqlib.transform.orthogonal import nearby_polar, polar

TOLERANCE = 2e-4  # stop when a step lowers the loss by less than this share of it
MAX_STEPS = 30  # on all tokens
MINIBATCH = 8  # tokens per channel in the smallest minibatch
RIDGE = 1e-3  # of R itself in a step: where the data say nothing, R stays as it is
MAJORISED = (whip,)  # losses with a λ that holds everywhere
ADAM_STEPS, ADAM_ANGLE = 300, 0.12  # the first step turns a channel by about this angle (radians)


class Minibatches:
    """Tokens of all layers in shuffled minibatches, each with its share of every layer; can be read many times.

    ``layers``: (B, tokens, n) by name, in memory or memory-mapped. A layer's shuffle depends on its name and the seed
    alone: the order of layers, or which process holds them, makes no difference.
    """

    def __init__(self, layers: dict[str, Tensor], seed: int = 0, device: str | torch.device = "cpu"):
        self.layers, self.seed, self.device = layers, seed, device
        tokens = torch.tensor(sum(x.shape[1] for x in layers.values()), device=device)
        over_ranks(tokens)
        self.count = max(1, tokens.item() // (MINIBATCH * next(iter(layers.values())).shape[-1]))

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        orders = [self._shuffle(name, x.shape[1]).tensor_split(self.count) for name, x in self.layers.items()]
        for i in range(self.count):
            pieces = [x[:, order[i].to(x.device)] for x, order in zip(self.layers.values(), orders, strict=True)]
            yield torch.cat(pieces, dim=1).to(self.device, torch.float32)

    def _shuffle(self, name: str, tokens: int) -> Tensor:
        return torch.randperm(tokens, generator=torch.Generator().manual_seed(self.seed + crc32(name.encode())))


def minimise(batches, R: Tensor, objective: Loss, *, record, max_steps: int | None = None) -> Tensor:
    """Rotations (B, n, n) for B problems, from the start R.

    ``batches``: an iterable with a length that can be read many times and gives the data in pieces
    (B, tokens, n). Beside one of them the solver needs a few (B, n, n). ``record(R, loss=None)`` is called at
    every step. ``max_steps`` bounds the steps, small and full ones together.
    """
    start, steps = R, max_steps
    first = _majorising_passes if objective in MAJORISED else _adam_passes
    with tqdm(desc="rotation", unit="step") as bar:
        if len(batches) > 1 or objective not in MAJORISED:
            R, steps = first(batches, R, objective, steps, record, bar)
            # what helped minibatches must have helped ALL tokens
            better = mean_value(batches, R, objective) <= mean_value(batches, start, objective)
            R = torch.where(better[:, None, None], R, start)
        return _descend(batches, R, objective, MAX_STEPS if steps is None else steps, record, bar)


def _majorising_passes(batches, R, objective, steps, record, bar):
    """Passes over minibatches that double, one plain step each; returns R and the steps left."""
    sample, size = [next(iter(batches))], _smallest(batches)
    damping = _start_damping(mean_loss(sample, R, objective)[1], second_moment(sample, R) @ R)
    while 2 * size <= len(batches) and steps != 0:
        for group in _grouped(batches, len(batches) // size):
            if steps == 0:
                break
            energy, target = mean_loss(group, R, lambda y: _majoriser(objective, damping, y))
            ridge = RIDGE * damping * (2 / R.shape[-1] * energy.float()[:, None, None])
            R = polar(target + ridge * R)
            steps = None if steps is None else steps - 1
            bar.update()
            record(R)
        size *= 2
    return R, steps


def _majoriser(objective, damping: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """‖y‖²/2, and the slope of h(y) = λy²/2 − f(y)."""
    return y.square().sum(-1) / 2, damping * y - objective(y)[1]


def _smallest(batches) -> int:
    """How many of the batches (over all processes) make MINIBATCH tokens per channel."""
    x = next(iter(batches))
    tokens = torch.tensor(x.shape[1], device=x.device)
    over_ranks(tokens)
    return -(-MINIBATCH * x.shape[-1] // tokens.item())


def _start_damping(gradient: Tensor, pull: Tensor) -> Tensor:
    """λ that balances f's gradient with XᵀXR, for each problem: (B, 1, 1)."""
    size = gradient.double().norm(dim=(1, 2), keepdim=True) / pull.double().norm(dim=(1, 2), keepdim=True)
    return size.nan_to_num(0, 1e6).clamp(1e-6, 1e30).to(gradient)


def _adam_passes(batches, R, objective, steps, record, bar):
    """Adam on the skew matrices D of R⁺ = exp(−D) R, over minibatches, its angle falling to 0.

    Adam's steps don't know the loss's scale: the angle is all there is to choose, and it suits every loss and size.
    """
    total = ADAM_STEPS if steps is None else min(steps, ADAM_STEPS)
    eye, mean, square = torch.eye(R.shape[-1], device=R.device), torch.zeros_like(R), torch.zeros_like(R)
    done, scale, groups = 0, None, max(1, len(batches) // _smallest(batches))
    while done < total:
        for group in islice(_grouped(batches, groups), total - done):
            gradient = mean_loss(group, R, objective)[1] @ R.mT
            skew = gradient - gradient.mT
            scale = skew.abs().amax((1, 2), keepdim=True).clamp(min=1e-30) if scale is None else scale
            skew = skew / scale  # so that squares neither overflow nor vanish
            done += 1
            mean, square = mean.lerp(skew, 0.1), square.lerp(skew * skew, 0.01)
            direction = mean / (1 - 0.9**done) / ((square / (1 - 0.99**done)).sqrt() + 1e-8)
            angle = ADAM_ANGLE / R.shape[-1] ** 0.5 * (1 - (done - 1) / total)
            R = nearby_polar((eye - angle * direction) @ R)
            bar.update()
            record(R)
    return R, None if steps is None else steps - done


def _descend(batches, R, objective, steps: int, record, bar) -> Tensor:
    """Steps on all tokens until they gain little. Each problem is judged alone."""
    if steps == 0:
        return R
    gram = second_moment(batches, R)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True)
    loss, gradient = mean_loss(batches, R, objective)
    first = damping = _start_damping(gradient, gram @ R)
    previous, momentum = R, torch.zeros_like(damping)  # momentum: accepted steps in a row
    rejected = 0
    for _ in range(steps):
        point = polar(damping * (gram @ R) - gradient)
        beta = (momentum / (momentum + 3)).clamp(max=0.9)
        trial = nearby_polar(point + beta * (point - previous)) if beta.any() else point
        trial_loss, trial_gradient = mean_loss(batches, trial, objective)
        better = trial_loss <= loss
        gain = ((loss - trial_loss) / loss.abs().clamp(min=1e-20)).where(better, 0)
        accept = better[:, None, None]
        damping = torch.where(accept | (beta > 0), damping, 2 * damping)
        momentum = torch.where(accept, momentum + 1, 0)
        previous = torch.where(accept, point, previous)
        R, gradient = torch.where(accept, trial, R), torch.where(accept, trial_gradient, gradient)
        loss = torch.where(better, trial_loss, loss)
        bar.update()
        rejected += (~better).sum().item()
        bar.set_postfix(loss=f"{loss.mean().item():.4f}", rejected=rejected, refresh=False)
        if better.any():
            record(R, loss.mean().item())
        plain = ~better & (beta.flatten() == 0)  # a plain step failed: λ has doubled
        stuck = plain & (damping > 1e4 * first).flatten()
        if (stuck | (better & (gain < TOLERANCE))).all():
            break
    return R


def _grouped(batches, groups: int):
    """The batches in this many runs of neighbours, as equal as can be, each to be read once."""
    pieces = iter(batches)
    for i in range(groups):
        size = len(batches) * (i + 1) // groups - len(batches) * i // groups
        yield islice(pieces, size)
