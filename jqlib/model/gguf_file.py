"""A GGUF file is read rightly or not at all: what transformers' reader would drop without a word is refused.

Its metadata decide what is computed (``<architecture>.*``), and so do its list of tensors and how its tokenizer splits
text; other entries pass, unless they look like one of these that is missing: a damaged name, read as the default.
"""

import json
import struct
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType, Keys, get_tensor_name_map
from tokenizers import normalizers, pre_tokenizers
from torch import nn
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from jqlib.model.families import head_dim_in

NEUTRAL = {  # entries that change nothing at these values
    "rope.scaling.type": ("none",), "rope.scaling.factor": (0, 1), "rope.scale_linear": (1,), "expert_count": (0,),
    "expert_used_count": (0,), "attention.causal": (True,), "attention.sliding_window": (0,),
}  # fmt: skip
TOKENIZERS = frozenset(name for name in vars(Keys.Tokenizer).values() if str(name).startswith("tokenizer."))
LIST = "a list"
HEAD_DIMS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
SMOLLM = "smollm"  # digits one by one, then GPT-2's splits: transformers has no entry for it
OURS = ("llama-bpe", "qwen2", "tekken")  # those that are written: of several names for one way, llama.cpp's own
SPLITS = (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2", SMOLLM)  # those that are read rightly


def check_gguf(path: Path, config) -> None:
    """Raises ValueError, naming it, for what a GGUF file says and the ``config`` that was made from it does not."""
    d = head_dim_in(config)
    found = _header(path, path.stat().st_mtime_ns)[0]
    if (parts := found.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model: join them by llama.cpp's llama-gguf-split --merge"
        )
    architecture = found["general.architecture"]
    read = GGUF_CONFIG_MAPPING.get(architecture, {})
    expected = {f"{architecture}.{entry}" for entry in read} | TOKENIZERS
    for name, value in found.items():
        if name not in expected and (close := get_close_matches(name, expected - found.keys(), 1, 0.9)):
            raise ValueError(f"{path} has an entry {name} and none {close[0]}: is it damaged? Fetch it again")
        prefix, _, entry = name.partition(".")
        known = read.get(entry) or value in NEUTRAL.get(entry, ()) or (entry in HEAD_DIMS and value == d)
        if prefix == architecture and not known:
            raise ValueError(f"{path} has {name} = {value}, which would be dropped: its predictions would be others. "
                             "Give the model as a folder in Hugging Face's layout")  # fmt: skip


def check_tensors(path: Path, model: nn.Module) -> None:
    """Raises ValueError unless a GGUF file has the tensors of the ``model`` that was loaded from it, and no others."""
    values, tensors = _header(path, path.stat().st_mtime_ns)
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == values["general.architecture"])
    names = get_tensor_name_map(kind, model.config.num_hidden_layers)
    expected = {names.get_name(name, (".weight", ".bias")) for name, _ in model.named_parameters()}
    for problem, which in (
        ("lacks", expected - tensors),
        ("has a use for only some of its tensors, not for", tensors - expected),
    ):
        if which:
            raise ValueError(f"{path} {problem} {', '.join(sorted(which)[:3])} ({len(which)} in all)")


def check_tokenizer(path: Path, tokenizer) -> None:
    """Raises ValueError for a way to split text that is not known. Sets what transformers has not: SmolLM's splits, and
    whether one of sentencepiece's kind puts a space before text, as llama.cpp does: always, or never."""
    found = _header(path, path.stat().st_mtime_ns)[0]
    pre = found.get("tokenizer.ggml.pre", "default")
    if found.get("tokenizer.ggml.model") == "llama":
        space = [normalizers.Prepend("▁")] if found.get("tokenizer.ggml.add_space_prefix", True) else []
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
        tokenizer.backend_tokenizer.pre_tokenizer = None
    if found.get("tokenizer.ggml.model") != "gpt2":
        return
    if pre not in SPLITS:
        raise ValueError(f"{path} splits text in a way not known here (tokenizer.ggml.pre = {pre!r}): its tokens would "
                         "be others. Give a folder that has the model's tokenizer.json")  # fmt: skip
    if pre == SMOLLM:
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)


def splits_of(tokenizer) -> str:
    """How a tokenizer splits text, by GGUF's name for it. Raises ValueError for a way not known here."""
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    found, kind = known["pre_tokenizer"] or {}, known["model"]["type"]
    steps = [step for step in found.get("pretokenizers", [found]) if step]
    kinds = [step["type"] for step in steps]
    if kind == "BPE" and kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    if kind == "BPE" and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return SMOLLM
    if kind == "BPE" and kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated":
        for name in OURS:
            if GGUF_PRE_TOKENIZER_SPLITS[name] == steps[0]["pattern"].get("Regex"):
                return name
    raise ValueError(
        f"a tokenizer of kind {kind} that splits text by {', '.join(kinds) or 'nothing'} in a way of its own can't be "
        f"written as GGUF here: known are {', '.join(('gpt-2', SMOLLM, *OURS))}"
    )


@cache
def _header(path: Path, written: int) -> tuple[dict, frozenset[str]]:
    """The metadata of a file, LIST for lists, and the names of its tensors."""
    try:
        reader = GGUFReader(path)
        fields = [field for field in reader.fields.values() if not field.name.startswith("GGUF")]
        values = {f.name: LIST if f.types[0] == GGUFValueType.ARRAY else f.contents() for f in fields}
        return values, frozenset(tensor.name for tensor in reader.tensors)
    except (ValueError, struct.error, IndexError, KeyError) as error:
        raise ValueError(f"{path} can't be read, is it damaged or incomplete? The reader said: {error}") from error
