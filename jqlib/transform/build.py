"""Transforms merged into a model's weights, without changing what it computes; what can't be merged runs in it.

Every weight is merged once: read in float64, turned on the side of its inputs and on that of its outputs, and cast
back once. R1 and R2 vanish into the weights; R4, a Hadamard transform of down_proj's input, runs online, and so may one
at any other site (QuIP#'s, QuaRot's).
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from jqlib.model.families import Place, family_of, head_dim_of, layers_of, linears_of, norms_of, sites_of
from jqlib.transform.check import (
    check_choice_of_sites,
    check_norm_scale,
    check_rotations,
    check_smooth_scale,
    check_stream,
)
from jqlib.transform.transform import Grid, Hadamard, Rotation, Transform

ROWS = 16_384  # rows of an embedding merged at a time: float64 copies stay small
Side = Callable[[Tensor], Tensor]


def fuse_layer_norms(model: nn.Module) -> None:
    """Move each RMSNorm's gamma into the columns of the linears that read it; gamma becomes 1.

    Tied embeddings are untied first: the head takes the final norm's gamma, the embedding must not.
    Unlike QuaRot's and DartQuant's code it leaves the embedding's mean alone (an RMSNorm sees it).

    Raises RuntimeError when the model is fused already.
    """
    begin(model, "fused")
    _merge(model, {name: Transform(gamma_of(norm)) for name, norm in norms_of(model).items()}, fuse=True)
    done(model).add("fused")


def rotate_model(
    model: nn.Module,
    R1: Tensor | None,
    R2: dict[str, Tensor] | None = None,
    smooth_scale: dict[str, Tensor] | None = None,
    *,
    norm_scale: dict[str, Tensor] | None = None,
    r4: bool = True,
    online: tuple[str, ...] = (),
) -> None:
    """Smooth, then rotate a fused model: v/o by R2, the residual stream by R1, down_proj's input by R4.

    ``R1``: (hidden, hidden) of `train_r1_joint`; ``R2`` and ``smooth_scale`` as `train_r2_independent` and
    `compute_simple_smooth_scale` give them. None leaves that step out. ``norm_scale``: gains of the norms behind R1, a
    positive number per channel of the rotated stream, by site: its readers' columns are divided by them. ``r4``:
    down_proj's input goes through a fast Hadamard transform when the model runs; so do those of the sites in
    ``online``. Behind a norm it acts on what gamma has scaled: without R1 norms need not be fused.

    Raises RuntimeError when R1 is given and norms are not fused, or the model is rotated already; ValueError when a
    matrix has the wrong shape or is not orthogonal, or a site would have two rotations.
    """
    if R1 is not None and "fused" not in done(model):
        raise RuntimeError("R1 needs a model whose norms are fused: call fuse_layer_norms(model) before it")
    begin(model, "rotated")
    online = tuple({*online, "down"}) if r4 else online
    build(model, transforms_of(model, R1, R2, smooth_scale, norm_scale, online))


def transforms_of(
    model: nn.Module,
    R1: Tensor | None = None,
    R2: dict[str, Tensor] | None = None,
    smooth_scale: dict[str, Tensor] | None = None,
    norm_scale: dict[str, Tensor] | None = None,
    online: tuple[str, ...] = (),
    grids: dict[str, Grid] | None = None,
) -> dict[str, Transform]:
    """The transform of every site, from the parts that `rotate_model` takes; ``grids`` by site.

    Behind R1 the scale of a norm's site is its gamma: R1 acts on the stream without it.
    """
    sites, d = sites_of(model), head_dim_of(model)
    R2, smooth_scale, norm_scale, grids = R2 or {}, smooth_scale or {}, norm_scale or {}, grids or {}
    check_rotations(model, R1, R2)
    check_norm_scale(model, R1, norm_scale)
    check_smooth_scale(model, smooth_scale, fused=R1 is not None or "fused" in done(model))
    check_choice_of_sites(model, R1, R2, online)
    stream, transforms = None if R1 is None else Rotation(R1), {}
    for name, place in sites.items():
        behind_r1 = place.norm is not None and R1 is not None
        rotation = stream if behind_r1 else Rotation(R2[name]) if name in R2 else None
        rotation = Hadamard(place.width) if place.kind in online else rotation
        scale = gamma_of(place.norm) if behind_r1 else smooth_scale.get(name)
        grouped = place.source is not None and place.source.out_features < place.width
        heads = len(R2[name]) if name in R2 else place.source.out_features // d if grouped else 1
        gain, grid, runs = norm_scale.get(name), grids.get(name), place.kind in online
        transforms[name] = Transform(scale, rotation, gain, grid, online=runs, heads=heads).to(model.device)
    return transforms


def build(model: nn.Module, transforms: dict[str, Transform], replaced: Collection[nn.Module] = ()) -> None:
    """Merge the transforms into the weights, once, and leave in the model what has to run: online parts and grids.

    It fuses the norms if a rotation of the stream needs that. ``replaced``: linears whose weights are left as they are,
    for others are to take their place. Raises ValueError if not all sites behind norms share the stream's rotation.
    """
    check_stream([transforms[name] for name in norms_of(model)])
    fuse = stream_of(model, transforms) is not None
    _merge(model, transforms, fuse, replaced)
    for name, place in sites_of(model).items():
        if (left := transforms[name].split()[1]).runs:
            install(model, place, left)
    done(model).update({"rotated", "fused"} if fuse else {"rotated"})


def stream_of(model: nn.Module, transforms: dict[str, Transform]) -> Rotation | None:
    """R1: the rotation that is merged into what writes the residual stream."""
    behind = [transforms[name] for name in norms_of(model) if name in transforms]
    return next((t.rotation for t in behind if not t.online and t.rotation is not None), None)


def gamma_of(norm: nn.Module) -> Tensor:
    return norm.weight.detach().clone()


def install(model: nn.Module, place: Place, transform: nn.Module):
    """From now on the site's input goes through ``transform``, which stands in the model; returns the hook's handle."""
    place.host.transform = transform
    model.save_pretrained = refuse_to_save
    if place.norm is not None:
        return place.norm.register_forward_hook(_behind)
    return place.host.register_forward_pre_hook(_before)


def _behind(norm: nn.Module, args, output: Tensor) -> Tensor:
    return norm.transform(output)


def _before(linear: nn.Module, args) -> tuple:
    return (linear.transform(args[0]), *args[1:])


def refuse_to_save(*args, **kwargs):
    """What `save_pretrained` is in a model of which a Hugging Face checkpoint would lose a part."""
    raise RuntimeError(
        "this model has Hadamard transforms online or rounds its activations, which a Hugging Face checkpoint does not "
        "hold: loaded again it would compute something else. Keep it by jqlib.save_model(model, path), which "
        "jqlib.load_model(path) reads, or build it with r4=False, no online sites and a_bits=16"
    )


def standing(model: nn.Module) -> dict[str, Transform]:
    """The transforms that stand in the model, by site."""
    return {name: place.host.transform for name, place in sites_of(model).items() if hasattr(place.host, "transform")}


def online_operations(model: nn.Module) -> float:
    """Multiply-adds of the transforms that run in the model, as a share of those of all decoder layers' linears."""
    running = [t.rotation.operations for t in standing(model).values() if t.online and t.rotation is not None]
    return sum(running) / sum(linear.weight.numel() for linear in linears_of(model).values())


def done(model: nn.Module) -> set[str]:
    """What was done to the model so far: a subset of {"fused", "rotated", "quantised"}."""
    if not hasattr(model, "jointquant"):
        model.jointquant = set()
    return model.jointquant


def begin(model: nn.Module, step: str) -> None:
    """Raise RuntimeError if a step of `done` comes twice, or too late."""
    order = ("fused", "rotated", "quantised")
    if step in done(model):
        raise RuntimeError(f"this model is {step} already: load it again to have it {step} another way")
    for later in order[order.index(step) + 1 :]:
        if later in done(model):
            raise RuntimeError(f"this model is {later} already: it must be {step} before")


def _merge(
    model: nn.Module, transforms: dict[str, Transform], fuse: bool, replaced: Collection[nn.Module] = ()
) -> None:
    """Turn all biases, and all weights but those to be ``replaced``; ``fuse``: norms lose their gammas, all of them."""
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
            _turn(module, inputs.get(module), outputs.get(module))
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
    """A weight (out, in) turned on both sides in float64 and cast once."""
    if outputs is None:
        for rows in module.weight.data.split(ROWS):
            rows.copy_(inputs(rows.double()))
        return
    weight = module.weight.data.double()
    weight = weight if inputs is None else inputs(weight)
    module.weight.data = outputs(weight.T).T.to(module.weight.dtype).contiguous()


def _untie(model: nn.Module) -> None:
    family = family_of(model)
    embed, head = model.get_submodule(family.embed), model.get_submodule(family.head)
    if head.weight.data_ptr() == embed.weight.data_ptr():
        head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False  # or a saved checkpoint reloads with the head overwritten
