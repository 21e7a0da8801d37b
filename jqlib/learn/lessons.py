"""What a model learns from the FP model: calibration text in pieces, and the FP model's predictions for every token.

The loss of all stages that go by it is the mean KL (nats per token) from those predictions (LLM-QAT, Liu et al. 2023),
which says more of each token than the text's own next word, by which SpinQuant (§3.2) learns its rotations. Predictions
are kept as what the head reads, made once for all steps, stages and recipes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm

from jqlib.fused import fused
from jqlib.precision import dtype_of_products, products_in

PIECE = 512  # tokens, each piece a context of its own
ROWS = 256  # tokens whose logits are in memory at a time


class Lessons(NamedTuple):
    ids: Tensor  # (pieces, tokens)
    hidden: Tensor  # (pieces, tokens, hidden): what the FP model's head reads there
    head: Tensor  # (vocabulary, hidden): its weight

    def loss(self, model: nn.Module, pieces: Tensor) -> Tensor:
        """Mean KL (nats per token) of ``model``'s predictions from the FP model's on these pieces."""
        pieces = pieces.to(model.device)
        state = model.base_model(self.ids[pieces], use_cache=False).last_hidden_state
        head, target = model.get_output_embeddings().weight, self.hidden[pieces].flatten(0, 1)
        return Divergence.apply(state.flatten(0, 1), head, target, self.head)

    def to(self, device: torch.device) -> "Lessons":
        return Lessons(*(part.to(device) for part in self))


@torch.inference_mode()
def teach(model: nn.Module, windows: Tensor, dtype: torch.dtype = torch.float32) -> Lessons:
    """The lessons of an FP model, as loaded. ``windows``: (windows, seqlen) of calibration text, cut into pieces.

    ``dtype``: of its matrix products.
    """
    pieces, read = cut(windows), []
    with products_in(dtype, model.device):
        for ids in tqdm(pieces.split(4), "FP's predictions", unit="pieces", unit_scale=4):
            read.append(model.base_model(ids.to(model.device), use_cache=False).last_hidden_state.cpu())
    return Lessons(pieces, torch.cat(read), model.get_output_embeddings().weight.detach())


def cut(windows: Tensor) -> Tensor:
    """(windows, seqlen) as (pieces, tokens): each window in as few equal pieces as have PIECE tokens at most."""
    length = windows.shape[1] // -(-windows.shape[1] // PIECE)
    return windows[:, : windows.shape[1] // length * length].reshape(-1, length)


class Divergence(torch.autograd.Function):
    """Mean KL (nats per token) of softmax(x Wᵀ) from softmax(t Vᵀ), x, t: (tokens, hidden), W, V: (vocabulary, hidden).

    Its slope by x is made with it, ROWS tokens at a time: logits of all tokens are never in memory together.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, t: Tensor, V: Tensor) -> Tensor:
        ctx.dtype, dtype = x.dtype, dtype_of_products(x)
        x, W, t, V = (part.to(dtype) for part in (x, W, t, V))
        slopes, total = [], 0.0
        with torch.autocast(x.device.type, enabled=False):
            for rows, targets in zip(x.split(ROWS), t.split(ROWS), strict=True):
                kl, slope = _kl(linear(rows, W), linear(targets, V))
                total = total + kl.sum()
                slopes.append(slope @ W)
        ctx.save_for_backward(torch.cat(slopes))
        return total / len(x)

    @staticmethod
    def backward(ctx, slope: Tensor):
        (by_x,) = ctx.saved_tensors
        return by_x.to(ctx.dtype) * (slope / len(by_x)), None, None, None


@fused
def _kl(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each row's predictions from its target's, and its slope by the logits, of their dtype."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    found, expected = (x.to(wide).log_softmax(-1) for x in (logits, target))
    p = expected.exp()
    return (p * (expected - found)).sum(-1), (found.exp() - p).to(logits.dtype)
