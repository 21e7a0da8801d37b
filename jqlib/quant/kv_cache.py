"""The KV cache in few bits: keys (behind R3) and values are rounded on their way into the cache.

R3 is a Hadamard rotation of each head's queries and keys after RoPE: scores stay what they were, keys lose their
outliers (QuaRot §4). Simulated: a key is rotated, rounded and turned back, so queries need no rotation.
"""

from torch import Tensor, nn

from jqlib.model.families import attentions_of, head_dim_of
from jqlib.model.refuse import refuse_to_save
from jqlib.transform.install import ONLINE
from jqlib.transform.transform import Grid, Hadamard, Transform


class KVGrid(nn.Module):
    """How keys and values are rounded, one grid per token and head; it stands in the attention module."""

    def __init__(self, head_dim: int, bits: int):
        super().__init__()
        self.bits = bits
        self.keys = Transform(rotation=Hadamard(head_dim), grid=Grid(bits), online=True)
        self.values = Grid(bits)

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (..., tokens, head_dim), as the cache gives them back."""
        return self.keys.simulate(keys), self.values(values)


def quantize_kv_cache(model: nn.Module, bits: int) -> None:
    """Round keys and values of all layers, prefill and generation alike.

    Raises ValueError if no Hadamard matrix has the size of a head.
    """
    for attention in attentions_of(model):
        attention.kv_grid = KVGrid(head_dim_of(model), bits).to(model.device)
        attention.register_forward_pre_hook(_behind_a_grid, with_kwargs=True)
    refuse_to_save(model, ONLINE)


def _behind_a_grid(attention: nn.Module, args, kwargs):
    name = "cache" if "cache" in kwargs else "past_key_values"  # transformers 5.24 has renamed it
    return args, kwargs | {name: RoundingCache(kwargs.get(name), attention.kv_grid)}


class RoundingCache:
    """What an attention module sees in place of its cache (None: there is none, as in evaluation)."""

    def __init__(self, cache, grid: KVGrid):
        self.cache, self.grid = cache, grid

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values, (..., tokens, head_dim), as the cache would give them back."""
        keys, values = self.grid(keys, values)
        return self.cache.update(keys, values, *args, **kwargs) if self.cache is not None else (keys, values)
