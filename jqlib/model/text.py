"""Data sets by name, folder or file: their text, or an error that names the file that can't be right."""

import json
import re
from pathlib import Path

from pyarrow import ArrowInvalid, parquet

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
RECORDS = {".jsonl": "braces and quotes", ".json": "braces and quotes", ".csv": "commas", ".tsv": "columns",
           ".parquet": "bytes", ".html": "tags", ".xml": "tags", ".gz": "bytes", ".zip": "bytes", ".zst": "bytes",
           ".xz": "bytes", ".bz2": "bytes", ".pdf": "bytes", ".docx": "bytes"}  # fmt: skip
C4_ROWS = 10_000  # of one shard: enough for 128 windows of 2048


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
        return [_plain_text(path)]
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


def _plain_text(path: Path) -> str:
    """What a text file says, without a byte order mark; a file of records or of another encoding is refused."""
    if path.suffix.lower() in RECORDS:
        holds = RECORDS[path.suffix.lower()]
        raise ValueError(f"data set {path} is a {path.suffix} file: its {holds} would be read as text. Give the text "
                         "alone, or a folder of parquet files with a column 'text'")  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data set {path} is not a UTF-8 text file ({error}). Convert it first") from error
    if "\0" in text:
        raise ValueError(f"data set {path} has zero bytes: it is not UTF-8 text (UTF-16, perhaps). Convert it first")
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first.lstrip().startswith(("{", "[")) and _is_json(first):
        raise ValueError(
            f"data set {path} begins with a line of JSON, which would be read as text. Give the text alone"
        )
    return text


def _is_json(line: str) -> bool:
    """A record, or a list of more than numbers: ``[1]`` begins a text."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) or any(isinstance(value, dict | list | str) for value in found)


def _folder_text(folder: Path, split: str) -> str:
    """Rows of a split's parquet files (train, validation, test) anywhere under the folder, of one configuration."""
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
    return "\n\n".join(row for file in files for row in _rows(file))


def _rows(file: Path) -> list[str]:
    """The column "text" of a parquet file. ValueError unless it is one, of text."""
    try:
        table = parquet.ParquetFile(file).read()
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} can't be read as parquet ({error}). Is the download whole?") from error
    if "text" not in table.column_names:
        raise ValueError(f"{file} has no column 'text': its columns are {', '.join(table.column_names)}")
    rows = table["text"].to_pylist()
    if (wrong := next((i for i, row in enumerate(rows) if not isinstance(row, str)), None)) is not None:
        raise ValueError(f"{file}: row {wrong} of column 'text' is {str(rows[wrong])[:40]!r}, a "
                         f"{type(rows[wrong]).__name__}, not text")  # fmt: skip
    return rows
