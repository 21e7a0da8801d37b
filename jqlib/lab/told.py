"""What a model says, and how far it is from the FP model token by token."""

from itertools import pairwise

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROWS = 256  # tokens whose logits are in memory at a time


@torch.inference_mode()
def continuation(model: nn.Module, tokenizer, prompt: str, tokens: int = 30) -> str:
    """What the model goes on with, the likeliest token each time."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def losses(head: nn.Module, hidden: Tensor, windows: Tensor) -> Tensor:
    """Nats for each token of the windows (windows, seqlen) but their first, (windows, seqlen − 1).

    ``hidden``: (windows, seqlen, hidden), what the ``head`` reads.
    """
    return torch.stack([
        torch.cat([cross_entropy(head(x).float(), y, reduction="none")
                   for x, y in zip(states[:-1].split(ROWS), window[1:].split(ROWS), strict=True)])
        for states, window in zip(hidden, windows.to(hidden.device), strict=True)
    ]).cpu()  # fmt: skip


def by_position(extra: Tensor) -> pd.DataFrame:
    """Mean ``extra`` loss (windows, seqlen − 1) of tokens 1 to 7, 8 to 15, 16 to 31, … of a window, with its standard
    error over windows (``error``), and each part's ``share`` of all of it. Windows are counted from token 0.
    """
    count = extra.shape[1]
    ends = [1, *(2**i for i in range(3, count.bit_length())), count + 1]
    parts = [(low, high - 1, extra[:, low - 1 : high - 1]) for low, high in pairwise(ends)]
    rows = []
    for first, last, part in parts:
        error = part.mean(1).std().item() / len(part) ** 0.5 if len(part) > 1 else float("nan")
        share = (part.sum() / extra.sum()).item()
        rows.append({"first": first, "last": last, "extra": part.mean().item(), "error": error, "share": share})
    return pd.DataFrame(rows)


def by_frequency(extra: Tensor, windows: Tensor, seen: Tensor) -> pd.DataFrame:
    """Mean ``extra`` loss (windows, seqlen − 1) of tokens by how often ``seen``, a text's tokens, has them, with the
    number of tokens and each part's ``share`` of all of it.
    """
    counts = seen.flatten().bincount(minlength=int(windows.max()) + 1)[windows[:, 1:]].flatten()
    kinds = pd.cut(counts.numpy(), [-1, 0, 9, 99, float("inf")], labels=["never", "1 to 9", "10 to 99", "100 or more"])
    table = pd.DataFrame({"seen": kinds, "extra": extra.flatten().numpy()}).groupby("seen", observed=True).extra
    return pd.DataFrame({"tokens": table.size(), "extra": table.mean(), "share": table.sum() / extra.sum().item()})
