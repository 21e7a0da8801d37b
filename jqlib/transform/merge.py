"""Transforms merged into weights: every weight once, turned on both sides in float32 or more, and cast back once.

Float64 would be no truer here: of the embedded model's logits a merge in float32 moves 2.3 in a million, one in float64
2.1, for the FP model itself is run in float32.
"""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from jqlib.model.families import family_of, layers_of, norms_of, sites_of
from jqlib.model.stream import change
from jqlib.transform.transform import Rotation, Transform

ROWS = 4096  # rows of an embedding merged at a time: copies stay small
Side = Callable[[Tensor], Tensor]


def merge(model: nn.Module, transforms: dict[str, Transform], fuse: bool, replaced: Collection[nn.Module] = ()) -> None:
    """Turn all biases, and weights but those ``replaced``; ``fuse``: norms lose their gammas, the last one too."""
    family, stream = family_of(model), stream_of(model, transforms)
    inputs: dict[nn.Module, Side] = {}  # what becomes of a weight's rows, by its module
    outputs: dict[nn.Module, Side] = {}  # and of its columns
    for name, place in sites_of(model).items():
        if (transform := transforms.get(name)) is None:
            continue
        merged, _ = transform.split()
        if place.norm is not None:
            transform = _into_norm(place.norm, transform, fuse)
        elif merged.turns:
            outputs[place.source] = merged.apply
        if transform.turns:
            inputs |= dict.fromkeys(place.linears.values(), transform.dual)
    if fuse:
        _untie(model)
        embed, norm, head = (model.get_submodule(at) for at in (family.embed, family.final_norm, family.head))
        inputs[head] = Transform(gamma_of(norm), stream).dual
        norm.weight.data = torch.ones_like(norm.weight)
    if stream is not None:
        inputs[embed] = stream
        outputs |= {layer.get_submodule(at): stream for _, layer in layers_of(model) for at in family.writers}
    for module in {**inputs, **outputs}:
        if module not in replaced:
            change(model, module, partial(_turn, inputs=inputs.get(module), outputs=outputs.get(module)))
        if module in outputs and getattr(module, "bias", None) is not None:
            module.bias.data = outputs[module](module.bias.data.double()).to(module.bias.dtype)


def _into_norm(norm: nn.Module, transform: Transform, fuse: bool) -> Transform:
    """Put scale and gain into a norm's weight; the transform that its readers need, by what the norm then holds."""
    gamma = norm.weight.data.double()
    if not fuse:
        if transform.scale is None:
            return transform
        norm.weight.data = (gamma / transform.scale.double()).to(norm.weight.dtype)
        held = norm.weight.data.double()
        scale = torch.where(held == 0, transform.scale.double(), gamma / held)
        return Transform(scale, transform.rotation, transform.gain, online=transform.online)
    gain = None if transform.gain is None else transform.gain.to(norm.weight.dtype)
    norm.weight.data = torch.ones_like(norm.weight) if gain is None else gain.clone()
    return Transform(gamma, transform.rotation, gain)


def _turn(module: nn.Module, inputs: Side | None, outputs: Side | None) -> None:
    """A weight (out, in) turned on both sides, in float32 at least, and cast once."""
    weight, wide = module.weight.data, torch.promote_types(module.weight.dtype, torch.float32)
    if outputs is None:
        for rows in weight.split(ROWS):
            rows.copy_(inputs(rows.to(wide)))
        return
    weight = weight.to(wide) if inputs is None else inputs(weight.to(wide))
    module.weight.data = outputs(weight.T).T.to(module.weight.dtype).contiguous()


def _untie(model: nn.Module) -> None:
    family = family_of(model)
    embed, head = model.get_submodule(family.embed), model.get_submodule(family.head)
    if head.weight.data_ptr() == embed.weight.data_ptr():
        head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False  # or a saved checkpoint reloads with the head overwritten


def stream_of(model: nn.Module, transforms: dict[str, Transform]) -> Rotation | None:
    """R1: the rotation that is merged into what writes the residual stream."""
    behind = [transforms[name] for name in norms_of(model) if name in transforms]
    return next((t.rotation for t in behind if not t.online and t.rotation is not None), None)


def gamma_of(norm: nn.Module) -> Tensor:
    return norm.weight.detach().clone()
