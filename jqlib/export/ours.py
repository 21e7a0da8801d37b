"""All that we measure in one folder: a file of code there (`modeling_jointquant`) says what transformers can't."""

from pathlib import Path

import torch
from torch import nn

from jqlib import pipeline
from jqlib.config import Config
from jqlib.export import modeling_jointquant as code
from jqlib.export.hf import write_folder
from jqlib.model.families import family_of, head_dim_of, layers_of, rejoined, sites_of
from jqlib.quant.keep import kept_apart
from jqlib.quant.packed import packed_codes, rounded_linears
from jqlib.recipes import Recipe
from jqlib.transform.grids import OFF
from jqlib.transform.hadamard import block_order, factors, hadamard_matrix

CLASSES = {"AutoConfig": code.JointQuantConfig.__name__, "AutoModelForCausalLM": code.JointQuantForCausalLM.__name__}
FILE = Path(code.__file__)


def write(config: Config, recipe: Recipe, tokenizer, to: Path) -> None:
    """Codes, scales, clips, gains and Hadamard matrices; a config of a type that no library takes for its own."""
    model = pipeline.quantised(config, recipe, config.w_bits, config.a_bits)
    rounded, sites = rounded_linears(model), _standing(model)
    kept = {name: p for name, p in model.state_dict().items() if not kept_apart(name, rounded)}
    tensors, coded = {name: p for name, p in kept.items() if ".kv_grid." not in name}, {}
    for name, linear in rounded.items():
        coded |= {f"{name}.codes": packed_codes(linear), f"{name}.scale": linear.grid.scale}
    about = {
        "w_bits": config.w_bits, "w_groupsize": config.w_groupsize, "kv_bits": config.kv_bits,
        "linears": [name.removesuffix(".codes") for name in rejoined(model, coded) if name.endswith(".codes")],
        "attentions": [f"{name}.{family_of(model).attention}" for name, _ in layers_of(model)],
        "sites": {}, "hadamard": {},
    }  # fmt: skip
    sizes = {head_dim_of(model)} if config.kv_bits < OFF else set()
    for name, (transform, behind) in sites.items():
        grid, gain = transform.grid, transform.gain
        about["sites"][name] = {
            "behind": behind, "turns": transform.rotation is not None, "gain": 0 if gain is None else len(gain),
            "bits": grid.bits if grid else OFF, "groupsize": grid.groupsize if grid else None,
        }  # fmt: skip
        sizes |= {transform.rotation.n} if transform.rotation is not None else set()
        tensors[f"{name}.site.clip"] = grid.clip if grid else torch.ones(())
        tensors |= {} if gain is None else {f"{name}.site.gain": gain}
    about["hadamard"] = {str(n): factors(block_order(n)) for n in sizes}
    for order in {order for orders in about["hadamard"].values() for order in orders}:
        tensors[f"hadamard_{order}"] = hadamard_matrix(order).to(torch.int8)
    tensors |= {f"{name}.kv_grid.clip": torch.ones(()) for name in about["attentions"] if config.kv_bits < OFF}
    auto = {kind: f"{FILE.stem}.{name}" for kind, name in CLASSES.items()}
    kind = type(code.JointQuantConfig.__name__, (type(model.config),), {"model_type": code.JointQuantConfig.model_type})
    write_folder(model, tensors | coded, {"jointquant": about, "auto_map": auto}, tokenizer, to, kind)
    _write_code(model, to)


def _standing(model: nn.Module) -> dict[str, tuple]:
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
