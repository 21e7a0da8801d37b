"""What rounding a site's input costs at the output of its linears, and what rounding their weights costs there, and
themselves."""

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
    """`site_errors` of every site in ``inputs``, (tokens, features) each, under each of the ``settings``.

    A setting is a `Transform` by site, with the grid of the site's input. Returns a dict per site and setting: "kind",
    "layer", "setting" and the errors.
    """
    found = []
    for places in tqdm(each_layer(model), "both errors", model.config.num_hidden_layers, unit="layer"):
        for place in places:
            if (x := inputs.get(place.name)) is None:
                continue
            for name, transforms in settings.items():
                about = {"kind": place.kind, "layer": place.layer, "setting": name}
                x = x.to(model.device)
                found.append(about | site_errors(x, place.weight, transforms[place.name], w_bits, groupsize))
    return found


@torch.no_grad()
def site_errors(x: Tensor, weight: Tensor, transform: Transform, w_bits: int, groupsize: int) -> dict[str, float]:
    """Of z = xA and V = WA⁻ᵀ, A the transform: at the output "activations", ‖(Q(z) − z)Vᵀ‖² / ‖xWᵀ‖², and "weights",
    ‖z(Q(V) − V)ᵀ‖² / ‖xWᵀ‖²; "weights themselves", ‖Q(V) − V‖² / ‖V‖².

    x: (tokens, in), weight: (out, in). z is rounded by the transform's grid, V to nearest in groups.
    """
    z, V = transform.apply(x.float()), transform.dual(weight.float())
    by_z, by_v = transform.grid(z) - z, quantize_weight(V, w_bits, groupsize) - V
    whole = (z @ V.T).square().sum()
    errors = {
        "activations": (by_z @ V.T).square().sum() / whole,
        "weights": (z @ by_v.T).square().sum() / whole,
        "weights themselves": by_v.square().sum() / V.square().sum(),
    }
    return {name: error.item() for name, error in errors.items()}
