"""A tokenizer in a GGUF: byte-level BPE, by GGUF's name for how it splits text, or one in pieces, by their scores."""

import json

from gguf import GGUFWriter, TokenType

from jqlib.export.pieces import BYTES, in_pieces, scores_of, takes_a_space
from jqlib.model.gguf_file import splits_of

WHOLE_WORDS = {"llama-bpe": "smaug-bpe", "tekken": None}  # llama.cpp takes a word that is a token; the name if not so
PHI3 = "phi-3"  # by this name llama.cpp drops spaces behind added tokens, but for
KEEP_SPACES = {"<unk>", "<s>", "<|endoftext|>"}


def check_tokenizer(tokenizer) -> None:
    """Raises ValueError for a tokenizer whose tokens llama.cpp would not make."""
    said = _said(tokenizer)
    _name_by_spaces(said)
    if in_pieces(said):
        takes_a_space(said)
        scores_of(tokenizer.backend_tokenizer, said)
    else:
        _splits(tokenizer, said)


def add_tokenizer(writer: GGUFWriter, tokenizer, vocabulary: int) -> None:
    """``vocabulary``: how many rows the embedding has; those behind the tokens are unused."""
    said, words = _said(tokenizer), {i: word for word, i in tokenizer.get_vocab().items()}
    tokens = [words.get(i, f"[unused {i}]") for i in range(vocabulary)]
    pieces = in_pieces(said)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _splits(tokenizer, said))
    writer.add_token_list(tokens)
    writer.add_token_types(_kinds(tokenizer, words, vocabulary, pieces))
    if pieces:
        scores = scores_of(tokenizer.backend_tokenizer, said)
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(takes_a_space(said))
    else:
        merges = said["model"]["merges"]
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    if name := _name_by_spaces(said):
        writer.add_name(name)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _said(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _splits(tokenizer, said: dict) -> str:
    """GGUF's name for how text is split, and for whether a word that is a token is one without merges."""
    name = splits_of(tokenizer)
    if said["model"]["ignore_merges"] == (name in WHOLE_WORDS):
        return name
    if (plain := WHOLE_WORDS.get(name)) is None:
        raise ValueError(f"a tokenizer that splits text as {name!r} has another ignore_merges in llama.cpp")
    return plain


def _kinds(tokenizer, words: dict[int, str], vocabulary: int, pieces: bool) -> list[TokenType]:
    added, special = tokenizer.added_tokens_decoder, {*tokenizer.all_special_ids}
    return [
        TokenType.UNUSED if i not in words
        else TokenType.CONTROL if i in special or (i in added and added[i].special)
        else TokenType.USER_DEFINED if i in added
        else TokenType.BYTE if pieces and words[i] in BYTES else TokenType.NORMAL
        for i in range(vocabulary)
    ]  # fmt: skip


def _name_by_spaces(said: dict) -> str | None:
    """The model's name by which llama.cpp treats spaces at added tokens as the tokenizer does; None if it keeps them.
    Raises ValueError if there is none."""
    added = {token["content"]: token for token in said["added_tokens"]}
    dropping = {word for word, token in added.items() if token["rstrip"]}
    name = PHI3 if dropping and dropping == added.keys() - KEEP_SPACES and {*KEEP_SPACES, "</s>"} <= {*added} else None
    other = {word for word, token in added.items() if token["lstrip"] or token["single_word"] or
             (token["normalized"] and said["normalizer"] and in_pieces(said))}  # fmt: skip
    if other := other or (set() if name else dropping):
        raise ValueError(f"its token {min(other)!r} takes spaces along, or is found in changed text, which llama.cpp "
                         "would not do")  # fmt: skip
    return name
