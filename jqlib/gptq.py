"""GPTQ (Frantar et al. 2022): round a weight's columns one by one, and let the later ones make up for the error.

A linear's output error on calibration inputs X is tr(ΔW H ΔWᵀ) with H = XᵀX. Columns are taken in the order
of falling H_jj; groups keep their place and their scale is chosen beforehand (static groups). Layer by layer: each
layer's inputs come from the layers before it, quantised already. One layer's Hessians are in memory at a time, beside
the hidden states of all calibration windows. Weights may answer for the rounding of inputs too (`corrected`).
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jqlib.models import family_of, layers_of
from jqlib.quant import column_scales, quantize_weight, round_symmetric

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
    before: Callable[[str], object] | None = None,
    correct: bool = False,
) -> None:
    """Round the weights of all decoder layers in place, on the inputs they see as the model stands.

    ``calib_data``: token windows, (windows, seqlen). A rotated model is calibrated rotated, R4 included.
    ``before``: called with a layer's name when its turn comes, such as to have its inputs rounded from then on.
    ``correct``: weights aim at the outputs of the model without any rounding (`corrected`), site after site: a site's
    inputs come through all sites before it, those of its own layer too, as they ended.
    """
    sites = family_of(model).sites
    hidden, kwargs = _first_inputs(model, calib_data)
    exact = list(hidden) if correct else hidden  # the same in the model without rounding, where it is wanted
    for name, layer in tqdm(list(layers_of(model)), "GPTQ", unit="layer"):
        plain = deepcopy(layer) if correct else None
        if before:
            before(name)
        for group in [[site] for site in sites] if correct else [sites]:
            hessians, errors = _statistics(layer, plain, group, hidden, exact, kwargs)
            for site in group:
                linears = [layer.get_submodule(reader) for reader in site.readers]
                weight = torch.cat([linear.weight.data for linear in linears])  # they share their input
                if correct:
                    weight = corrected(weight, hessians[site.name], errors[site.name], calib_data.numel())
                rounded = gptq(weight, hessians[site.name], bits, groupsize, name=f"{name}.{site.readers[0]}")
                for linear, rows in zip(linears, rounded.split([ln.out_features for ln in linears]), strict=True):
                    linear.weight.data = rows.to(linear.weight.dtype)
        _move_on(layer, hidden, kwargs)
        if plain is not None:
            _move_on(plain, exact, kwargs)


def gptq(weight: Tensor, hessian: Tensor, bits: int = 4, groupsize: int = 128, *, name: str = "a weight") -> Tensor:
    """The dequantised (out, in) weight; ``hessian``: (in, in), XᵀX of its inputs. ``name`` is for messages.

    Scales are those of least squared error weighted by H's diagonal. A row that ends with a larger
    tr(ΔW H ΔWᵀ) than rounding to nearest would have is rounded to nearest.
    """
    weight, hessian = weight.float(), hessian.float()
    scale = column_scales(weight, bits, groupsize, hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True)
    inverse = _inverse_cholesky(hessian[order][:, order], name)
    rounded = torch.empty_like(weight)
    rounded[:, order] = _columns(weight[:, order].T.contiguous(), scale[:, order].T.contiguous(), inverse, bits).T
    nearest = quantize_weight(weight, bits, groupsize)
    # a difference of two squares needs one product with H
    worse = (((rounded - nearest) @ hessian) * (rounded + nearest - 2 * weight)).sum(1) > 0
    return torch.where(worse[:, None], nearest, rounded)


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
    """The loop over columns, here rows of (in, out); ``inverse``: upper U with H⁻¹ = UᵀU."""
    rounded = torch.empty_like(weight)
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        errors = torch.empty_like(weight[start:end])
        for i in range(start, end):
            rounded[i] = round_symmetric(weight[i], scale[i], bits)
            errors[i - start] = (weight[i] - rounded[i]) / inverse[i, i]
            weight[i + 1 : end].addr_(inverse[i, i + 1 : end], errors[i - start], alpha=-1)
        weight[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return rounded


def _inverse_cholesky(hessian: Tensor, name: str) -> Tensor:
    """Upper U with (H + damping)⁻¹ = UᵀU; the damping grows until it exists. Inputs never seen count as unrelated.

    With the order of rows and columns reversed, H = LLᵀ is a product UUᵀ of upper factors: its inverse is U's.
    """
    H = hessian.flip(0, 1).double()
    mean = H.diagonal().mean().clamp(min=1e-30)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = H.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float().contiguous()
        log.warning("%s: damping %g is too small for its Hessian, trying more", name, damping)
    raise FloatingPointError(f"{name}: its Hessian has no Cholesky factor even with damping {damping:g}: are the "
                             "calibration activations finite?")  # fmt: skip


class _Stop(Exception):
    """All that was wanted has been seen."""


def _first_inputs(model: nn.Module, windows: Tensor) -> tuple[list[Tensor], dict]:
    """What the model feeds its first layer, a tensor a window, and the keyword arguments all layers get."""
    hidden: list[Tensor] = []
    common: dict = {}

    def stop(module, args, kwargs):
        hidden.append(args[0])
        common.update(kwargs)
        raise _Stop

    handle = next(layers_of(model))[1].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for window in windows:
            try:
                with torch.inference_mode():
                    model.base_model(window[None].to(model.device), use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return hidden, common


def _statistics(layer: nn.Module, plain: nn.Module | None, sites, hidden, exact, kwargs: dict):
    """Of each site's input X̂ over all windows, behind the hooks that are there already: X̂ᵀX̂ and (X − X̂)ᵀX̂.

    X is what ``plain``, the layer without rounding, makes of ``exact``; where it is None, there is no second.
    """
    hessians: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for x, unrounded in zip(hidden, exact, strict=True):
        wanted = _inputs(plain, sites, unrounded, kwargs) if plain is not None else {}
        for name, found in _inputs(layer, sites, x, kwargs).items():
            _add_product(hessians, name, found, found)
            if plain is not None:
                _add_product(errors, name, wanted[name] - found, found)
    return hessians, errors


def _add_product(sums: dict[str, Tensor], name: str, a: Tensor, b: Tensor) -> None:
    sums[name] = sums[name].addmm_(a.T, b) if name in sums else a.T @ b


@torch.inference_mode()
def _inputs(layer: nn.Module, sites, x: Tensor, kwargs: dict) -> dict[str, Tensor]:
    """What sites read in a layer that is given x: (tokens, features) each, float32."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        found[name] = x.flatten(0, -2).float()
        if len(found) == len(sites):
            raise _Stop

    handles = [
        layer.get_submodule(site.readers[0]).register_forward_pre_hook(
            lambda _, args, name=site.name: keep(name, args[0])
        )
        for site in sites
    ]
    try:
        with suppress(_Stop):
            layer(x, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.inference_mode()
def _move_on(layer: nn.Module, hidden: list[Tensor], kwargs: dict) -> None:
    """Each window's hidden states through a layer, window by window."""
    for i, x in enumerate(hidden):
        output = layer(x, **kwargs)
        hidden[i] = output if isinstance(output, Tensor) else output[0]
