"""R1 and the norms' scales together, for what rounding costs the loss behind the readers: the objective ``output``.

A site's input x, (tokens, n), and the gradient h of the loss there are transformed together: z = xA (`Transform.apply`)
is what is rounded, e = hA⁻ᵀ (`Transform.dual`) is what the loss feels of it. Per-token rounding adds to every channel
of z noise of variance ω²/(12(2^b − 1)²), ω the width of the token's grid; to second order the loss pays for it, in nats
per token,

    ½ mean_t ω_t² ‖e_t‖² / (12(2^b − 1)²).

The weights' rounding acts as noise of a share ρ of the energy in each of their groups g, for which the loss pays about
½ ρ Σ_g (Σ_{j∈g} E z_j²)(mean_{j∈g} E e_j²), gradients at different outputs and tokens taken as unrelated to each other
and to the inputs. Both are summed over the sites behind norms of all layers. The loss is −Σ log p(y), y drawn from the
model's own p: E hhᵀ is then the Fisher information of the input, and what it pays is KL to the model before rounding.
Clipping is not counted.

Scales undo what fusing gamma does (a norm that damped an outlier channel now lets it stretch the grid of all), with
nothing online: they are gains of the norm in the rotated basis. That is why R1 must gather channels of like gamma.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from jqlib.learn.lessons import ROWS, cut
from jqlib.learn.recompute import recomputing
from jqlib.learn.refine import learnable_transforms
from jqlib.learn.steps import Steps, minimise_by_steps
from jqlib.model.families import R1_SITES, family_of, norms_of, sites_of
from jqlib.model.walk import removing
from jqlib.precision import products_in
from jqlib.transform.build import transforms_of
from jqlib.transform.grids import OFF
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.orthogonal import polar
from jqlib.transform.transform import Grid, Transform

RATES = {"R1": 2.5e-3, "scale": 3e-2}  # of Adam
WEIGHT_NOISE = 0.006  # ρ at 4 bits, a quarter for each bit more: half of RTN's, as GPTQ's effect at the outputs is
BLOCK = 64  # channels of like gamma that the start gathers
FLOOR = 1e-3  # of gamma, in the start


def train_r1_output(
    model: nn.Module, windows: Tensor, *, grid: Grid | None = None, w_bits: int = 4, groupsize: int = 128,
    steps: Steps = Steps(150),
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """R1, (hidden, hidden), and the norms' scales, ``{site: (hidden,)}``, as `rotate_model` takes them.

    ``model``: as loaded; nothing of it changes. ``windows``: (windows, seqlen) of calibration text: each step goes by
    the inputs of all sites, and the gradients there, on another piece of it. ``grid`` is the activations' (default: 4
    bits, clip 0.9), ``w_bits`` and ``groupsize`` are the weights'.

    Raises FloatingPointError if the model's logits or the loss are not finite.
    """
    R1, gains = gathered_start(model, steps.seed)
    grids = dict.fromkeys(norms_of(model), grid or Grid(4, 0.9))
    transforms = transforms_of(model, R1, norm_scale=gains, grids=grids)
    transforms = {name: transforms[name] for name in sites_of(model, *R1_SITES)}

    ids = cut(windows).to(model.device)
    check_logits(model, ids[:1])
    draws = torch.rand(ids.shape, generator=torch.Generator().manual_seed(steps.seed)).to(model.device)

    def loss(pieces: Tensor) -> Tensor:
        with products_in(steps.dtype, model.device):
            seen = inputs_and_gradients(model, ids[pieces], draws[pieces])
        with parametrize.cached():
            return torch.stack([cost(transforms[name], *xh, w_bits, groupsize) for name, xh in seen.items()]).sum()

    with learnable_transforms(sites_of(model), transforms, tuple(RATES)) as knobs, recomputing(model, steps.together):
        minimise_by_steps(knobs, loss, ids, RATES, steps, "output")
    R1 = polar(next(iter(transforms.values())).rotation.matrix).cpu()
    return R1, {name: transform.gain.detach().cpu() for name, transform in transforms.items()}


def cost(transform: Transform, x: Tensor, h: Tensor, w_bits: int, groupsize: int) -> Tensor:
    """Nats per token that rounding a site's transformed input and its readers' weights costs; x, h: (tokens, n)."""
    z, e, grid = transform.apply(x), transform.dual(h), transform.grid
    width = grid.clip * (z.amax(1).clamp(min=0) - z.amin(1).clamp(max=0))
    activations = (width.square() * e.square().sum(1)).mean() / (12 * (2**grid.bits - 1) ** 2)
    groups = zip(z.square().mean(0).split(groupsize), e.square().mean(0).split(groupsize), strict=True)
    weights = WEIGHT_NOISE * 4.0 ** (4 - w_bits) * sum(energy.sum() * felt.mean() for energy, felt in groups)
    return (activations * (grid.bits < OFF) + weights * (w_bits < OFF)) / 2


def gathered_start(model: nn.Module, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """A Hadamard matrix for each BLOCK of channels of like gain; as its scale the geometric mean of the gains there.

    The order is that of the channels' part in the first principal component of log |gamma| over all norms.
    """
    norms = norms_of(model)
    gammas = torch.stack([norm.weight.data.float().cpu().abs() for norm in norms.values()])
    logs = gammas.clamp(min=FLOOR).log()
    centred = logs - logs.mean(1, keepdim=True)
    order = torch.linalg.svd(centred, full_matrices=False).Vh[0].argsort()
    sizes = [len(block) for block in order.split(BLOCK)]
    R1 = torch.zeros(len(order), len(order))
    R1[order] = torch.block_diag(*[random_hadamard(n, seed + i) for i, n in enumerate(sizes)])
    means = [torch.cat([part.mean().expand(len(part)) for part in log[order].split(BLOCK)]) for log in logs]
    return R1, {name: mean.exp() for name, mean in zip(norms, means, strict=True)}


@torch.inference_mode()
def check_logits(model: nn.Module, ids: Tensor) -> None:
    """FloatingPointError if they are not finite."""
    if not torch.isfinite(model(ids, use_cache=False).logits).all():
        raise FloatingPointError("NaN or Inf in the model's logits: try --dtype float32")


def inputs_and_gradients(model: nn.Module, ids: Tensor, draws: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What the sites behind norms read, and the loss's gradient there, ``{site: (x, h)}``.

    ``ids``: (sequences, tokens). ``draws``, shaped as they are: numbers in [0, 1) that decide which labels are drawn. x
    and h: (sequences * tokens, hidden), float32.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, module, args, output: Tensor) -> None:
        output.register_hook(partial(keep, name, output.detach()))

    def keep(name: str, x: Tensor, gradient: Tensor) -> None:
        found[name] = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()

    embed = model.get_submodule(family_of(model).embed)
    handles = [embed.register_forward_hook(lambda module, args, output: output.requires_grad_())]
    handles += [norm.register_forward_hook(partial(watch, name)) for name, norm in norms_of(model).items()]
    with removing(handles):
        state = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        head = model.get_output_embeddings().weight
        state.backward(_slope(state.detach(), head, draws.flatten()))
    return found


@torch.no_grad()
def _slope(state: Tensor, head: Tensor, draws: Tensor) -> Tensor:
    """Of −Σ log p(y), y drawn from the model's own p for each token, by what the head reads, (tokens, hidden)."""
    slopes = []
    for rows, drawn in zip(state.split(ROWS), draws.split(ROWS), strict=True):
        p = linear(rows, head).float().softmax(-1)
        slope = p.scatter_add(-1, _labels(p, drawn)[:, None], -torch.ones_like(p[:, :1]))
        slopes.append(slope.to(head.dtype) @ head)
    return torch.cat(slopes)


def _labels(p: Tensor, draws: Tensor) -> Tensor:
    """A label for each row of (tokens, vocabulary), by its probabilities; torch.multinomial takes ten times longer."""
    upto = p.cumsum(-1)
    found = torch.searchsorted(upto, draws[:, None] * upto[:, -1:])[:, 0]
    return found.clamp(max=p.shape[-1] - 1)  # NaN has no place among them: it shows in the loss
