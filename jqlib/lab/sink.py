"""Where a model's heads look: attention shares, for the map of a sink (arXiv 2309.17453)."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def attention_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Each head's attention over a few tokens, ``ids`` (1, T): (layers, heads, T, T), float32; rows look at columns.

    Hugging Face's fast attention keeps no shares: its plain one computes these.
    """
    fast = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        shares = model(ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(fast)
    return torch.stack([share[0].float().cpu() for share in shares])
