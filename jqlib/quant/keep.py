"""A model kept whole in one file: rounded weights as codes and scales, transforms, grids, the KV cache's bits."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from jqlib.model.families import attentions_of, sites_of, split
from jqlib.quant.kv_cache import quantize_kv_cache
from jqlib.quant.packed import pack_weights, rounded_linears, unpack_weights
from jqlib.transform.build import done
from jqlib.transform.grids import OFF
from jqlib.transform.install import install, standing
from jqlib.transform.transform import packed, unpacked


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model, whatever was done to it, to a safetensors file that `load_model` reads; not its tokenizer.

    4-bit weights take 4 bits and their scales 16 each; all else keeps its dtype. ValueError if weights are not there,
    FileNotFoundError if the file's folder is not.
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"there is no folder {Path(path).parent} for {Path(path).name}: make it first")
    rounded = rounded_linears(model)
    transforms, layouts = packed(standing(model))
    weights = unrounded(model)
    kv_grid = getattr(attentions_of(model)[0], "kv_grid", None)
    about = {
        "config": model.config.to_dict(), "done": sorted(done(model)), "transforms": layouts,
        "kv_bits": kv_grid.bits if kv_grid else OFF, "dtype": str(model.dtype).removeprefix("torch."),
        "grid": next(([linear.grid.bits, linear.grid.groupsize] for linear in rounded.values()), None),
    }  # fmt: skip
    if gone := [name for name, p in weights.items() if p.is_meta]:
        raise ValueError(f"{gone[0]} is not in memory: a model that is read layer by layer (stream=True) can be kept "
                         "when its weights are rounded")  # fmt: skip
    tensors = {f"weight {k}": p for k, p in weights.items()} | {f"transform {k}": t for k, t in transforms.items()}
    tensors |= {f"rounded {k}": t for k, t in pack_weights(model).items()}
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        save_file({k: t.cpu().clone() for k, t in tensors.items()}, temporary, {"jointquant": json.dumps(about)})
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)  # its writer lets nobody else read it
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unrounded(model: nn.Module) -> dict[str, Tensor]:
    """The model's state but for what is kept as codes and scales, or with its transform."""
    rounded = rounded_linears(model)
    return {name: tensor for name, tensor in model.state_dict().items() if not _kept_apart(name, rounded)}


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save_model` wrote, on a device. Raises ValueError for a file that is not one of ours."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: jqlib.get_model reads a model folder, load_model what save_model wrote")
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}); jqlib.save_model writes one") from error
    with opened as file:
        metadata = file.metadata() or {}
        if "jointquant" not in metadata:
            raise ValueError(f"{path} was not written by jqlib.save_model; a model folder is read by jqlib.get_model")
        about, tensors = json.loads(metadata["jointquant"]), {"weight": {}, "transform": {}, "rounded": {}}
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(" ")
            tensors[kind][name] = file.get_tensor(key)
    config = AutoConfig.for_model(**about["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, about["dtype"]))
    model = split(model).eval().requires_grad_(False)
    places = sites_of(model)
    for name, transform in unpacked(tensors["transform"], about["transforms"]).items():
        install(model, places[name], transform)
    if about["kv_bits"] < OFF:
        quantize_kv_cache(model, about["kv_bits"])
    if about["grid"]:
        unpack_weights(model, tensors["rounded"], *about["grid"])
    missing, unexpected = model.load_state_dict(tensors["weight"], strict=False)
    rounded = rounded_linears(model)
    if wrong := unexpected or [name for name in missing if not _kept_apart(name, rounded)]:
        raise ValueError(f"{path} does not fit its own config: {wrong[0]}")
    done(model).update(about["done"])
    return model.to(device)


def _kept_apart(name: str, rounded: dict[str, nn.Module]) -> bool:
    """Whether a tensor of the model's state is kept as codes and scales, or with its transform."""
    return ".transform." in name or (name.endswith(".weight") and name.removesuffix(".weight") in rounded)
