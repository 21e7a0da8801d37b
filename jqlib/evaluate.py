"""Perplexity with an interval."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from jqlib.data import get_evaluation_windows

RESAMPLES = 10_000
ROWS = 256  # tokens whose logits are turned into probabilities at a time


class Perplexity(float):
    """A perplexity that carries its evidence: ``nll`` (mean nats a token, one entry a window), ``low``, ``high``,
    and ``seconds``, what reading the windows took.

    [low, high] is the 95% bootstrap interval over windows: how much the number would move on other text of
    the same kind. Two settings on the same windows differ far less: compare them with `paired_interval`.
    """

    nll: list[float]
    low: float
    high: float
    seconds: float

    def __new__(cls, nll: list[float], seconds: float = 0.0):
        value = sum(nll) / len(nll)
        low, high = _bootstrap(torch.tensor(nll, dtype=torch.double))
        self = super().__new__(cls, _exp(value))
        self.nll, self.low, self.high = nll, min(_exp(low), self), max(_exp(high), self)
        self.seconds = seconds
        return self

    def __getnewargs__(self):
        return self.nll, self.seconds

    def __repr__(self) -> str:
        return f"{float(self):.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired_interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """ln(PPL_a / PPL_b) from the windows' NLL, and its 95% paired bootstrap interval: (value, low, high)."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} windows: a paired interval needs the same windows for both")
    difference = torch.tensor(a, dtype=torch.double) - torch.tensor(b, dtype=torch.double)
    return difference.mean().item(), *_bootstrap(difference)


def evaluate_perplexity(
    model: nn.Module,
    tokenizer,
    device: str | torch.device | None = None,
    *,
    dataset: str | None = None,
    seqlen: int = 2048,
    max_windows: int | None = None,
) -> Perplexity:
    """Perplexity of the test split: exp of the mean NLL over all predicted tokens.

    The usual protocol: the text is tokenised as one piece without BOS and cut into windows of ``seqlen`` tokens
    that do not overlap, each predicted on its own; the first ``max_windows`` of them (None: all).
    ``dataset`` as in `get_calibration_data`.
    """
    windows = get_evaluation_windows(tokenizer, dataset, seqlen, max_windows)
    device = device or model.device
    start = time.perf_counter()
    nll = [window_nll(model, window.to(device)) for window in tqdm(windows, "perplexity", unit="window")]
    return Perplexity(nll, time.perf_counter() - start)


@torch.inference_mode()
def window_nll(model: nn.Module, window: Tensor) -> float:
    """Mean negative log-likelihood (nats) of the tokens of one window, (seqlen,), after its first."""
    logits = model(window[None], use_cache=False).logits[0, :-1]  # (seqlen − 1, vocabulary)
    losses = [
        F.cross_entropy(rows.float(), labels, reduction="sum").double()
        for rows, labels in zip(logits.split(ROWS), window[1:].split(ROWS), strict=True)
    ]
    return (sum(losses) / len(logits)).item()


def _exp(nll: float) -> float:
    """Infinite where exp overflows."""
    return torch.tensor(nll, dtype=torch.double).exp().item()


def _bootstrap(values: Tensor) -> tuple[float, float]:
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values.double()[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high
