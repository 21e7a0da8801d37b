"""What rounding one part of a model costs: KL from the model as it is (nats per token), measured on a few windows."""

from collections.abc import Mapping
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from jqlib.learn.fisher import cost, inputs_and_gradients
from jqlib.learn.refine import simulated
from jqlib.model.evaluate import Reference, last_hidden, read_window
from jqlib.model.families import attentions_of, sites_of
from jqlib.model.walk import removing
from jqlib.quant.kv_cache import quantize_kv_cache
from jqlib.transform.grids import OFF, rounding_error
from jqlib.transform.transform import Transform


def reference_of(model: nn.Module, windows: Tensor) -> Reference:
    """What a model predicts on token windows (windows, seqlen): the model as it is, to compare with."""
    return Reference(last_hidden(model, windows), model.get_output_embeddings().weight)


def divergence(model: nn.Module, windows: Tensor, reference: Reference) -> float:
    """Mean KL of a model's predictions from the reference's, nats per token."""
    windows = windows.to(model.device)
    pairs = [Reference(hidden, reference.head) for hidden in reference.hidden]
    found = [read_window(model, window, of)[1] for window, of in zip(windows, pairs, strict=True)]
    return sum(found) / len(found)


def measured(model: nn.Module, transforms: Mapping[str, Transform], windows: Tensor, reference: Reference) -> float:
    """KL (nats per token) when what these sites read is rounded behind their transforms, and nothing else.

    ``model``: as it was loaded, and so it is again afterwards.
    """
    with simulated(model, {name: transform.to(model.device) for name, transform in transforms.items()}):
        return divergence(model, windows, reference)


def predicted(
    model: nn.Module, rotations: Mapping[str, Mapping[str, Transform]], windows: Tensor, seed: int = 0
) -> pd.DataFrame:
    """What rounding the inputs of sites behind norms costs, by `jqlib.learn.fisher.cost`: a row per rotation and site.

    ``rotations``: the sites' transforms by a rotation's name; one pass forward and one back serve them all. Columns
    ``rotation``, ``site``, ``kind``, ``predicted`` (nats per token of all), ``first`` (the part of it that the first
    token of each window has), ``error`` and ``first_error`` (the mean relative rounding error of all, and of those).
    """
    windows, places, rows = windows.to(model.device), sites_of(model), []
    draws = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    seen = inputs_and_gradients(model, windows, draws)
    for label, transforms in rotations.items():
        for name, transform in transforms.items():
            x, h = seen[name]
            of = partial(cost, transform.to(model.device), w_bits=OFF, groupsize=x.shape[1])
            first = slice(None, None, windows.shape[1])
            rows.append({
                "rotation": label, "site": name, "kind": places[name].kind, "predicted": of(x, h).item(),
                "first": of(x[first], h[first]).item() / windows.shape[1],
                "error": rounding_error(transform.apply(x), transform.grid.bits),
                "first_error": rounding_error(transform.apply(x[first]), transform.grid.bits),
            })  # fmt: skip
    return pd.DataFrame(rows)


def keys_and_values(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What a cache would hold of token windows (windows, seqlen): keys behind RoPE and values.

    (layers, kv heads, tokens, head_dim) each. ``model`` reads through an unrounded cache from now on.
    """
    quantize_kv_cache(model, OFF)
    found: list[tuple[Tensor, Tensor]] = []

    def keep(grid, args, output) -> None:
        found.append(tuple(x.transpose(0, 1).flatten(1, 2).float().cpu() for x in args))

    grids = [attention.kv_grid for attention in attentions_of(model)]
    with removing([grid.register_forward_hook(keep) for grid in grids]):
        for window in windows:
            last_hidden(model, window[None])
    by_layer = [found[i :: len(grids)] for i in range(len(grids))]
    keys, values = (torch.stack([torch.cat([kv[i] for kv in layer], 1) for layer in by_layer]) for i in (0, 1))
    return keys, values


def round_cache(model: nn.Module, bits: int, r3: bool) -> None:
    """`quantize_kv_cache`, in place; without ``r3`` keys are rounded as they are."""
    quantize_kv_cache(model, bits)
    for attention in () if r3 else attentions_of(model):
        attention.kv_grid.keys.rotation = None
