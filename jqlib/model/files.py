"""A model folder's files are whole, or the one that is not is named: before anything is loaded, in milliseconds."""

import json
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

POINTER = b"version https://git-lfs"
INDICES = "model.safetensors.index.json", "pytorch_model.bin.index.json"
READ = (*INDICES, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
REMEDY = "Is the download whole? Fetch it again"


@cache
def check_files(folder: Path, content: str) -> None:
    """Raises ValueError for a file of weights or of JSON in a model folder that can't be what its name says, and for a
    model that is quantised already. ``content``: the folder's fingerprint, for it is read once.
    """
    older = not any(folder.glob("*.safetensors"))  # else nobody reads weights in .bin, and they may be missing
    for path in sorted(folder.iterdir()):
        weights = path.name.startswith("pytorch_model") and ".bin" in path.suffixes
        if not (older if weights else path.suffix in (".safetensors", ".json")):
            continue
        if not path.exists():
            raise ValueError(f"{path} is a link to {path.readlink()}, which does not exist")
        if not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        if start == POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its repository")
        if not start:
            raise ValueError(f"{path} is empty. {REMEDY}")
        if path.suffix != ".bin":
            (_check_safetensors if path.suffix == ".safetensors" else _check_json)(path)


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or not all of it ({error}). {REMEDY}") from error


def _check_json(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). {REMEDY}") from error
    if path.name in READ and not isinstance(content, dict):
        raise ValueError(f"{path} holds no names and values. {REMEDY}")
    if path.name in INDICES:
        shards = sorted({*content.get("weight_map", {}).values()})
        if lost := [name for name in shards if not (path.parent / name).exists()]:
            raise ValueError(f"{path.parent} has no {lost[0]}, which {path.name} names. {REMEDY}")
    if path.name == "config.json":
        ours = {"quant_method": "jointquant"} if "jointquant" in content else None
        if about := content.get("quantization_config") or ours:
            method = about.get("quant_method", "a method that it does not name")
            raise ValueError(
                f"{path} says that the model is quantised already, by {method}: give its floating-point original"
            )
