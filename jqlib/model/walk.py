"""The one walk through a model: layer by layer, the hidden states of all windows outside.

Each layer gets ITS keyword arguments (masks and positions differ from layer to layer in models with sliding windows).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jqlib.model.families import layers_of
from jqlib.model.stream import present
from jqlib.product import fast_float32


def tokens_at_once(device: str | torch.device) -> int:
    """How many are taken through a layer, or the model, together: a GPU stands idle on few."""
    return 2048 if torch.device(device).type == "cpu" else 8192


@dataclass
class Step:
    """A layer whose turn has come. ``hidden``: what it is given, (windows, tokens, hidden)."""

    name: str
    layer: nn.Module
    hidden: Tensor
    arguments: dict = field(repr=False)
    done: bool = False

    @torch.no_grad()
    def forward(self) -> None:
        """Take the hidden states through the layer: they are the next layer's then."""
        self.done = True
        with fast_float32(self.hidden.device):
            for part in self.parts():
                self.hidden[part] = self.run(self.hidden[part])

    def parts(self) -> list[slice]:
        """The windows, as many together as are run at once."""
        size = max(1, tokens_at_once(self.hidden.device) // self.hidden.shape[1])
        return [slice(i, i + size) for i in range(0, len(self.hidden), size)]

    def run(self, x: Tensor) -> Tensor:
        """What the layer makes of hidden states, (windows, tokens, hidden)."""
        output = self.layer(x, **self.arguments)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def inputs(self, x: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
        """What modules of the layer read when it is given x: (tokens, features) each, float32.

        ``names``: module in the layer -> the name its input gets. The pass ends when all have been read.
        """
        found: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> None:
            found[name] = x.flatten(0, -2).float()
            if len(found) == len(names):
                raise _SeenAllError

        handles = [
            self.layer.get_submodule(module).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
            for module, name in names.items()
        ]
        with removing(handles), suppress(_SeenAllError), fast_float32(x.device):
            self.run(x)
        return found


def walk(model: nn.Module, windows: Tensor, label: str | None = None) -> Iterator[Step]:
    """Every layer in turn, for token windows (windows, seqlen). A layer that the caller has not run is run after it.

    ``label``: of its progress; None shows none.
    """
    hidden, arguments = _enter(model, windows)
    layers = list(layers_of(model))
    shown = tqdm(layers, label, unit="layer") if label else layers
    for (name, layer), its_own in zip(shown, arguments, strict=True):
        step = Step(name, layer, hidden, its_own)
        with present(model, layer):
            yield step
            if not step.done:
                step.forward()


class _SeenAllError(Exception):
    """Stops a forward pass early: what it was for has been seen."""


@torch.no_grad()
def _enter(model: nn.Module, windows: Tensor) -> tuple[Tensor, list[dict]]:
    """What the first layer is given for each window, and the keyword arguments of every layer: none of them runs."""
    layers = [layer for _, layer in layers_of(model)]
    hidden: list[Tensor] = []
    arguments: list[dict] = []

    def remember(layer, args, kwargs) -> None:
        if layer is layers[0]:
            hidden.append(args[0])
        if len(arguments) < len(layers):  # the first window's
            arguments.append(kwargs)

    with removing([layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in layers]):
        for layer in layers:
            layer.forward = lambda x, *_, **__: x
        try:
            for window in windows:
                model.base_model(window[None].to(model.device), use_cache=False)
        finally:
            for layer in layers:
                del layer.forward
    return torch.cat(hidden), arguments


@contextmanager
def removing(handles: list) -> Iterator[None]:
    """Forward hooks go, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
