"""Perplexity, and how far a model's predictions are from the FP model's, with intervals."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from jqlib.choices import Draw, Split
from jqlib.fused import fused
from jqlib.model.data import Windows, get_evaluation_windows
from jqlib.model.families import family_of
from jqlib.model.intervals import Interval, mean_interval
from jqlib.model.walk import walk
from jqlib.precision import products_in

LOGITS = 2**24  # numbers: of so many tokens at a time as have them


class Perplexity(float):
    """A perplexity that carries its evidence, each a list with one entry per window.

    ``nll``: mean nats per token. ``articles``: which article each window is from. If the FP model's predictions were
    at hand: ``kl``, mean KL (nats per token) from them, and ``top1``, the share of tokens with the same first choice.

    [low, high] is the 95% interval over articles: how much the number would move on other text of the same kind; NaN
    if one article gives none. Two settings on the same windows differ far less: compare them with `paired_interval`.
    """

    nll: list[float]
    articles: list[int]
    kl: list[float] | None
    top1: list[float] | None
    low: float
    high: float

    def __new__(cls, nll, articles=None, kl=None, top1=None):
        found = mean_interval(nll, articles)
        self = super().__new__(cls, _exp(found.value))
        self.nll, self.kl, self.top1 = nll, kl, top1
        self.articles = list(range(len(nll))) if articles is None else articles
        self.low, self.high = _exp(found.low), _exp(found.high)
        return self

    def __getnewargs__(self):
        return self.nll, self.articles, self.kl, self.top1

    def __repr__(self) -> str:
        known = f"{self.low:.2f}, {self.high:.2f}" if self.low == self.low else "no interval from one article"
        return f"{float(self):.2f} [{known}]"

    def row(self) -> dict:
        """Its numbers by plain names, for results; an end of an interval that is not known is None."""
        found = {"ppl": Interval(self, self.low, self.high)}
        known = {name: getattr(self, name) for name in ("kl", "top1") if getattr(self, name)}
        found |= {name: mean_interval(values, self.articles) for name, values in known.items()}
        row = {}
        for name, (value, *ends) in found.items():
            low, high = (None if math.isnan(end) else end for end in ends)
            row |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
        by_window = {"nll": self.nll, "kl_by_window": self.kl, "top1_by_window": self.top1, "articles": self.articles}
        return row | by_window


class Reference(NamedTuple):
    """What the FP model predicts, kept small: logits are made again, a few rows at a time."""

    hidden: Tensor  # (windows, seqlen, hidden): its last hidden states, behind the final norm
    head: Tensor  # (vocabulary, hidden): the weight of its head


def evaluate_perplexity(
    model: nn.Module,
    tokenizer,
    device: str | torch.device | None = None,
    *,
    dataset: str | None = None,
    seqlen: int = 2048,
    max_windows: int | None = None,
    split: Split = "test",
    windows: Draw = "spread",
    bos: bool = False,
) -> Perplexity:
    """Perplexity of the test split: exp of the mean NLL over all predicted tokens.

    The usual protocol: text is tokenised without BOS (``bos`` puts one before every window) and cut into windows of
    ``seqlen`` tokens that do not overlap, each predicted on its own: all of them (``max_windows=None``), or so many
    from all over the text, or with ``windows="first"`` the first. ``dataset`` as in `get_calibration_data`, the rest
    as in `get_evaluation_windows`.
    """
    text = get_evaluation_windows(tokenizer, dataset, seqlen, max_windows, split=split, windows=windows, bos=bos)
    return evaluate_windows(model, text, device)


def evaluate_windows(
    model: nn.Module, windows: Windows, device: str | torch.device | None = None, reference: Reference | None = None,
    dtype: torch.dtype = torch.float32,
) -> Perplexity:  # fmt: skip
    """`evaluate_perplexity` on windows at hand; with the FP model's ``reference`` on them, KL and agreement too.

    ``dtype``: of matrix products, bfloat16 or the model's own.
    """
    device = device or model.device
    head, read = reference and reference.head.to(device), []
    with products_in(dtype, model.device):
        hidden = last_hidden(model, windows.ids, "perplexity")
        for i, window in enumerate(windows.ids):
            target = reference and Reference(reference.hidden[i].to(device), head)
            read.append(_read(model.get_output_embeddings(), hidden[i], window.to(device), target))
    if wrong := [i for i, row in enumerate(read) if math.isnan(row[0])]:
        narrow = "" if model.dtype == torch.float32 else f", or {model.dtype} is too narrow for it (try float32)"
        raise FloatingPointError(
            f"the model's predictions on window {wrong[0]} are not numbers: its weights are damaged{narrow}"
        )
    nll, kl, top1 = (list(values) for values in zip(*read, strict=True))
    return Perplexity(nll, windows.articles, *((kl, top1) if reference else (None, None)))


@torch.inference_mode()
def last_hidden(model: nn.Module, windows: Tensor, label: str | None = None) -> Tensor:
    """What the head reads, (windows, seqlen, hidden): layer by layer, all windows through one before the next."""
    for step in walk(model, windows, label):
        step.forward()
    norm = model.get_submodule(family_of(model).final_norm)
    for i, x in enumerate(step.hidden):
        step.hidden[i] = norm(x)
    return step.hidden


@torch.inference_mode()
def read_window(model: nn.Module, window: Tensor, reference: Reference | None = None) -> tuple[float, float, float]:
    """Of one window, (seqlen,): mean NLL (nats) of the tokens after its first, mean KL (nats per token) from the
    reference's predictions, and the share of tokens with its first choice; the last two NaN without one.

    ``reference.hidden``: (seqlen, hidden), of this window.
    """
    return _read(model.get_output_embeddings(), last_hidden(model, window[None])[0], window, reference)


@torch.inference_mode()
def _read(head: nn.Module, hidden: Tensor, window: Tensor, reference: Reference | None) -> tuple[float, float, float]:
    """`read_window`, of what the head reads, (seqlen, hidden)."""
    sums, count = torch.zeros(3, dtype=torch.double), len(window) - 1
    size = max(1, LOGITS // len(head.weight))
    for at in range(0, count, size):
        rows = slice(at, min(at + size, count))
        logits, labels = head(hidden[rows]), window[1:][rows]
        sums[0] += _nll(logits, labels).double().sum().cpu()
        if reference:
            expected = linear(reference.hidden[rows], reference.head)
            for i, found in enumerate(_against(logits, expected), 1):
                sums[i] += found.double().sum().cpu()
    nll, kl, top1 = (sums / count).tolist()
    return (nll, kl, top1) if reference else (nll, math.nan, math.nan)


@fused
def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats for each label, logits (tokens, vocabulary)."""
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, labels[:, None])[:, 0]


@fused
def _against(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token: KL of the predictions from the target's, and whether the first choice is the same."""
    found, expected = logits.float().log_softmax(-1), target.float().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1), expected.argmax(-1) == found.argmax(-1)


def _exp(nll: float) -> float:
    """Infinite where exp overflows."""
    return torch.tensor(nll, dtype=torch.double).exp().item()
