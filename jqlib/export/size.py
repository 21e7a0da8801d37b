"""How many bits a weight takes, counted from an exported folder's files."""

from pathlib import Path

from gguf import GGUFReader
from safetensors import safe_open
from torch import nn

from jqlib.model.families import linears_of, rejoined


def bits_per_weight(folder: Path, model: nn.Module) -> float:
    """Of the linears of a ``model``'s layers (the meta device will do), codes and scales and all."""
    weights = sum(linear.weight.numel() for linear in linears_of(model).values())
    return 8 * (_in_gguf(folder) if (folder / "model.gguf").is_file() else _in_safetensors(folder, model)) / weights


def _in_gguf(folder: Path) -> int:
    tensors = [tensor for tensor in GGUFReader(folder / "model.gguf").tensors if tensor.name.startswith("blk.")]
    return sum(tensor.n_bytes for tensor in tensors if len(tensor.shape) == 2)


def _in_safetensors(folder: Path, model: nn.Module) -> int:
    weights = {f"{name}.weight": linear.weight for name, linear in linears_of(model).items()}
    linears, total = {name.removesuffix(".weight") for name in rejoined(model, weights)}, 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.rpartition(".")[0] in linears]  # noqa: SIM118
            total += sum(file.get_tensor(name).nbytes for name in names if not name.endswith(".bias"))
    return total
