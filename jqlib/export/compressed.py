"""compressed-tensors: packed weights that transformers and vLLM load.

A ragged last group (576 = 4 · 128 + 64) is not allowed there: such a linear has groups of the common divisor, each
scale as often as its group has them, which is the same weight.
"""

from math import gcd
from pathlib import Path

import torch
from torch import Tensor, nn

from jqlib import pipeline
from jqlib.config import Config
from jqlib.export.can import CHOSEN_THERE
from jqlib.export.hf import checkpoint_of, write_folder
from jqlib.model.families import family_of, head_dim_of, rejoined, sites_of
from jqlib.quant.packed import packed_codes, rounded_linears, unpack
from jqlib.recipes import Recipe
from jqlib.transform.grids import spread

PACKED = "pack-quantized"


def write(config: Config, recipe: Recipe, tokenizer, to: Path) -> None:
    """Weights as codes and float16 scales. Activations below 8 bits are rounded as we do when the model runs, per token
    (per head at o_proj, where the recipe does); from 8 bits on their grid is the engine's choice.
    """
    model = pipeline.quantised(config, recipe, config.w_bits, config.a_bits)
    tensors = checkpoint_of(model)
    for name, linear in rounded_linears(model).items():
        tensors |= {f"{name}.{what}": tensor for what, tensor in _stored(linear).items()}
    tensors = rejoined(model, tensors)
    for name in [name for name in tensors if name.endswith("weight_shape")]:
        rows, columns = tensors[name].view(-1, 2).T
        tensors[name] = torch.stack([rows.sum(), columns[0]])
    write_folder(model, tensors, {"quantization_config": _about(model, config, recipe)}, tokenizer, to)


def _stored(linear: nn.Linear) -> dict[str, Tensor]:
    """Of a rounded weight, as compressed-tensors names it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid = linear.grid
    codes = unpack(packed_codes(linear), grid.bits, linear.in_features)
    scale = spread(grid.scale, grid.groupsize, codes)[:, :: group_of(linear.in_features, grid.groupsize)]
    return {
        "weight_packed": pack_to_int32(codes.to(torch.int8), grid.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }


def group_of(width: int, groupsize: int) -> int:
    """The largest groups without a ragged one that hold the same scales."""
    return min(width, groupsize) if groupsize >= width else gcd(groupsize, width)


def _about(model: nn.Module, config: Config, recipe: Recipe) -> dict:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    schemes: dict[str, dict] = {}
    places = {place.kind: place for place in sites_of(model).values()}
    for site in family_of(model).sites:
        weights = {"num_bits": config.w_bits, "type": "int", "symmetric": True, "strategy": "group"}
        weights |= {"group_size": group_of(places[site.kind].width, config.w_groupsize)}
        inputs = {"num_bits": config.a_bits, "type": "int", "symmetric": False, "dynamic": True, "strategy": "token"}
        if site.kind == "o" and recipe.o_per_head:
            inputs |= {"strategy": "group", "group_size": head_dim_of(model)}
        scheme = {"weights": weights, "input_activations": inputs if config.a_bits < CHOSEN_THERE else None}
        targets = {_in_checkpoint(model, reader) for reader in site.readers}
        schemes[site.kind] = scheme | {"targets": sorted(f"re:.*{name}$" for name in targets), "format": PACKED}
    about = QuantizationConfig(config_groups=schemes, format=PACKED, ignore=[family_of(model).head],
                               quantization_status=QuantizationStatus.COMPRESSED)  # fmt: skip
    return about.model_dump(mode="json", exclude_none=True)


def _in_checkpoint(model: nn.Module, reader: str) -> str:
    """A reader's name in a layer of the checkpoint: that of the linear that holds it, if it is a part of one."""
    return next((joined for joined in family_of(model).joined if reader.startswith(f"{joined}.")), reader)
