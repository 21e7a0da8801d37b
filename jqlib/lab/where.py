"""Where a rounded model's loss arises: over its depth, and at one site of one layer."""

from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from jqlib.lab.told import losses
from jqlib.learn.lessons import Divergence
from jqlib.model.families import family_of, sites_of
from jqlib.model.stream import present
from jqlib.model.walk import walk
from jqlib.product import fast_float32
from jqlib.transform.grids import OFF
from jqlib.transform.install import standing_grids


class Passage(NamedTuple):
    """Two models on the same windows. Behind every layer, (layers, windows, seqlen): ``off``, ‖h − h_exact‖/‖h_exact‖,
    and ``length``, ‖h_exact‖. ``nll``, ``exact``: nats for each token but a window's first, (windows, seqlen − 1), of
    the one and of the other.
    """

    off: Tensor
    length: Tensor
    nll: Tensor
    exact: Tensor


@torch.inference_mode()
def passage(model: nn.Module, exact: nn.Module, windows: Tensor, label: str | None = None) -> Passage:
    """``model``, rounded, beside ``exact``, the same with nothing rounded: smoothed and rotated likewise, so that
    their hidden states can be compared. ``label``: of the progress; None shows none.
    """
    off, length = [], []
    for step, plain in zip(walk(model, windows, label), walk(exact, windows), strict=True):
        step.forward()
        plain.forward()
        length.append(plain.hidden.norm(dim=-1))
        off.append((step.hidden - plain.hidden).norm(dim=-1) / length[-1])
    read = []
    for it, last in ((model, step), (exact, plain)):
        hidden = it.get_submodule(family_of(it).final_norm)(last.hidden)
        read.append(losses(it.get_output_embeddings(), hidden, windows))
    return Passage(torch.stack(off).cpu(), torch.stack(length).cpu(), *read)


@torch.inference_mode()
def one_at_a_time(model: nn.Module, windows: Tensor) -> pd.DataFrame:
    """The KL (nats per token) from itself with nothing rounded, when one site of one layer rounds what it reads: layer
    down, kind of site across. ``model``: its activations are rounded, its weights not; afterwards nothing is.
    """
    places = sites_of(model)
    grids = standing_grids(places.values())
    bits = {name: grid.bits for name, grid in grids.items()}
    for grid in grids.values():
        grid.bits = OFF
    steps = [(step, step.hidden.clone()) for step in walk(model, windows)]  # each with what its layer is given
    norm, head, rows = model.get_submodule(family_of(model).final_norm), model.get_output_embeddings().weight, []
    exact = norm(steps[-1][0].hidden).flatten(0, 1)
    for name, grid in tqdm(grids.items(), "one site at a time", unit="site"):
        grid.bits, onwards = bits[name], steps[places[name].layer :]
        hidden = onwards[0][1].clone()
        for step, _ in onwards:
            with present(model, step.layer):
                replace(step, hidden=hidden).forward()
        grid.bits = OFF
        with fast_float32(hidden.device):
            kl = Divergence.apply(norm(hidden).flatten(0, 1), head, exact, head).item()
        rows.append({"layer": places[name].layer, "site": places[name].kind, "kl": kl})
    table = pd.DataFrame(rows)
    return table.pivot(index="layer", columns="site", values="kl")[table.site.unique()]
