"""R1 and the norms' scales together, for what rounding costs the loss behind the readers: the objective ``output``.

Per-token rounding of z = xR∘s adds to every channel noise of variance ω²/(12(2^b − 1)²), ω the width of the token's
grid; a reader W, gamma fused, passes it on by WR diag(1/s). To second order the loss pays, in nats a token,

    ½ mean(ω²)/(12(2^b − 1)²) Σ_j d_j,    d_j = (RᵀGR)_jj / s_j²,    G = Wᵀ diag(f) W,

f_o the Fisher information of the reader's output o. The weights' rounding leaves a share ρ of each group's energy, for
which the loss pays ½ ρ Σ_groups (Σ_j E z_j²) (mean_j d_j). Both are summed over the sites behind norms of all layers.

Scales undo what fusing gamma does (a norm that damped an outlier channel now lets it stretch the grid of all), with
nothing online: they are gains of the norm in the rotated basis. That is why R1 must gather channels of like gamma.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jqlib.distill import Keep, distill, low_precision, pieces_of
from jqlib.hadamard import random_hadamard
from jqlib.models import family_of, sites_of
from jqlib.refine import turned, working_copy
from jqlib.solver import polar

RATES = {"R1": 2.5e-3, "scale": 3e-2}  # Adam's
STEPS = 150
FISHER_TOKENS = 4096
WEIGHT_NOISE = 0.006  # ρ at 4 bits: what GPTQ leaves of a weight's energy, about half of what RTN does
BLOCK = 64  # channels of like gamma that the start gathers
FLOOR = 1e-3  # of gamma, in the start


def train_r1_output(
    model: nn.Module,
    windows: Tensor,
    *,
    bits: int = 4,
    clip: float = 0.9,
    groupsize: int = 128,
    steps: int = STEPS,
    seed: int = 0,
    keep: Keep | None = None,
    resume: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """R1, (hidden, hidden), and the norms' scales, ``{first reader: (hidden,)}``, as `rotate_model` takes them.

    ``model``: as loaded; it is copied, not changed. ``windows``: (windows, seqlen) of calibration text: each step goes
    by the inputs of all sites on another piece of it. ``bits`` and ``clip`` are the activations', ``groupsize`` the
    weights'; the rest as `distill` takes them.

    Raises FloatingPointError where the loss is not finite.
    """
    R1, scales = gathered_start(model, seed)
    model = working_copy(model, fuse=True)
    grams = sensitivities(model, windows, seed)
    knobs = {"R1": torch.zeros_like(R1)} | {f"scale {name}": scale.log() for name, scale in scales.items()}
    knobs = {name: value.to(model.device).requires_grad_() for name, value in knobs.items()}
    R1 = R1.to(model.device)

    def loss(ids: Tensor) -> Tensor:
        R, costs = turned(R1, knobs["R1"]), []
        for name, x in stream_inputs(model, ids.to(model.device)).items():
            scale = knobs[f"scale {name}"].exp()
            costs.append(cost(x @ R * scale, R, scale, grams[name], bits, clip, groupsize))
        return torch.stack(costs).sum()

    distill(knobs, loss, windows, RATES, label="output", steps=steps, seed=seed, keep=keep, resume=resume)
    R1 = polar(turned(R1, knobs["R1"].detach())).cpu()
    return R1, {name: knobs[f"scale {name}"].detach().exp().cpu() for name in scales}


def cost(z: Tensor, R: Tensor, scale: Tensor, gram: Tensor, bits: int, clip: float, groupsize: int) -> Tensor:
    """Nats a token that the rounding of one site's ``z`` = xR∘s, (tokens, n), and of its readers' weights costs."""
    width = clip * (z.amax(1) - z.amin(1))
    noise = width.square().mean() / (12 * (2**bits - 1) ** 2)
    sensitivity = (R * (gram @ R)).sum(0) / scale.square()  # (n,)
    energy = z.square().mean(0)
    groups = zip(energy.split(groupsize), sensitivity.split(groupsize), strict=True)
    weights = WEIGHT_NOISE * sum(e.sum() * d.mean() for e, d in groups)
    return (noise * sensitivity.sum() + weights) / 2


def gathered_start(model: nn.Module, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """A Hadamard matrix for each BLOCK of channels of like gain, and as its scale the block's mean gain at each norm.

    The order is that of the channels' part in the first principal component of log |gamma| over all norms.
    """
    gammas = {
        f"{layer}.{site.readers[0]}": model.get_submodule(f"{layer}.{site.norm}").weight
        for layer, site in sites_of(model) if site.norm
    }  # fmt: skip
    logs = torch.stack([gamma.detach().float().cpu().abs().clamp(min=FLOOR).log() for gamma in gammas.values()])
    centred = logs - logs.mean(1, keepdim=True)
    order = torch.linalg.svd(centred, full_matrices=False).Vh[0].argsort()
    sizes = [len(block) for block in order.split(BLOCK)]
    R1 = torch.zeros(len(order), len(order))
    R1[order] = torch.block_diag(*[random_hadamard(n, seed + i) for i, n in enumerate(sizes)])
    means = [torch.cat([part.mean().expand(len(part)) for part in log[order].split(BLOCK)]) for log in logs]
    return R1, {name: mean.exp() for name, mean in zip(gammas, means, strict=True)}


def sensitivities(model: nn.Module, windows: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """G of every site behind a norm of a fused model, ``{first reader: (hidden, hidden)}``.

    f_o is the mean over FISHER_TOKENS of the squared gradient at output o of Σ log p(y), y drawn from the model's p.
    """
    readers = {
        f"{layer}.{site.readers[0]}": [model.get_submodule(f"{layer}.{reader}") for reader in site.readers]
        for layer, site in sites_of(model) if site.norm
    }  # fmt: skip
    squares: dict[nn.Module, Tensor] = {}

    def add(linear: nn.Module, gradient: Tensor) -> None:
        squares[linear] = squares.get(linear, 0) + gradient.float().square().sum((0, 1))

    def watch(linear: nn.Module, args, output: Tensor) -> None:
        output.register_hook(partial(add, linear))

    embed = model.get_submodule(family_of(model).embed)
    handles = [embed.register_forward_hook(lambda module, args, output: output.requires_grad_())]
    handles += [linear.register_forward_hook(watch) for linears in readers.values() for linear in linears]
    generator = torch.Generator(model.device).manual_seed(seed)
    pieces = pieces_of(windows)
    pieces = pieces[: -(-FISHER_TOKENS // pieces.shape[1])]
    try:
        for ids in pieces:
            with low_precision(model.device):
                logits = model(ids[None].to(model.device), use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: sum(_gram(x, squares[x] / pieces.numel()) for x in linears) for name, linears in readers.items()}


def _gram(linear: nn.Module, fisher: Tensor) -> Tensor:
    weight = linear.weight.float()
    return weight.T @ (fisher[:, None] * weight)


@torch.no_grad()
def stream_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What the sites behind the norms of a fused model read, ``{first reader: (tokens, hidden)}``, float32."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module, args, output: Tensor) -> None:
        found[name] = output.flatten(0, -2).float()

    handles = [
        model.get_submodule(f"{layer}.{site.norm}").register_forward_hook(partial(keep, f"{layer}.{site.readers[0]}"))
        for layer, site in sites_of(model) if site.norm
    ]  # fmt: skip
    try:
        with low_precision(model.device):
            model.base_model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
