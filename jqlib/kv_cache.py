"""The KV cache in few bits: keys (behind R3) and values are rounded on their way into the cache.

R3 is a Hadamard rotation of each head's queries and keys after RoPE: scores stay what they were, keys lose their
outliers (QuaRot §4). Simulated: a key is rotated, rounded and turned back, so queries need no rotation.
"""

import torch
from torch import Tensor, nn

from jqlib.hadamard import hadamard_matrix
from jqlib.models import attentions_of, head_dim_of
from jqlib.quant import quantize_activation


def quantize_kv_cache(model: nn.Module, bits: int) -> None:
    """Round keys and values of all layers, asymmetric, a grid a token and head; prefill and generation alike.

    Raises ValueError where no Hadamard matrix has the size of a head.
    """
    d = head_dim_of(model)
    R3 = hadamard_matrix(d).to(model.device) / d**0.5

    def behind_a_grid(module, args, kwargs):
        return args, kwargs | {"past_key_values": RoundingCache(kwargs.get("past_key_values"), R3, bits)}

    for attention in attentions_of(model):
        attention.register_forward_pre_hook(behind_a_grid, with_kwargs=True)


class RoundingCache:
    """What an attention module sees in place of its cache (None: there is none, as in evaluation)."""

    def __init__(self, cache, R3: Tensor, bits: int):
        self.cache, self.R3, self.bits = cache, R3, bits

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values, (..., tokens, head_dim), as the cache would give them back."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        rounded = quantize_activation(keys.to(wide) @ self.R3.to(wide), self.bits) @ self.R3.T.to(wide)
        keys, values = rounded.to(keys.dtype), quantize_activation(values, self.bits)
        return self.cache.update(keys, values, *args, **kwargs) if self.cache is not None else (keys, values)
