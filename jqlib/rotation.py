"""Fusing norms and rotating a model, without changing what it computes.

Every merge is done in float64 and cast back after it: a weight that takes three merges is cast three times. R1 and R2
vanish into the weights; R4, a Hadamard transform of down_proj's input, runs online, and so may one at any other site
(QuIP#'s, QuaRot's).
"""

import torch
from torch import Tensor, nn

from jqlib.hadamard import factors, hadamard_transform, transform_operations
from jqlib.joint import orthogonality_error
from jqlib.models import (
    begin,
    done,
    family_of,
    head_dim_of,
    layers_of,
    linears_of,
    norms_of,
    on_input,
    site_targets,
    sites_of,
)
from jqlib.smooth import apply_smoothing, check_positive

ROWS = 16_384  # rows of an embedding merged at a time: float64 copies stay small


def fuse_layer_norms(model: nn.Module) -> None:
    """Move each RMSNorm's gamma into the columns of the linears that read it; gamma becomes 1.

    Tied embeddings are untied first: the head takes the final norm's gamma, the embedding must not.
    Unlike QuaRot's and DartQuant's code it leaves the embedding's mean alone (an RMSNorm sees it).

    Raises RuntimeError when the model is fused already.
    """
    begin(model, "fused")
    family = family_of(model)
    _untie(model)
    sites = sites_of(model).values()
    readers_of = {f"{layer}.{site.norm}": [f"{layer}.{r}" for r in site.readers] for layer, site in sites if site.norm}
    readers_of[family.final_norm] = [family.head]
    for norm_name, readers in readers_of.items():
        norm = model.get_submodule(norm_name)
        gamma = norm.weight.data.double()
        for reader in readers:
            _merge(model.get_submodule(reader).weight, gamma.mul)
        norm.weight.data = torch.ones_like(norm.weight)
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
    positive number a channel of the rotated stream, by the first reader of each norm: its readers' columns are
    divided by them. ``r4``: down_proj's input goes through a fast Hadamard transform when the model runs; so do those
    of the sites in ``online``. Behind a norm it acts on what gamma has scaled: without R1 norms need not be fused.

    Raises RuntimeError when norms are not fused or the model is rotated already, ValueError when a matrix has
    the wrong shape or is not orthogonal.
    """
    if R1 is not None and "fused" not in done(model):
        raise RuntimeError("R1 needs a model whose norms are fused: call fuse_layer_norms(model) before it")
    begin(model, "rotated")
    _check_rotations(model, R1, R2)
    _check_norm_scale(model, R1, norm_scale or {})
    transformed = {*online, "down"} if r4 else set(online)
    sites = sites_of(model)
    sites_online = sites_of(model, *transformed) if transformed else {}
    for name in sites_online:
        factors(model.get_submodule(name).in_features)  # raises where there is no such matrix
    if smooth_scale:
        apply_smoothing(model, smooth_scale)
    for name, heads in (R2 or {}).items():
        _rotate_heads(model, name, heads)
    if R1 is not None:
        _rotate_stream(model, R1)
    for name, scale in (norm_scale or {}).items():
        _scale_norm(model, *sites[name], scale)
    for layer, site in sites_online.values():
        _rotate_online(model, layer, site)
    done(model).add("rotated")


def online_operations(model: nn.Module, online: tuple[str, ...]) -> float:
    """Multiply-adds of the online transforms at these sites, as a share of those of all the decoder layers' linears."""
    names = [name for name, (_, site) in sites_of(model).items() if site.name in online]
    widths = [model.get_submodule(name).in_features for name in names]
    return sum(map(transform_operations, widths)) / sum(linear.weight.numel() for linear in linears_of(model))


def _untie(model: nn.Module) -> None:
    family = family_of(model)
    embed, head = model.get_submodule(family.embed), model.get_submodule(family.head)
    if head.weight.data_ptr() == embed.weight.data_ptr():
        head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False  # or a saved checkpoint reloads with the head overwritten


def _merge(weight: nn.Parameter, transform) -> None:
    """Replace a weight by ``transform`` of its float64 rows, a block of rows at a time."""
    for rows in weight.data.split(ROWS):
        rows.copy_(transform(rows.double()))


def _rotate_stream(model: nn.Module, R1: Tensor) -> None:
    family, R = family_of(model), R1.double().to(model.device)
    sites = sites_of(model).values()
    readers = [f"{layer}.{reader}" for layer, site in sites if site.norm for reader in site.readers]
    for name in [family.embed, family.head, *readers]:
        _merge(model.get_submodule(name).weight, lambda rows: rows @ R)
    for layer, _ in layers_of(model):
        for writer in family.writers:
            linear = model.get_submodule(f"{layer}.{writer}")
            linear.weight.data = (R.T @ linear.weight.double()).to(linear.weight.dtype)
            if linear.bias is not None:
                linear.bias.data = (linear.bias.double() @ R).to(linear.bias.dtype)


def _rotate_heads(model: nn.Module, name: str, heads: Tensor) -> None:
    """R2 of one layer, (kv, d, d): v_proj's output rows per kv head, o_proj's columns per query head."""
    layer, site = sites_of(model, "o")[name]
    v, o = model.get_submodule(f"{layer}.{site.source}"), model.get_submodule(name)
    R, d = heads.double().to(v.weight.device), heads.shape[-1]
    blocks = v.weight.double().view(len(R), d, -1)  # (kv, d, in)
    v.weight.data = (R.mT @ blocks).flatten(0, 1).to(v.weight.dtype)
    if v.bias is not None:
        v.bias.data = (v.bias.double().view(len(R), 1, d) @ R).flatten().to(v.bias.dtype)
    columns = o.weight.double().view(o.out_features, len(R), -1, d)  # (out, kv, group, d)
    o.weight.data = torch.einsum("okgd,kde->okge", columns, R).flatten(1).to(o.weight.dtype)


def _scale_norm(model: nn.Module, layer: str, site, scale: Tensor) -> None:
    """OSTQuant's free scale: gains on the norm, their inverses on the columns of its readers."""
    norm = model.get_submodule(f"{layer}.{site.norm}")
    scale = scale.double().to(norm.weight.device)
    norm.weight.data = (norm.weight.double() * scale).to(norm.weight.dtype)
    for reader in site.readers:
        _merge(model.get_submodule(f"{layer}.{reader}").weight, lambda rows: rows / scale)


def _rotate_online(model: nn.Module, layer: str, site) -> None:
    for reader in site.readers:
        _merge(model.get_submodule(f"{layer}.{reader}").weight, hadamard_transform)
    on_input(model, layer, site, hadamard_transform)


def _check_norm_scale(model: nn.Module, R1: Tensor | None, norm_scale: dict[str, Tensor]) -> None:
    if norm_scale and R1 is None:
        raise ValueError("norm_scale acts behind R1: give R1 too")
    names = list(norms_of(model))
    for name, scale in norm_scale.items():
        if name not in names:
            raise ValueError(f"norm_scale names {name!r}; expected names such as {names[0]!r}")
        check_positive(f"norm_scale of {name}", scale, model.config.hidden_size)


def _check_rotations(model: nn.Module, R1: Tensor | None, R2: dict[str, Tensor] | None) -> None:
    config, d = model.config, head_dim_of(model)
    expected = {"R1": (R1, (config.hidden_size, config.hidden_size))} if R1 is not None else {}
    names = site_targets(model, "o")
    for name, heads in (R2 or {}).items():
        if name not in names:
            raise ValueError(f"R2 names {name!r}; expected names such as {names[0]!r}")
        expected[f"R2 of {name}"] = (heads, (config.num_key_value_heads, d, d))
    for what, (matrix, shape) in expected.items():
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{what} has shape {tuple(matrix.shape)}, expected {shape}")
        if not (error := orthogonality_error(matrix.double())) < 1e-4:
            raise ValueError(f"{what} is not orthogonal: the largest entry of |RᵀR − I| is {error:.2g}")
