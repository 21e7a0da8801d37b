"""Transforms merged into a model's weights, without changing what it computes; what can't be merged runs in it.

Every weight is merged once (`jqlib.transform.merge`). R1 and R2 vanish into the weights; R4, a Hadamard transform of
down_proj's input, runs online, and so may one at any other site (QuIP#'s, QuaRot's).
"""

from collections.abc import Collection

from torch import Tensor, nn

from jqlib.model.families import head_dim_of, norms_of, sites_of
from jqlib.transform.check import (
    check_choice_of_sites,
    check_norm_scale,
    check_rotations,
    check_smooth_scale,
    check_stream,
)
from jqlib.transform.install import install_left
from jqlib.transform.merge import gamma_of, merge, stream_of
from jqlib.transform.selfcheck import check_family
from jqlib.transform.transform import Grid, Hadamard, Rotation, Transform


def fuse_layer_norms(model: nn.Module) -> None:
    """Move each RMSNorm's gamma into the columns of the linears that read it; gamma becomes 1.

    Tied embeddings are untied first: the head takes the final norm's gamma, the embedding must not.
    Unlike QuaRot's and DartQuant's code it leaves the embedding's mean alone (an RMSNorm sees it).

    Raises RuntimeError when the model is fused already, ValueError when its family can't be (`check_family`).
    """
    check_family(model.config)
    begin(model, "fused")
    done(model).add("fused")  # before the weights change, or after Ctrl-C a second call would change them twice
    merge(model, {name: Transform(gamma_of(norm)) for name, norm in norms_of(model).items()}, fuse=True)


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
    check_family(model.config)
    check_stream([transforms[name] for name in norms_of(model)])
    fuse = stream_of(model, transforms) is not None
    done(model).update({"rotated", "fused"} if fuse else {"rotated"})
    merge(model, transforms, fuse, replaced)
    install_left(model, transforms)


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
