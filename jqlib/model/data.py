"""Text to token windows: calibration data and evaluation windows."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from jqlib.choices import Draw, Split, check_choice
from jqlib.model import embedded

HUB = {  # name -> (repository, files of each split)
    "wikitext2": (
        "Salesforce/wikitext",
        {
            "calibration": "wikitext-2-raw-v1/train-*.parquet",
            "validation": "wikitext-2-raw-v1/validation-*.parquet",
            "test": "wikitext-2-raw-v1/test-*.parquet",
        },
    ),
    "c4": (
        "allenai/c4",
        {
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-train.00001-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
}
C4_ROWS = 10_000  # of one shard: enough for 128 windows of 2048
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


def load_articles(dataset: str, split: str) -> list[str]:
    """The ``calibration``, ``validation`` or ``test`` text of a data set: its articles, or one string of all rows.

    Rows are joined by a blank line. A text file is the same for every split.
    """
    if dataset == embedded.CORPUS:
        return embedded.corpus_articles(split)
    if dataset == embedded.NEWS:
        return embedded.news_reports(split)
    if dataset in HUB:
        return [_hub_text(dataset, split)]
    path = Path(dataset).expanduser()
    if path.is_dir():
        return [_folder_text(path, split)]
    if path.is_file():
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"data set {dataset} is not a UTF-8 text file ({error})") from error
    raise FileNotFoundError(
        f"data set {dataset!r} is unknown. Give {embedded.CORPUS!r}, {embedded.NEWS!r}, {', '.join(map(repr, HUB))}, "
        "a folder in the hub's layout (parquet) or a text file."
    )


def fingerprint(name: str | None) -> str:
    """Names, sizes and times of the files behind a local data set; a name that is no path stands for itself."""
    path = Path(name or "").expanduser()
    files = sorted(path.rglob("*.parquet")) if path.is_dir() and name else [path] if path.is_file() else []
    name = name or "default"
    return " ".join([name, *(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)])


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


def _hub_text(dataset: str, split: str) -> str:
    from datasets import load_dataset

    repository, files = HUB[dataset]
    try:
        rows = load_dataset(repository, data_files={"rows": files[split]}, split="rows", verification_mode="no_checks")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"data set {dataset!r} ({repository}) could not be had from the Hugging Face hub: {error}\n"
            f"Offline, give a local copy of it (a folder of parquet files), a text file or {embedded.CORPUS!r}."
        ) from error
    if dataset == "c4":
        rows = rows.select(range(min(C4_ROWS, len(rows))))
    return "\n\n".join(rows["text"])


def _folder_text(folder: Path, split: str) -> str:
    """Rows of a split's parquet files (train, validation, test) anywhere under the folder, of one configuration."""
    from datasets import load_dataset

    name = "train" if split == "calibration" else split
    files = sorted(f for f in folder.rglob("*.parquet") if re.match(rf"{name}\b", f.name) or f.parent.name == name)
    if not files:
        raise FileNotFoundError(
            f"{folder} has no {name} split: expected parquet files named {name}-*.parquet in it or below it"
        )
    configurations = sorted({f.parent for f in files})
    if len(configurations) > 1:
        raise ValueError(
            f"{folder} holds several configurations ({', '.join(c.name for c in configurations)}): "
            f"give the folder of one of them, such as {configurations[0]}"
        )
    rows = load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    if "text" not in rows.column_names:
        raise ValueError(f"{files[0]} has no column 'text': its columns are {', '.join(rows.column_names)}")
    return "\n\n".join(rows["text"])
