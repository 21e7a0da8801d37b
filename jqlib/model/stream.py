"""A model whose decoder layers are read from its safetensors files when their turn comes, and forgotten after it.

Only the layers' matrices come and go: embeddings, head, norms and biases stay in memory. What is done to a matrix that
is not there is done whenever it is read; one that has been rounded is kept packed and read no more. Whoever works on a
layer's weights does it while they are `present`; `jqlib.model.walk` sees to it for all that goes layer by layer.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from jqlib.model.families import FAMILIES, Family, Joined, Place, layers_of, sites_of, split
from jqlib.model.refuse import refuse_to_save

Change = Callable[[nn.Linear], None]
ELSEWHERE = "this model is read layer by layer (stream=True): its weights are not in memory to be saved"
NOT_WEIGHTS = "rotary_emb.inv_freq"  # older checkpoints hold it; transformers makes it anew


class Stream:
    """Where matrices are read from. ``becomes``: what is done to a module's weight each time it has been read."""

    def __init__(self, places: dict[nn.Module, tuple[Path, str, slice]], dtype: torch.dtype, device: torch.device):
        self.places, self.dtype, self.device = places, dtype, device  # a file, a tensor in it, and its rows
        self.becomes: dict[nn.Module, list[Change]] = defaultdict(list)

    def read(self, layer: nn.Module) -> None:
        for module in self._of(layer):
            if hasattr(module, "grid"):
                module.grid.bring_back(module)
                continue
            file, name, rows = self.places[module]
            module.weight = _parameter(file, name, rows, self.dtype, self.device)
            for change in self.becomes[module]:
                change(module)

    def forget(self, layer: nn.Module) -> None:
        for module in self._of(layer):
            if hasattr(module, "grid"):
                module.grid.put_away(module)
            module.weight = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)

    def _of(self, layer: nn.Module) -> list[nn.Module]:
        return [module for module in layer.modules() if module in self.places]


@contextmanager
def present(model: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Within it the layer's weights are in memory."""
    stream: Stream | None = getattr(model, "stream", None)
    if stream is None:
        yield
        return
    stream.read(layer)
    try:
        yield
    finally:
        stream.forget(layer)


def each_layer(model: nn.Module, *kinds: str) -> Iterator[list[Place]]:
    """The sites of these kinds of one layer after the other, each while its weights are in memory."""
    places = sites_of(model, *kinds).values()
    for i, (_, layer) in enumerate(layers_of(model)):
        with present(model, layer):
            yield [place for place in places if place.layer == i]


def change(model: nn.Module, module: nn.Module, how: Change) -> None:
    """Change a module's weight: now, or whenever it is read."""
    if module.weight.is_meta:
        model.stream.becomes[module].append(how)
    else:
        how(module)


def files_of(folder: Path) -> dict[str, Path]:
    """The safetensors file of every tensor in a model folder. FileNotFoundError if there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not (one := folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors: only such files can be read layer by layer")
    with safe_open(one, "pt") as file:
        return dict.fromkeys(file.keys(), one)


def open_model(
    config: PreTrainedConfig, files: dict[str, Path], dtype: torch.dtype, device: str | torch.device
) -> tuple[nn.Module, dict[str, set[str]]]:
    """The model, in eval mode, and the names of weights that its files lack, have beyond its own, or in another shape
    ("missing_keys", "unexpected_keys", "mismatched_keys"): it can be used if there are none.
    """
    if config.tie_word_embeddings and _own_head(FAMILIES[config.model_type], files):
        config.tie_word_embeddings = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.tie_weights()
    needed = {name for name, _ in model.named_parameters()}  # a tied head comes once
    held = {name for name in files if not name.endswith(NOT_WEIGHTS)}
    found = {"missing_keys": needed - held, "unexpected_keys": held - model.state_dict().keys()}
    found["mismatched_keys"] = _mismatched(model, {name: files[name] for name in needed & held})
    if any(found.values()):
        return model, found
    inside = {module for _, layer in layers_of(model) for module in layer.modules() if isinstance(module, nn.Linear)}
    places: dict[nn.Module, tuple[Path, str, slice]] = {}
    for name in needed:
        at, _, kind = name.rpartition(".")
        module = model.get_submodule(at)
        if module in inside and kind == "weight":
            places[module] = files[name], name, slice(None)
        else:
            setattr(module, kind, _parameter(files[name], name, slice(None), dtype, device))
    model.tie_weights()
    wholes = {at: places.get(module) for at, module in model.named_modules()}
    for at, joined in split(model).named_modules():
        first = 0
        for part in joined.children() if isinstance(joined, Joined) else ():
            file, name, _ = wholes[at]
            places[part] = file, name, slice(first, first := first + part.out_features)
    model.stream = Stream(places, dtype, torch.device(device))
    refuse_to_save(model, ELSEWHERE)
    for _, layer in layers_of(model):
        layer.register_forward_pre_hook(_guard)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model, found


def _own_head(family: Family, files: dict[str, Path]) -> bool:
    """Whether the files have a head that is not the embedding, whatever their config says."""
    names = f"{family.embed}.weight", f"{family.head}.weight"
    if not all(name in files for name in names):
        return False
    embed, head = (_parameter(files[name], name, slice(None), torch.float32, "cpu") for name in names)
    return not torch.equal(embed, head)


def _mismatched(model: nn.Module, files: dict[str, Path]) -> set[str]:
    """Names of tensors whose shape is not that of the model; headers alone are read."""
    wrong = set()
    for path in {*files.values()}:
        with safe_open(path, "pt") as tensors:
            here = [name for name, file in files.items() if file == path]
            wrong |= {
                name for name in here if tensors.get_slice(name).get_shape() != [*model.get_parameter(name).shape]
            }
    return wrong


def _guard(layer: nn.Module, args) -> None:
    """A layer whose weights are not there would compute nonsense without a word; `walk` may pass it by."""
    absent = any(module.weight.is_meta for module in layer.modules() if isinstance(module, nn.Linear))
    if absent and "forward" not in vars(layer):
        raise RuntimeError(
            "this model is read layer by layer (stream=True) and can't be called as a whole: use evaluate_perplexity, "
            "jqlib.model.evaluate.last_hidden or jqlib.model.walk.walk, or load it without stream"
        )


def _parameter(file: Path, name: str, rows: slice, dtype: torch.dtype, device) -> nn.Parameter:
    with safe_open(file, "pt") as tensors:
        tensor: Tensor = tensors.get_slice(name)[rows] if rows != slice(None) else tensors.get_tensor(name)
    return nn.Parameter(tensor.to(device, dtype), requires_grad=False)
