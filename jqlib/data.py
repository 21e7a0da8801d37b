"""Text to token windows: calibration data and evaluation windows."""

import re
from pathlib import Path

import torch

from jqlib import embedded

HUB = {  # name -> (repository, files of the split we calibrate on, files of the split we test on)
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-*.parquet",
        "wikitext-2-raw-v1/test-*.parquet",
    ),
    "c4": (
        "allenai/c4",
        "en/c4-train.00000-of-01024.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
    ),
}
C4_ROWS = 10_000  # of one shard: enough for 128 windows of 2048


def get_calibration_data(
    tokenizer,
    nsamples: int = 128,
    seqlen: int = 2048,
    dataset: str | None = None,
    seed: int = 0,
    *,
    least: int | None = None,
) -> torch.Tensor:
    """Token windows to calibrate on: int64, (nsamples, seqlen).

    The text of the calibration split is tokenised as one piece without BOS and cut into windows
    that do not overlap; ``seed`` chooses which. ``dataset``: ``"wiki"`` (embedded), ``"wikitext2"``,
    ``"c4"``, a folder in the hub's layout (parquet) or a text file; by default ``"wiki"`` for the
    embedded model and ``"wikitext2"`` for any other.

    Raises ValueError when the text holds fewer windows than asked; where ``least`` are enough, there may be fewer.
    """
    windows = _windows(tokenizer, dataset, "calibration", seqlen, nsamples if least is None else least)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:nsamples]]


def get_evaluation_windows(tokenizer, dataset: str | None = None, seqlen: int = 2048, max_windows: int | None = None):
    """The first ``max_windows`` (None: all) windows of the test split: int64, (windows, seqlen)."""
    return _windows(tokenizer, dataset, "test", seqlen, 1 if max_windows is None else max_windows)[:max_windows]


def load_text(dataset: str, split: str) -> str:
    """One string: the ``calibration`` or the ``test`` text of a data set, rows joined by a blank line."""
    if dataset == embedded.CORPUS:
        return embedded.corpus_text(split)
    if dataset in HUB:
        return _hub_text(dataset, split)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _folder_text(path, split)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data set {dataset} is not a UTF-8 text file ({error})") from error
    raise FileNotFoundError(
        f"data set {dataset!r} is unknown. Give {embedded.CORPUS!r}, {', '.join(map(repr, HUB))}, "
        "a folder in the hub's layout (parquet) or a text file."
    )


def path_fingerprint(name: str) -> str:
    """Names, sizes and times of the files behind a local path; a name that is no path stands for itself."""
    path = Path(name).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return " ".join([name, *(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)])


def _windows(tokenizer, dataset: str | None, split: str, seqlen: int, wanted: int) -> torch.Tensor:
    if seqlen < 2 or wanted < 1:
        raise ValueError(f"{wanted} windows of {seqlen} tokens: at least 1 window and 2 tokens are needed")
    dataset = dataset or getattr(tokenizer, "default_dataset", "wikitext2")
    ids = tokenizer(load_text(dataset, split), add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // seqlen
    if count < wanted:
        raise ValueError(
            f"the {split} text of {dataset!r} has {len(ids):,} tokens: {count} windows of {seqlen}, but {wanted} "
            "were asked for. Ask for fewer or shorter windows, or give a longer text."
        )
    return torch.tensor(ids[: count * seqlen]).view(count, seqlen)


def _hub_text(dataset: str, split: str) -> str:
    from datasets import load_dataset

    repository, train, test = HUB[dataset]
    files = {"rows": train if split == "calibration" else test}
    try:
        rows = load_dataset(repository, data_files=files, split="rows", verification_mode="no_checks")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"data set {dataset!r} ({repository}) could not be had from the Hugging Face hub: {error}\n"
            f"Offline, give a local copy of it (a folder of parquet files), a text file or {embedded.CORPUS!r}."
        ) from error
    if dataset == "c4":
        rows = rows.select(range(min(C4_ROWS, len(rows))))
    return "\n\n".join(rows["text"])


def _folder_text(folder: Path, split: str) -> str:
    """Rows of ``train*.parquet`` or ``test*.parquet`` anywhere under the folder, of one configuration only."""
    from datasets import load_dataset

    name = "train" if split == "calibration" else "test"
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
