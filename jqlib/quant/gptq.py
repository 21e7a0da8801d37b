"""GPTQ (Frantar et al. 2022): round a weight's columns one by one, and let the later ones make up for the error.

A linear's output error on calibration inputs X is tr(ΔW H ΔWᵀ) with H = XᵀX. Columns are taken in the order
of falling H_jj; groups keep their place and their scale is chosen beforehand (static groups). Layer by layer: each
layer's inputs come from the layers before it, quantised already. One layer's Hessians are in memory at a time, beside
the hidden states of all calibration windows. Weights may answer for the rounding of inputs too (`corrected`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from jqlib.model.families import Place, sites_of
from jqlib.model.walk import Step, walk
from jqlib.product import product
from jqlib.quant.packed import set_weight
from jqlib.replay import Replayed
from jqlib.transform.grids import round_symmetric, round_to_nearest, spread, weight_scales

log = logging.getLogger(__name__)

DAMPING = 0.01  # of H's mean diagonal, added to it
PRIOR = 30  # tokens of average energy that say, in every direction, that a weight is right as it is
BLOCK = 32  # columns whose error is passed on together


def quantize_weights_gptq(
    model: nn.Module,
    calib_data: Tensor,
    bits: int = 4,
    groupsize: int = 128,
    *,
    before: Callable[[Place], object] | None = None,
    correct: bool = False,
) -> None:
    """Round the weights of all decoder layers in place, on the inputs they see as the model stands.

    ``calib_data``: token windows, (windows, seqlen). A rotated model is calibrated rotated, R4 included.
    ``before``: called with each site of a layer when its turn comes, such as to have its input rounded from then on.
    ``correct``: weights aim at the outputs of the model without any rounding (`corrected`), site after site: a site's
    inputs come through all sites before it, those of its own layer too, as they ended.
    """
    places = list(sites_of(model).values())
    exact = walk(deepcopy(model), calib_data) if correct else None  # the model without any rounding
    for i, step in enumerate(walk(model, calib_data, "GPTQ")):
        plain = next(exact) if exact is not None else None
        here = [place for place in places if place.layer == i]
        for place in here if before else ():
            before(place)
        for group in [[place] for place in here] if correct else [here]:
            hessians, errors = _statistics(step, plain, group)
            for place in group:
                weight, H = place.weight, hessians[place.name]
                if correct:
                    weight = corrected(weight, H, errors[place.name], calib_data.numel())
                round_site(place, weight, H, bits, groupsize)


def round_site(place: Place, weight: Tensor, hessian: Tensor, bits: int, groupsize: int) -> dict[str, Tensor]:
    """Give a site's readers their ``weight``, one above the other, rounded by the ``hessian`` of the input that they
    share; returns its aims by reader.
    """
    found = gptq(weight, hessian, bits, groupsize, name=place.name)
    sizes = [linear.out_features for linear in place.linears.values()]
    rounded, scales, aims = (part.split(sizes) for part in found)
    for linear, rows, scale in zip(place.linears.values(), rounded, scales, strict=True):
        set_weight(linear, rows, scale, bits, groupsize)
    return dict(zip(place.linears, aims, strict=True))


def gptq(
    weight: Tensor, hessian: Tensor, bits: int = 4, groupsize: int = 128, *, name: str = "a weight"
) -> tuple[Tensor, Tensor, Tensor]:
    """The dequantised weight (out, in), its scales (out, groups) and its aim (out, in): what each weight had become
    when its turn came to be rounded. ``hessian``: (in, in), XᵀX of its inputs.

    Scales are those of least squared error weighted by H's diagonal. A row that ends with a larger
    tr(ΔW H ΔWᵀ) than rounding to nearest would have is rounded to nearest. ``name`` is for messages.
    """
    weight, hessian = weight.float(), hessian.float()
    scales = weight_scales(weight, bits, groupsize, hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True)
    inverse = _inverse_cholesky(hessian, order, name)
    columns, grid = (x[:, order].T.contiguous() for x in (weight, spread(scales, groupsize, weight)))
    rounded, aim = torch.empty_like(weight), torch.empty_like(weight)
    rounded[:, order] = _columns(columns, grid, inverse, bits).T
    aim[:, order] = columns.T
    nearest, its_scales = round_to_nearest(weight, bits, groupsize)
    # a difference of two squares needs one product with H
    worse = ((((rounded - nearest) @ hessian) * (rounded + nearest - 2 * weight)).sum(1) > 0)[:, None]
    choices = zip((nearest, its_scales, weight), (rounded, scales, aim), strict=True)
    return (*(torch.where(worse, *choice) for choice in choices),)


def corrected(weight: Tensor, hessian: Tensor, error: Tensor, tokens: int) -> Tensor:
    """The weight that makes of rounded inputs X̂ what ``weight`` (out, in) makes of exact ones X, by least squares.

    ``hessian``: X̂ᵀX̂, ``error``: (X − X̂)ᵀX̂, both (in, in), over so many ``tokens``. ‖XWᵀ − X̂Qᵀ‖² is least where
    ‖X̂(W* − Q)ᵀ‖² is, W* = W + W (X − X̂)ᵀX̂ (X̂ᵀX̂)⁻¹: with GPTQ on W* we solve the problem of GPTAQ (Li et al. 2025)
    and Qronos (Zhang et al. 2025). A ridge of PRIOR tokens of average energy keeps it from learning noise.
    """
    H = hessian.double()
    ridge = (PRIOR / tokens * H.trace()).clamp(min=1e-30)
    H = H + ridge * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return weight + torch.linalg.solve(H, (weight.double() @ error.double()).mT).mT.to(weight.dtype)


def _columns(weight: Tensor, scale: Tensor, inverse: Tensor, bits: int) -> Tensor:
    """The loop over columns, here rows of (in, out), which end as their aims; ``inverse``: upper U with H⁻¹ = UᵀU.

    What the errors before it in its block mean for a column is one product when its turn comes.
    """
    rounded, replayed = torch.empty_like(weight), Replayed(partial(_block, bits=bits), weight.device)
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        block = replayed if end - start == BLOCK else partial(_block, bits=bits)
        with one_thread():
            weight[start:end], rounded[start:end], errors = block(*(x[start:end] for x in (weight, scale)),
                                                                  inverse[start:end, start:end])  # fmt: skip
        weight[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return rounded


def _block(weight: Tensor, scale: Tensor, inverse: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loop within a block: its columns' aims, the rounded ones, and the errors to pass on."""
    aims, rounded, errors = (torch.empty_like(weight) for _ in range(3))
    for i in range(len(weight)):
        column = torch.addmv(weight[i], errors[:i].T, inverse[:i, i], alpha=-1, out=aims[i])
        rounded[i] = round_symmetric(column, scale[i], bits)
        torch.sub(column, rounded[i], out=errors[i]).div_(inverse[i, i])
    return aims, rounded, errors


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations: several threads would wait for each other, and for whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inverse_cholesky(hessian: Tensor, order: Tensor, name: str) -> Tensor:
    """Upper U with (H + damping)⁻¹ = UᵀU, H's rows and columns in ``order``; the damping grows until it exists.

    Inputs never seen count as unrelated. In the reverse order H = LLᵀ is a product UUᵀ of upper factors: its inverse is
    U's. No more than two matrices are in float64 at a time: at 8192 channels each takes half a gigabyte.
    """
    H = hessian[order.flip(0)][:, order.flip(0)].double()
    diagonal = H.diagonal().clone()
    mean = diagonal.mean().clamp(min=1e-30)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        H.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            del H
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT  # as LAPACK has it: no copy
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return inverse.float().flip(0, 1).contiguous()
        log.warning("%s: damping %g is too small for its Hessian, trying more", name, damping)
    raise FloatingPointError(f"{name}: its Hessian has no Cholesky factor even with damping {damping:g}: are the "
                             "calibration activations finite?")  # fmt: skip


def hessians_of(step: Step, places: Iterable[Place]) -> dict[str, Tensor]:
    """XᵀX of each site's input over all windows, as the layer stands."""
    return _statistics(step, None, places)[0]


def _statistics(step: Step, plain: Step | None, group: Iterable[Place]) -> tuple[dict, dict]:
    """Of each site's input X̂ over all windows, as the layer stands: X̂ᵀX̂ and (X − X̂)ᵀX̂, by site.

    X is what the layer without any rounding makes of exact hidden states, ``plain``; without it there is no second.
    """
    names = {place.name.removeprefix(f"{step.name}."): place.name for place in group}
    hessians: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for part in step.parts():
        exact = plain.inputs(plain.hidden[part], names) if plain else {}
        for name, found in step.inputs(step.hidden[part], names).items():
            _add_product(hessians, name, found, found)
            if plain:
                _add_product(errors, name, exact[name] - found, found)
    return hessians, errors


def _add_product(sums: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
    found = product(a.T, b)
    sums[name] = sums[name].add_(found) if name in sums else found
