"""All that we measure in one folder: a file of code there (`modeling_jointquant`) says what transformers can't."""

from pathlib import Path

import torch
from torch import nn

from jqlib import pipeline
from jqlib.config import Config
from jqlib.export import modeling_jointquant as code
from jqlib.export.hf import checkpoint_of, write_folder
from jqlib.model.families import family_of, head_dim_of, layers_of, rejoined, sites_of
from jqlib.quant.packed import packed_codes, rounded_linears
from jqlib.recipes import Recipe
from jqlib.transform.grids import OFF
from jqlib.transform.hadamard import block_order, factors, hadamard_matrix
from jqlib.transform.transform import Grid, Transform

CLASSES = {"AutoConfig": code.JointQuantConfig.__name__, "AutoModelForCausalLM": code.JointQuantForCausalLM.__name__}
FILE = Path(code.__file__)


def write(config: Config, recipe: Recipe, tokenizer, to: Path) -> None:
    """Codes, scales, clips, gains and Hadamard matrices; a config of a type that no library takes for its own."""
    model = pipeline.quantised(config, recipe, config.w_bits, config.a_bits)
    tensors = {name: tensor for name, tensor in checkpoint_of(model).items() if ".kv_grid." not in name}
    coded, sites = {}, _standing(model)
    for name, linear in rounded_linears(model).items():
        coded |= {f"{name}.codes": packed_codes(linear), f"{name}.scale": linear.grid.scale}
    sizes = {transform.rotation.n for transform, _ in sites.values() if transform.rotation is not None}
    sizes |= {head_dim_of(model)} if config.kv_bits < OFF else set()
    about = {
        "w_bits": config.w_bits, "w_groupsize": config.w_groupsize, "kv_bits": config.kv_bits,
        "linears": [name.removesuffix(".codes") for name in rejoined(model, coded) if name.endswith(".codes")],
        "attentions": [f"{name}.{family_of(model).attention}" for name, _ in layers_of(model)],
        "sites": {name: _said(*site) for name, site in sites.items()},
        "hadamard": {str(n): factors(block_order(n)) for n in sizes},
    }  # fmt: skip
    for name, (transform, _) in sites.items():
        tensors[f"{name}.site.clip"] = transform.grid.clip if transform.grid else torch.ones(())
        tensors |= {} if transform.gain is None else {f"{name}.site.gain": transform.gain}
    for order in {order for orders in about["hadamard"].values() for order in orders}:
        tensors[f"hadamard_{order}"] = hadamard_matrix(order).to(torch.int8)
    tensors |= {f"{name}.kv_grid.clip": torch.ones(()) for name in about["attentions"] if config.kv_bits < OFF}
    auto = {kind: f"{FILE.stem}.{name}" for kind, name in CLASSES.items()}
    kind = type(code.JointQuantConfig.__name__, (type(model.config),), {"model_type": code.JointQuantConfig.model_type})
    write_folder(model, tensors | coded, {"jointquant": about, "auto_map": auto}, tokenizer, to, kind)
    _write_code(model, to)


def _said(transform: Transform, behind: bool) -> dict:
    """What stands at a module, as the file of code asks for it."""
    grid, gain = transform.grid or Grid(OFF), transform.gain
    return {
        "behind": behind, "turns": transform.rotation is not None, "gain": 0 if gain is None else len(gain),
        "bits": grid.bits, "groupsize": grid.groupsize,
    }  # fmt: skip


def _standing(model: nn.Module) -> dict[str, tuple[Transform, bool]]:
    """By module: what stands there, and whether behind it (else before)."""
    names = {module: name for name, module in model.named_modules()}
    hosts = [place for place in sites_of(model).values() if hasattr(place.host, "transform")]
    return {names[place.host]: (place.host.transform, place.norm is not None) for place in hosts}


def _write_code(model: nn.Module, to: Path) -> None:
    """The file of code, of the model's own classes."""
    text = FILE.read_text(encoding="utf-8")
    for ours, theirs in (("LlamaConfig", type(model.config)), ("LlamaForCausalLM", type(model))):
        text = text.replace(f"import {ours} as", f"import {theirs.__name__} as")
    (to / FILE.name).write_text(text, encoding="utf-8")
