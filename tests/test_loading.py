"""All weights in, all weights used, all that a GGUF says understood: or an error that names what is not."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from jqlib.model.load import get_model, get_tokenizer, load_config

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, tiny_model):
    """``folder(change)``: a saved tiny model whose tensors and config ``change(tensors, config)`` has changed."""

    def make(change=lambda tensors, config: None):
        tiny_model().save_pretrained(tmp_path)
        file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
        tensors, values = load_file(file), json.loads(config.read_text())
        change(tensors, values)
        save_file(tensors, file, {"format": "pt"})
        config.write_text(json.dumps(values))
        return str(tmp_path)

    return make


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t, c: t.pop(UP), f"weights that its config needs are not in its files: {UP}"),
    (lambda t, c: c.update(tie_word_embeddings=False), "not in its files: lm_head.weight"),
    (lambda t, c: c.update(num_hidden_layers=3), r"needs are not in its files: model.layers.2.* and \d more"),
    (lambda t, c: c.update(num_hidden_layers=1), r"weights in its files are not used by its config: model.layers.1"),
    (lambda t, c: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}), "not used by its config: .*up_proj.b"),
    (lambda t, c: t.update({"extra": torch.ones(2)}), "not used by its config: extra"),
])  # fmt: skip
def test_weights_missing_or_unused(folder, change, message):
    with pytest.raises(ValueError, match=message):
        get_model(folder(change))


def test_a_whole_folder_loads(folder, tiny_model, tokens):
    assert torch.equal(get_model(folder())(tokens()).logits, tiny_model()(tokens()).logits)


@pytest.fixture
def gguf(tmp_path, tiny_model):
    """``gguf(entries, tensors)``: a tiny Llama as a GGUF file, these besides or instead; None: without."""

    def make(entries=None, tensors=None, dropped=()):
        model = tiny_model()
        shape = model.config
        writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
        values = {
            "llama.block_count": 2, "llama.context_length": 256, "llama.embedding_length": 48,
            "llama.feed_forward_length": 96, "llama.attention.head_count": 6, "llama.attention.head_count_kv": 2,
            "llama.rope.dimension_count": 8, "llama.rope.freq_base": 1e4, "llama.vocab_size": 128,
            "llama.attention.layer_norm_rms_epsilon": shape.rms_norm_eps, "general.name": "tiny",
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        } | (entries or {})  # fmt: skip
        for name, value in values.items():
            if value is None:
                continue
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
            add[type(value)](name, value)
        writer.add_token_list([chr(33 + i) if i < 94 else f"!{chr(i - 61)}" for i in range(128)])
        writer.add_token_merges(["! !"])
        writer.add_token_types([1] * 128)
        for name, tensor in {**model.state_dict(), **(tensors or {})}.items():
            for ours, theirs in GGUF_NAMES.items():
                name = name.replace(ours, theirs)
            if name not in (*dropped, "lm_head.weight"):
                heads = 6 if "attn_q" in name else 2 if "attn_k" in name else 0
                if heads and tensor.ndim == 2:  # llama.cpp's order of the rows that RoPE turns
                    tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
                writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(tmp_path / "tiny.gguf")

    return make


def test_a_gguf_that_is_understood_loads(gguf, tiny_model, tokens):
    path = gguf({"llama.attention.key_length": 8, "llama.rope.scaling.type": "none", "general.author": "someone"})
    torch.testing.assert_close(get_model(path)(tokens()).logits, tiny_model()(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert get_tokenizer(path).vocab_size == 128


@pytest.mark.parametrize(("entries", "message"), [
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.type = linear"),
    ({"llama.attention.sliding_window": 512}, "llama.attention.sliding_window = 512, which would be dropped"),
    ({"llama.attention.key_length": 16}, "llama.attention.key_length = 16"),
    ({"llama.expert_count": 8}, "llama.expert_count = 8"),
    ({"llama.a_new_thing": True}, "llama.a_new_thing = True"),
    ({"split.count": 3}, "is one of 3 parts of a model: join them"),
    ({"llama.rope.freq_base": None, "xlama.rope.freq_base": 5e5}, "xlama.rope.freq_base and none llama.rope.freq_base"),
    ({"tokenizer.ggml.add_space_prefiy": False}, "is it damaged"),
])  # fmt: skip
def test_metadata_that_would_be_dropped(gguf, entries, message):
    path = gguf(entries)
    for load in (load_config, get_model):
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(("tensors", "dropped", "message"), [
    ({"rope_freqs.weight": torch.ones(4)}, (), r"not for rope_freqs.weight \(1 in all\)"),
    ({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, (), "not for blk.0.attn_q.bias"),
    ({}, ("blk.1.ffn_up.weight",), "lacks blk.1.ffn_up.weight"),
])  # fmt: skip
def test_tensors_that_would_be_dropped_or_made_up(gguf, tensors, dropped, message):
    with pytest.raises(ValueError, match=message):
        get_model(gguf({}, tensors, dropped))


def test_an_unknown_way_to_split_text(gguf):
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre = 'brand-new'.* tokens would be others. Give a folder"):
        get_tokenizer(gguf({"tokenizer.ggml.pre": "brand-new"}))
