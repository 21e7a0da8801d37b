"""GGUF as llama.cpp and transformers read it: every family's predictions, every kind of tokenizer's tokens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from test_export import loaded, logits_of, measured, small  # noqa: F401
from test_families import random_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from jqlib import get_model, get_tokenizer
from jqlib.export import run_gguf
from jqlib.export.can import ARCHITECTURES
from jqlib.export.export import export
from jqlib.export.gguf_tokenizer import check_tokenizer
from jqlib.quant.packed import rounded_linears

needs_llama_cpp = pytest.mark.skipif(not run_gguf.installed(), reason="the extra run is not installed")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "sliding_window": None, "attention_bias": False, "mlp_bias": False}  # fmt: skip
PIECES = ("▁▁", "▁t", "th", "he", "▁th", "▁▁▁▁", "▁the", "the", "qu", "ck", "▁▁▁", "er", "▁qu", "ick", "00", "==",
          "12", "▁d", "===", "日本", "é", "ox", "fox", "▁f", "[I", "aba", "ab", "ba", "INST", "IN", "ST")  # fmt: skip
TIED = ("llama", "qwen2", "smollm3")
LETTERS = "▁abcdefghijklmnopqrstuvwxyzTHINS[]/.,=0123456789日本"
TEXTS = ("The quick brown fox", " leading", "  two", "a  b   c    d     e", "\n\nlines\n x", "\ttab", "12000 3.14",
         "日本語 テスト", "🎉🚀 ça é", "", "=" * 37, " " * 41 + "x", "abaababa", "x" + " " * 19, "\u00a0\r\n",
         "<s>[INST] hi [/INST] ok </s><s>[INST] x", "▁▁ x", "<0x0A>", "\x00\x01")  # fmt: skip
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def in_pieces(normalizer=PREPEND, pre=None, pieces=PIECES, merges=None, added=(), **more) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *LETTERS, *pieces]
    vocab = {word: i for i, word in enumerate(words)}
    if merges is None:
        merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **more))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    specials = [AddedToken(word, normalized=False, special=True) for word in ("<unk>", "<s>")]
    backend.add_special_tokens([*specials, *(added or [AddedToken("</s>", normalized=False, special=True)])])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def metaspace(scheme: str, split: bool = False):
    return pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)


def said_by_llama_cpp(function: str, *arguments):
    """What a function of tests/export/llama_library.py says, in a process of its own."""
    call = f"import json, sys, llama_library; print(json.dumps(llama_library.{function}(*json.load(sys.stdin))))"
    done = subprocess.run([sys.executable, "-c", call], input=json.dumps(arguments), capture_output=True, text=True,
                          errors="replace", cwd=Path(__file__).parent / "export")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def written(small, tmp_path):  # noqa: F811
    """``written(kind, tokenizer, shape, **settings)``: the run's config, and its GGUF, in float16 unless told."""

    def make(kind="llama", tokenizer=None, shape=None, **settings):
        folder = tmp_path / "model"
        tokenizer = tokenizer or in_pieces()
        more = {"vocab_size": len(tokenizer), "num_hidden_layers": 4 if kind == "smollm3" else 2}
        more |= {"use_sliding_window": False} if kind == "qwen2" else {}
        random_model(kind, **(SHAPE | more | (shape or {}))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
        config = small(kind, **({"recipe": "rtn", "w_bits": 16, "a_bits": 16} | settings))
        export(config, "gguf", tmp_path / "to")
        return config, str(tmp_path / "to" / "model.gguf")

    return make


@needs_llama_cpp
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_predicts_what_we_predict(written, byte_tokenizer, kind):
    """On windows of random tokens, and behind a prompt, greedy. Weights in float16: where they are codes, it rounds
    activations too, in its own way."""
    config, path = written(kind, byte_tokenizer, {"tie_word_embeddings": kind in TIED})
    model, windows = measured(config), torch.randint(90, (2, 48), generator=torch.Generator().manual_seed(0))
    logits = logits_of(model, windows)[:, :-1]
    ours = cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)
    nll, choices = zip(*said_by_llama_cpp("predicted", path, windows.tolist(), model.vocab_size), strict=True)
    torch.testing.assert_close(torch.tensor(nll), ours, rtol=1e-3, atol=0)
    assert (torch.tensor(choices) == logits.argmax(-1)).float().mean() > 0.97  # float16 decides between two alike
    told = run_gguf.run_gguf(path, "The quick brown", tokens=3, threads=1)
    ids = byte_tokenizer("The quick brown", return_tensors="pt").input_ids
    after = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)[0, ids.shape[1] :]
    assert told["text"] == byte_tokenizer.decode(after)
    assert told["tokens_a_second"] > 0


@pytest.mark.parametrize("kind", ["smollm3", "phi3"])
def test_codes_are_in_the_file(written, kind):
    config, path = written(kind, recipe="deploy", w_bits=4, a_bits=8)
    model, stored = measured(config), {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    names = {"smollm3": ("mlp.up_proj",), "phi3": ("mlp.gate_up_proj.gate_proj", "mlp.gate_up_proj.up_proj")}[kind]
    linears = [model.get_submodule(f"model.layers.1.{name}") for name in names]
    up = stored["blk.1.ffn_up.weight"]
    found = torch.from_numpy(dequantize(up.data, up.tensor_type))
    assert torch.equal(found, torch.cat([linear.weight for linear in linears]))


def test_transformers_reads_phi3(written, tokens):
    """It knows no SmolLM3 in a GGUF."""
    config, path = written("phi3", recipe="deploy", w_bits=4, a_bits=8, shape={"tie_word_embeddings": True})
    model, read = measured(config), get_model(path, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "transform"):
            module.transform.grid.bits = 16
    for name, linear in rounded_linears(model).items():
        assert torch.equal(read.get_submodule(name).weight, linear.weight), name
    expected = logits_of(model, tokens())
    assert (logits_of(read, tokens()) - expected).abs().max() < 1e-2 * expected.abs().max()  # float16 embeddings


@needs_llama_cpp
@pytest.mark.parametrize(("normalizer", "pre"), [
    (PREPEND, None), (normalizers.Replace(" ", "▁"), None), (None, metaspace("never")),
])  # fmt: skip
def test_llama_cpp_makes_the_same_tokens(written, tmp_path, normalizer, pre):
    tokenizer = in_pieces(normalizer, pre)
    _, path = written(tokenizer=tokenizer)
    theirs = said_by_llama_cpp("tokens_of", path, TEXTS)
    alone = shutil.copy(path, tmp_path / "alone.gguf")  # with no tokenizer.json beside it
    read = get_tokenizer(str(alone))
    for text, found in zip(TEXTS, theirs, strict=True):
        assert found == tokenizer(text).input_ids == read(text).input_ids, text


@needs_llama_cpp
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_differs_at_a_space_in_front_alone(written, scheme):
    """transformers' own way for Llama-2: a text with a space in front gets no second one. llama.cpp, as sentencepiece
    does, puts one before every text, and behind special tokens."""
    tokenizer, as_sentencepiece = in_pieces(None, metaspace(scheme)), in_pieces(PREPEND)
    _, path = written(tokenizer=tokenizer)
    differ = set()
    for text, found in zip(TEXTS, said_by_llama_cpp("tokens_of", path, TEXTS), strict=True):
        assert found == as_sentencepiece(text).input_ids, text
        differ |= {text} if found != tokenizer(text).input_ids else set()
    behind = "<s>" if scheme == "first" else "never"
    assert differ == {text for text in TEXTS if text[:1] in (" ", "▁") or behind in text}


@needs_llama_cpp
def test_spaces_behind_phi3s_tokens_go(written):
    """llama.cpp drops them by the model's name: it is written where the tokenizer does so too."""
    added = [AddedToken(word, normalized=False, rstrip=word != "<|endoftext|>", special=word != "</s>")
             for word in ("</s>", "<|endoftext|>", "<|user|>", "<|end|>")]  # fmt: skip
    tokenizer = in_pieces(added=added)
    _, path = written("phi3", tokenizer)
    assert run_gguf.run_gguf(path, "the fox", tokens=2, threads=1)["tokens_a_second"] > 0
    texts = [*TEXTS, "<|user|>\n the fox<|end|>\n", "</s>  a <s>  b", "<|endoftext|>  c"]
    theirs = said_by_llama_cpp("tokens_of", path, texts)
    for text, found in zip(texts, theirs, strict=True):
        assert found == tokenizer(text).input_ids, text


@needs_llama_cpp
@pytest.mark.parametrize(("whole", "name"), [(True, "llama-bpe"), (False, "smaug-bpe")])
def test_a_word_that_is_a_token(written, whole, name):
    """Llama-3's splits, with and without its taking a word that is a token, merges or not (SmolLM3 goes without)."""
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ", "th", "fox", "<|end|>"]
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, [("t", "h")], ignore_merges=whole))
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    _, path = written("smollm3", tokenizer)
    assert GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    texts = ["fox", "the fox", "foxes 123"]
    assert said_by_llama_cpp("tokens_of", path, texts) == [tokenizer(text).input_ids for text in texts]


MERGES = [("t", "h"), ("th", "e")]  # without (t, he): he is a piece of its own


@pytest.mark.parametrize(("changes", "message"), [
    ({"pieces": ("th", "he", "the"), "merges": [*MERGES, ("h", "e")]}, "its merges lack 't he', of which"),
    ({"pieces": ("th", "thi"), "merges": [("t", "h")]}, "its merges lack 'th i'"),
    ({"ignore_merges": True}, "it takes a word that is a token, merges or not"),
    ({"end_of_word_suffix": "</w>"}, "it marks where words end or go on"),
    ({"normalizer": normalizers.NFKC()}, "prepares text by NFKC in a way of its own"),
    ({"normalizer": None, "pre": metaspace("first", split=True)}, "prepares text by Metaspace in a way of its own"),
    ({"added": [AddedToken("</s>", lstrip=True, normalized=False)]}, "its token '</s>' takes spaces along"),
    ({"added": [AddedToken("</s>", rstrip=True, normalized=False)]}, "its token '</s>' takes spaces along"),
    ({"added": [AddedToken("</s>", normalized=True)]}, "or is found in changed text"),
])  # fmt: skip
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_tokenizer(in_pieces(**changes))


@pytest.mark.parametrize(("kind", "shape", "message"), [
    ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, "its layers without RoPE are others than each 4th"),
    ("smollm3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "of type 'linear'"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor":
              [2.0] * 8, "original_max_position_embeddings": 128}}, "RoPE is of type 'longrope'; written are default"),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "turns a part of each head, 0.5"),
    ("phi3", {"head_dim": 32}, "its heads have 128 channels together and it has 64"),
    ("phi3", {"sliding_window": 16}, "sliding windows"),
])  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(written, tmp_path, kind, shape, message):
    with pytest.raises(ValueError, match=message):
        written(kind, shape=shape)
    assert not (tmp_path / "out").exists()
