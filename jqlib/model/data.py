"""Text to token windows: calibration data and evaluation windows."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from jqlib.choices import Draw, Split, check_choice
from jqlib.model.text import load_articles

EVALUATION_SEED = 0  # of the draw of windows: never the run's, for rows of all seeds are compared on the same windows
BLOCK = 8  # adjoining windows that an interval takes as one, if there are no articles


class Windows(NamedTuple):
    """Evaluation windows: ``ids``, int64, (windows, seqlen), and what each is from.

    ``articles``: a number for every window, the same for windows that an interval must take together: those of one
    article, or of one block of a text without articles. ``drawn``: how they were taken, in words.
    """

    ids: Tensor
    articles: list[int]
    drawn: str = ""


def get_calibration_data(
    tokenizer,
    nsamples: int = 128,
    seqlen: int = 2048,
    dataset: str | None = None,
    seed: int = 0,
    *,
    least: int | None = None,
) -> Tensor:
    """Token windows to calibrate on: int64, (nsamples, seqlen).

    The text of the calibration split is tokenised without BOS and cut into windows that do not overlap; ``seed``
    chooses which. ``dataset``: ``"wiki"`` (embedded), ``"wikitext2"``, ``"c4"``, a folder in the hub's layout (parquet)
    or a text file; by default ``"wiki"`` for the embedded model and ``"wikitext2"`` for any other.

    Raises ValueError when the text holds fewer windows than asked; if ``least`` are enough, there may be fewer.
    """
    dataset = dataset or _default(tokenizer)
    ids = torch.cat(_tokens(tokenizer, dataset, "calibration"))
    windows = _cut(ids, seqlen, nsamples if least is None else least, f"calibration text of {dataset!r}")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:nsamples]]


def get_evaluation_windows(
    tokenizer,
    dataset: str | None = None,
    seqlen: int = 2048,
    max_windows: int | None = None,
    *,
    split: Split = "test",
    windows: Draw = "spread",
    bos: bool = False,
) -> Windows:
    """Windows to evaluate on, which do not overlap: ``max_windows`` of them, or with None all of the text.

    ``windows="spread"`` takes them from everywhere. Of a corpus of articles (``wiki``) each lies within one article:
    every article of ``seqlen`` tokens or more gives one, at a drawn place and in drawn order, before any gives a
    second. The draw has a seed of its own, and fewer windows are the first of more. Of any other text, or if more
    are asked for than lie within articles, they are evenly spaced. ``windows="first"`` takes the first of the text,
    as published tables do with the whole of it. ``split``: ``"test"``, or ``"validation"`` to choose by. ``bos`` puts
    the tokenizer's BOS before each: seqlen + 1 ids, of which all but that are predicted.

    Raises ValueError when the text holds fewer windows than asked, or the tokenizer has no BOS.
    """
    check_choice("windows", windows, Draw)
    check_choice("split", split, Split)
    if bos:
        if tokenizer.bos_token_id is None:
            raise ValueError("bos=True, but this tokenizer has no BOS token: leave it out")
        found = get_evaluation_windows(tokenizer, dataset, seqlen, max_windows, split=split, windows=windows)
        return found._replace(ids=pad(found.ids, (1, 0), value=tokenizer.bos_token_id))
    dataset = dataset or _default(tokenizer)
    articles = _tokens(tokenizer, dataset, split)
    whole = _cut(torch.cat(articles), seqlen, 1 if max_windows is None else max_windows, f"{split} text of {dataset!r}")
    count = len(whole) if max_windows is None else max_windows
    if windows == "spread" and count < len(whole):
        drawn = _within_articles([len(a) for a in articles], seqlen) if len(articles) > 1 else []
        if count <= len(drawn):
            ids = torch.stack([articles[article][start : start + seqlen] for article, start in drawn[:count]])
            of = [article for article, _ in drawn[:count]]
            return Windows(ids, of, f"from {len({*of})} articles, seed {EVALUATION_SEED}")
        places, how = [(2 * i + 1) * len(whole) // (2 * count) for i in range(count)], "evenly spaced over the text"
    else:
        places, how = list(range(count)), "the whole text" if count == len(whole) else "the first of the text"
    return Windows(whole[places], _sources(places, articles, seqlen), how)


def _default(tokenizer) -> str:
    return getattr(tokenizer, "default_dataset", "wikitext2")


def _tokens(tokenizer, dataset: str, split: str) -> list[Tensor]:
    """The token ids of each article, a blank line behind all but the last."""
    *others, last = load_articles(dataset, split)
    texts = [*(f"{article}\n\n" for article in others), last]
    return [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _cut(ids: Tensor, seqlen: int, least: int, text: str) -> Tensor:
    """All windows of a text in order, at least ``least`` of them: (windows, seqlen)."""
    if seqlen < 2 or least < 1:
        raise ValueError(f"{least} windows of {seqlen} tokens: at least 1 window and 2 tokens are needed")
    count = len(ids) // seqlen
    if count < least:
        raise ValueError(
            f"the {text} has {len(ids):,} tokens: {count} windows of {seqlen}, but {least} "
            "were asked for. Ask for fewer or shorter windows, or give a longer text."
        )
    return ids[: count * seqlen].view(count, seqlen)


def _within_articles(lengths: list[int], seqlen: int) -> list[tuple[int, int]]:
    """(article, first token) of every window that lies within an article, in the order in which they are taken."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    drawn = []
    for article, length in enumerate(lengths):
        for turn, place in enumerate(torch.randperm(length // seqlen, generator=generator).tolist()):
            drawn.append((turn, torch.rand(1, generator=generator).item(), article, place * seqlen))
    return [(article, start) for _, _, article, start in sorted(drawn)]


def _sources(places: list[int], articles: list[Tensor], seqlen: int) -> list[int]:
    """What windows at these places of the whole text are from: the article they begin in, or a block, or their own."""
    if len(articles) > 1:
        ends = torch.tensor([len(a) for a in articles]).cumsum(0)
        return torch.searchsorted(ends, torch.tensor(places) * seqlen, right=True).tolist()
    return [i // BLOCK if len(places) >= 8 * BLOCK else i for i in range(len(places))]
