"""After the weights are rounded: the scales of their groups, the norms' gains and the clips, tuned end to end.

The integer codes stay what GPTQ left. What moves is stored beside them in floating point anyway, so nothing is added to
the model: EfficientQAT's second phase (Chen et al. 2024, §3.3), here with the activations' rounding in the loop, norms
and clips besides, and KL to the FP model's predictions for a loss.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jqlib.distill import Keep, distill, divergence, low_precision, predictions
from jqlib.models import done, family_of, sites_of

RATES = {"scale": 3e-3, "gain": 4e-3, "clip": 3e-3}  # Adam's, of factors near 1


def tune(
    model: nn.Module,
    teacher: nn.Module,
    windows: Tensor,
    clips: dict[str, Tensor],
    *,
    groupsize: int = 128,
    steps: int = 100,
    seed: int = 0,
    keep: Keep | None = None,
    resume: dict[str, Tensor] | None = None,
) -> None:
    """Tune a ``model`` of rounded weights in place, towards the predictions of ``teacher``, which may be rotated.

    ``clips``: the 0-dim float32 tensors that `quantize_model` was given as ``a_clip`` (none: activations are not
    rounded); they change in place. ``groupsize``: that of the weights. The rest as `distill` takes them.

    Raises RuntimeError when the model is not quantised, FloatingPointError where the loss is not finite.
    """
    if "quantised" not in done(model):
        raise RuntimeError("tune needs a model whose weights are rounded: call quantize_model(model) before it")
    knobs, factors = {}, {}
    for name, width in _tuned(model, groupsize).items():
        factors[name] = Factor(model.get_submodule(name).weight, width)
        knobs[f"{'gain' if width == 1 else 'scale'} {name}"] = factors[name].factor
    knobs |= {f"clip {name}": clip.requires_grad_() for name, clip in clips.items()}
    for name, factor in factors.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", factor)
    try:
        loss_of = partial(_loss, model, teacher)
        distill(knobs, loss_of, windows, RATES, label="tuning", steps=steps, seed=seed, keep=keep, resume=resume)
    finally:
        for name in factors:
            parametrize.remove_parametrizations(model.get_submodule(name), "weight")
        model.requires_grad_(False)
        for clip in clips.values():
            clip.requires_grad_(False)


class Factor(nn.Module):
    """A weight times a factor for every ``width`` values along its last dimension, the last of them maybe fewer."""

    def __init__(self, weight: Tensor, width: int):
        super().__init__()
        self.width = min(width, weight.shape[-1])
        shape = (*weight.shape[:-1], -(-weight.shape[-1] // self.width))
        self.factor = nn.Parameter(torch.ones(shape, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        spread = self.factor.repeat_interleave(self.width, -1)[..., : weight.shape[-1]]
        return (weight * spread).to(weight.dtype)


def _tuned(model: nn.Module, groupsize: int) -> dict[str, int]:
    """The modules whose weights get factors, and for how many values each: a group of a linear, a channel of a norm."""
    names = {family_of(model).final_norm: 1}
    for layer, site in sites_of(model).values():
        names |= {f"{layer}.{reader}": groupsize for reader in site.readers}
        names |= {f"{layer}.{site.norm}": 1} if site.norm else {}
    return names


def _loss(model: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    ids = ids.to(model.device)
    with low_precision(model.device):
        return divergence(model, ids, predictions(teacher, ids))
