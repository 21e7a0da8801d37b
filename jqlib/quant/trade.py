"""What rounding a site's input costs at the output of its linears, and what rounding their weights costs there."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jqlib.model.stream import each_layer
from jqlib.transform.grids import quantize_weight
from jqlib.transform.transform import Transform


def trade(
    model: nn.Module, inputs: Mapping[str, Tensor], settings: Mapping[Hashable, Mapping[str, Transform]], w_bits: int,
    groupsize: int,
) -> list[dict]:  # fmt: skip
    """`two_errors` of every site in ``inputs``, (tokens, features) each, under each of the ``settings``.

    A setting is a `Transform` by site, with the grid of the site's input. Returns a dict per site and setting: "kind",
    "layer", "setting", "activations", "weights".
    """
    found = []
    for places in tqdm(each_layer(model), "both errors", model.config.num_hidden_layers, unit="layer"):
        for place in places:
            if (x := inputs.get(place.name)) is None:
                continue
            for name, transforms in settings.items():
                errors = two_errors(x.to(model.device), place.weight, transforms[place.name], w_bits, groupsize)
                about = {"kind": place.kind, "layer": place.layer, "setting": name}
                found.append(about | dict(zip(("activations", "weights"), errors, strict=True)))
    return found


@torch.no_grad()
def two_errors(x: Tensor, weight: Tensor, transform: Transform, w_bits: int, groupsize: int) -> tuple[float, float]:
    """‖(Q(z) − z)Vᵀ‖² / ‖xWᵀ‖² and ‖z(Q(V) − V)ᵀ‖² / ‖xWᵀ‖² with z = xA and V = WA⁻ᵀ, A the transform.

    x: (tokens, in), weight: (out, in). z is rounded by the transform's grid, V to nearest in groups.
    """
    z, V = transform.apply(x.float()), transform.dual(weight.float())
    whole = (z @ V.T).square().sum()
    by_z = ((transform.grid(z) - z) @ V.T).square().sum()
    by_v = (z @ (quantize_weight(V, w_bits, groupsize) - V).T).square().sum()
    return (by_z / whole).item(), (by_v / whole).item()
