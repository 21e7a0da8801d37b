"""Where a model's heads look: attention shares, for the map of a sink (arXiv 2309.17453)."""

import torch
from torch import Tensor, nn


@torch.inference_mode()
def attention_of(model: nn.Module, window: Tensor) -> Tensor:
    """Who looks at whom in one window (seqlen,): (layers, heads, seqlen, seqlen), float32; a row adds up to 1.

    Hugging Face's fast attention keeps no shares: its plain one computes these.
    """
    fast = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        shares = model(window[None].to(model.device), output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(fast)
    return torch.cat(shares).float().cpu()


def on_the_first(attention: Tensor) -> Tensor:
    """What the tokens after the first give to it on average: (layers, heads)."""
    return attention[..., 1:, 0].mean(-1)
