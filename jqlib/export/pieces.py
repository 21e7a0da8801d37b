"""A tokenizer of sentencepiece's kind, such as Llama-2's, as llama.cpp makes its tokens: by a score for each piece.

Hugging Face's has an order of merges (pairs) instead. Both join neighbours, one pair at a time: the first in the order
there, the one whose piece scores highest here, the leftmost of equals. So a piece's score is the place of its merges.
"""

from collections.abc import Iterator
from itertools import pairwise

from tokenizers import Tokenizer

SPACE = "▁"
BYTES = {f"<0x{i:02X}>" for i in range(256)}
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
META = {"type": "Metaspace", "replacement": SPACE, "split": False}
# What becomes of text before pairs are joined, and whether llama.cpp is to put a space before it. It always does, then,
# as sentencepiece does: Metaspace puts none before a text that has one, and with "first" none behind a special token.
PREPARED = (
    ([PREPEND, REPLACE], True), ([META | {"prepend_scheme": "first"}], True),
    ([META | {"prepend_scheme": "always"}], True), ([REPLACE], False), ([META | {"prepend_scheme": "never"}], False),
)  # fmt: skip


def in_pieces(said: dict) -> bool:
    """Whether a tokenizer is of this kind, from its tokenizer.json."""
    return said["model"]["type"] == "BPE" and bool(said["model"]["byte_fallback"])


def takes_a_space(said: dict) -> bool:
    """Whether text gets a space before it. Raises ValueError if more is done to it, which llama.cpp would not do."""
    normalizer, splits = said["normalizer"] or {}, said["pre_tokenizer"] or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splits.get("pretokenizers", [splits])]
    steps = [step for step in steps if step]
    for known, space in PREPARED:
        if steps == known:
            return space
    kinds = ", ".join(step["type"] for step in steps) or "nothing"
    raise ValueError(f"a tokenizer in pieces that prepares text by {kinds} in a way of its own: llama.cpp would not")


def scores_of(tokenizer: Tokenizer, said: dict) -> dict[str, float]:
    """By piece, of those that are joined from two. Raises ValueError unless llama.cpp's tokens would be the same."""
    model, added = said["model"], {token["content"] for token in said["added_tokens"]}
    order = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    known, pieces = {*order}, model["vocab"].keys() - added
    missing = next((f"{a} {b}" for a, b in _pairs(pieces) if (a, b) not in known), None)
    wrong = {
        "it lacks some of the 256 bytes": BYTES - pieces,
        "it takes a word that is a token, merges or not": model["ignore_merges"],
        "it marks where words end or go on": model["continuing_subword_prefix"] or model["end_of_word_suffix"],
        f"its merges lack {missing!r}, of which llama.cpp would make a token": missing,
    }
    for what in (what for what, found in wrong.items() if found):
        raise ValueError(f"a tokenizer in pieces can't be written as GGUF here: {what}")
    scores = _by_place(order)
    repeated = {piece[0] for piece in scores if piece == 2 * piece[0]}
    runs = [letter * n for letter in repeated for n in range(3, 2 * max(map(len, scores)))]
    for text in (*scores, *runs):
        if [token.value for token in tokenizer.model.tokenize(text)] != joined(text, scores):
            raise ValueError(f"a tokenizer in pieces can't be written as GGUF here: of {text!r} llama.cpp makes others")
    return scores


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """What llama.cpp makes of a text: the neighbours that score highest are joined, of equals the first, until none."""
    parts = list(text)
    while pairs := [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        i = -max(pairs)[1]
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return parts


def _pairs(pieces: set[str]) -> Iterator[tuple[str, str]]:
    """All pairs that make a piece: of pieces, or of single letters, which are there before anything is joined."""
    for piece in pieces:
        for i in range(1, len(piece)):
            pair = piece[:i], piece[i:]
            if all(part in pieces or len(part) == 1 for part in pair):
                yield pair


def _by_place(order: list[tuple[str, str]]) -> dict[str, float]:
    """The place of a piece's first merge, less than 0; one for several pieces whose merges are mixed, as runs' are."""
    last = {a + b: place for place, (a, b) in enumerate(order)}
    scores, start, end = {}, 0, -1
    for place, (a, b) in enumerate(order):
        start = place if place > end else start
        end = max(end, last[a + b])
        scores[a + b] = -float(start)
    return scores
