"""Activations that the way back needs are kept, or made again a layer at a time (Chen et al. 2016, "checkpointing").

Numbers are the same either way; a step takes about a third longer where they are made again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from jqlib.memory import free_bytes
from jqlib.model.families import layers_of

KEPT = 20  # bytes for each number that a layer's linears read or write, as measured


def kept_bytes(shape: PreTrainedConfig, tokens: int) -> int:
    """About what a forward pass on so many tokens keeps for the way back."""
    return KEPT * shape.num_hidden_layers * tokens * (6 * shape.hidden_size + 4 * shape.intermediate_size)


@contextmanager
def recomputing(model: nn.Module, tokens: int) -> Iterator[None]:
    """Within it layers are run again on the way back if what they keep of ``tokens`` takes half of the free memory."""
    if kept_bytes(model.config, tokens) < free_bytes(model.device) / 2:
        yield
        return
    layers = [layer for _, layer in layers_of(model)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
