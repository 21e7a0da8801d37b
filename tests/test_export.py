"""What is exported is what was measured, read back by others; what a form can't say is refused before any work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from test_families import KINDS, random_model
from transformers import AutoModelForCausalLM

from jqlib import get_model, load_model, pipeline, save_model
from jqlib.config import make_config
from jqlib.export.compressed import group_of
from jqlib.export.export import export
from jqlib.model.walk import walk
from jqlib.quant.packed import codes_of, rounded_linears
from jqlib.recipes import RECIPES
from jqlib.transform.hadamard import factors, hadamard_matrix

QUICK = {"profile": "quick", "nsamples": 2, "seqlen": 32, "max_tokens": 32, "eval_seqlen": 32, "eval_windows": 2,
         "refine_steps": 2, "step_tokens": 64}  # fmt: skip
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}  # multiples of 32


@pytest.fixture
def small(tmp_path, byte_tokenizer):
    """``small("llama", recipe="deploy", tie_word_embeddings=True)``: the run of a random model with a tokenizer."""

    def make(kind="llama", shape=None, **settings):
        folder = tmp_path / "model"
        if not folder.exists():
            random_model(kind, **(shape or {})).save_pretrained(folder)
            byte_tokenizer.save_pretrained(folder)
            (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
        text = str(tmp_path / "text.txt")
        files = {"model": str(folder), "output_dir": str(tmp_path / "out"), "calib_dataset": text, "eval_dataset": text}
        return make_config(QUICK | files | settings)

    return make


def logits_of(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def loaded(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **more).eval()


def measured(config):
    recipe = pipeline.recipe_of(config)
    config = pipeline.settled(config, recipe)
    return pipeline.quantised(config, recipe, config.w_bits, config.a_bits)


@pytest.mark.parametrize(("kind", "recipe"), [*((kind, "jointquant-best") for kind in KINDS),
                                              ("llama", "jointquant-online"), ("phi3", "rtn")])  # fmt: skip
def test_hf_computes_what_fp_does(small, tmp_path, tokens, kind, recipe):
    config = small(kind, recipe=recipe)
    export(config, "hf", tmp_path / "to")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "to", output_loading_info=True)
    assert not any(info.values())
    exact = logits_of(get_model(config.model), tokens())
    assert (logits_of(found, tokens()) - exact).abs().max() < 2e-5 * exact.abs().max()
    again = get_model(str(tmp_path / "to"))
    assert torch.equal(logits_of(again, tokens()), logits_of(get_model(str(tmp_path / "to")), tokens()))


RAGGED = {"recipe": "rtn", "w_groupsize": 20, "a_bits": 16}  # 48 = 2 · 20 + 8


@pytest.mark.parametrize(("kind", "settings"), [
    *((kind, {"recipe": "deploy"}) for kind in KINDS), ("llama", RAGGED), ("phi3", RAGGED), ("qwen3", RAGGED),
    ("llama", {"recipe": "rtn", "w_groupsize": 16, "w_bits": 8, "a_bits": 16}),
    ("qwen2", {"recipe": "rtn", "w_groupsize": 16, "a_bits": 4}),
])  # fmt: skip
def test_transformers_reads_compressed_tensors(small, tmp_path, tokens, kind, settings):
    config = small(kind, **settings)
    export(config, "compressed-tensors", tmp_path / "to")
    found, model = loaded(tmp_path / "to", dtype=torch.float32), measured(config)
    if config.recipe == "deploy":  # from 8 bits on the grid of activations is the engine's
        for module in model.modules():
            if hasattr(module, "transform"):
                module.transform.grid.bits = 16
    expected = logits_of(model, tokens())
    assert (logits_of(found, tokens()) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("width", "groupsize", "expected"), [
    (576, 128, 64), (1536, 128, 128), (48, 20, 4), (64, 128, 64), (96, 96, 96),
])  # fmt: skip
def test_groups_without_a_ragged_one(width, groupsize, expected):
    assert group_of(width, groupsize) == expected


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_holds_the_codes(small, tmp_path, tokens, kind, tied):
    shape = WIDE | {"tie_word_embeddings": tied, "sliding_window": None, "use_sliding_window": False}
    shape |= {"attention_bias": False, "mlp_bias": False}  # transformers' reader would drop Llama's: get_model refuses
    shape |= {"head_dim": 128} if kind == "qwen3" else {}  # which it takes for granted
    config = small(kind, shape, recipe="deploy")
    export(config, "gguf", tmp_path / "to")
    model = measured(config)
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "to" / "model.gguf").tensors}
    down = stored["blk.0.ffn_down.weight"]
    found = torch.from_numpy(dequantize(down.data, down.tensor_type))
    assert torch.equal(found, model.get_submodule("model.layers.0.mlp.down_proj").weight)
    for module in model.modules():
        if hasattr(module, "transform"):
            module.transform.grid.bits = 16
    read = get_model(str(tmp_path / "to" / "model.gguf"), dtype=torch.float32)
    for name, linear in rounded_linears(model).items():
        assert torch.equal(read.get_submodule(name).weight, linear.weight), name
    expected = logits_of(model, tokens())
    assert (logits_of(read, tokens()) - expected).abs().max() < 1e-2 * expected.abs().max()  # float16 embeddings


def test_gguf_holds_the_fp_model_in_float16(small, tmp_path):
    shape = {"attention_bias": False, "mlp_bias": False}
    config = small("llama", shape, recipe="rtn", w_bits=16, a_bits=16)
    export(config, "gguf", tmp_path / "to")
    read, model = get_model(str(tmp_path / "to" / "model.gguf"), dtype=torch.float32), get_model(config.model)
    for name, weight in model.named_parameters():
        assert torch.equal(read.get_parameter(name), weight.half().float() if weight.ndim == 2 else weight), name
    stored = {tensor.name for tensor in GGUFReader(tmp_path / "to" / "model.gguf").tensors}
    assert model.config.tie_word_embeddings
    assert "output.weight" not in stored  # the head is the embedding: it comes once


@pytest.mark.parametrize(("kind", "settings"), [
    *((kind, {"recipe": "jointquant-best", "w_groupsize": 20}) for kind in KINDS),
    ("llama", {"recipe": "jointquant-online", "kv_bits": 4}), ("qwen3", {"recipe": "jointquant-online", "kv_bits": 4}),
    ("llama", {"recipe": "rtn", "w_bits": 8, "a_bits": 6}), ("phi3", {"recipe": "quarot", "w_bits": 16}),
    ("llama", {"recipe": "jointquant-best", "dtype": "bfloat16"}),
])  # fmt: skip
def test_our_own_form_computes_what_was_measured(small, tmp_path, tokens, kind, settings):
    config, dtype = small(kind, **settings), settings.get("dtype", "float32")
    export(config, "jointquant", tmp_path / "to")
    found = loaded(tmp_path / "to", trust_remote_code=True, dtype=getattr(torch, dtype))
    expected = logits_of(measured(config), tokens()).float()
    near = 2e-3 if dtype == "float32" else 0.1  # a tie of rounding passed on
    assert (logits_of(found, tokens()).float() - expected).abs().mean() < near * expected.abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_of_our_own_form_computes_what_ours_does(small, tmp_path, tokens, kind):
    """Given the same, so that a tie of rounding is not passed on (tests/export/layer_by_layer.py: a real model)."""
    config = small(kind, recipe="jointquant-best")
    export(config, "jointquant", tmp_path / "to")
    found = loaded(tmp_path / "to", trust_remote_code=True, dtype=torch.float32)
    with torch.inference_mode():
        for step in walk(measured(config), tokens()):
            ours = step.run(step.hidden)
            theirs = found.get_submodule(step.name)(step.hidden, **step.arguments)
            apart = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)
            assert apart.median() < 1e-6
            assert (apart > 1e-5).sum() <= 1  # tokens with a tie of rounding


def test_our_own_form_generates_and_is_saved_whole(small, tmp_path, tokens):
    config = small(recipe="jointquant-best", kv_bits=4)
    export(config, "jointquant", tmp_path / "to")
    found = loaded(tmp_path / "to", trust_remote_code=True)
    model, start = measured(config), tokens(1, 8)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(start, **how), model.generate(start, **how))
    found.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits_of(again, tokens()), logits_of(found, tokens()))


def test_our_own_form_is_not_taken_for_another(small, tmp_path):
    export(small(recipe="quarot"), "jointquant", tmp_path / "to")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "to", trust_remote_code=False)


@pytest.mark.parametrize("order", [12, 28, 52, 128, 172])
def test_a_factor_is_its_own_matrix(order):
    assert factors(order) == (order,)
    assert hadamard_matrix(order).abs().eq(1).all()


def test_codes_are_read_from_the_folder_bit_by_bit(small, tmp_path):
    config = small(recipe="jointquant-best", w_groupsize=20)
    export(config, "jointquant", tmp_path / "to")
    found = loaded(tmp_path / "to", trust_remote_code=True)
    for name, linear in rounded_linears(measured(config)).items():
        assert torch.equal(found.get_submodule(name).weight, linear.weight), name
        assert codes_of(linear).abs().max() <= 8


@pytest.mark.parametrize(("form", "settings", "message"), [
    ("compressed-tensors", {"recipe": "jointquant-best"}, r"format 'compressed-tensors' can't hold recipe "
     r"'jointquant-best': Hadamard transforms would run online, and engines drop them without a word; the recipe made "
     r"for engines is deploy"),
    ("gguf", {"recipe": "quarot"}, "'quarot': Hadamard transforms would run online"),
    ("gguf", {"recipe": "rtn"}, "w_bits=4, a_bits=4: GGUF has weights of 4 bits here"),
    ("gguf", {"recipe": "rtn", "a_bits": 16, "w_groupsize": 48}, "48 is no multiple of 32"),
    ("compressed-tensors", {"recipe": "rtn", "w_bits": 3}, "w_bits=3: engines read 4 or 8"),
    ("compressed-tensors", {"recipe": "rtn", "kv_bits": 4}, r"kv_bits=4: its keys are rotated \(R3\)"),
    ("hf", {"recipe": "rtn", "stream": True, "refine_steps": 0}, "the whole model is written: leave out stream=True"),
    ("onnx", {}, "format='onnx'"),
])  # fmt: skip
def test_what_a_form_cannot_say(small, tmp_path, form, settings, message):
    config = small(**settings)
    with pytest.raises(ValueError, match=message):
        export(config, form, tmp_path / "to")
    assert not (tmp_path / "out").exists()  # nothing was calibrated


@pytest.mark.parametrize("changes", [{"a_clip": 0.9}, {"tune": True}, {"weights": "gptq", "layerwise": True}])
def test_clips_are_refused(small, tmp_path, changes):
    """Those that would be learned, too."""
    with pytest.raises(ValueError, match="its activations are clipped"):
        export(small(), "compressed-tensors", tmp_path / "to", replace(RECIPES["rtn"], **changes))


def test_what_gguf_cannot_say_of_a_model(small, tmp_path, tiny_tokenizer):
    rope = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}
    config = small("llama", WIDE | rope, recipe="deploy")
    with pytest.raises(ValueError, match="its RoPE is of type 'yarn'; written are default, linear, llama3"):
        export(config, "gguf", tmp_path / "to")
    random_model("llama", **WIDE).save_pretrained(config.model)
    tiny_tokenizer.save_pretrained(config.model)
    with pytest.raises(ValueError, match="a tokenizer of kind WordLevel that splits text by Split in a way of its own"):
        export(config, "gguf", tmp_path / "to")
    assert not (tmp_path / "out").exists()


def test_a_scaled_rope_is_written_as_factors(small, tmp_path):
    """llama.cpp divides its frequencies by rope_freqs.weight; transformers' reader would drop it: get_model refuses."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = small(
        "llama", WIDE | {"rope_parameters": rope, "attention_bias": False, "mlp_bias": False}, recipe="deploy"
    )
    export(config, "gguf", tmp_path / "to")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "to" / "model.gguf").tensors}
    factors = torch.tensor(stored["rope_freqs.weight"].data)
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, get_model(config.model).model.rotary_emb.inv_freq)
    assert factors.max() == pytest.approx(8.0)
    with pytest.raises(ValueError, match=r"not for rope_freqs.weight"):
        get_model(str(tmp_path / "to" / "model.gguf"))


def test_sliding_windows_are_not_lost(small, tmp_path):
    config = small("mistral", WIDE, recipe="deploy")
    with pytest.raises(ValueError, match="sliding windows"):
        export(config, "gguf", tmp_path / "to")


def test_a_head_of_its_own_is_kept_whatever_the_config_says(small, tmp_path, tokens):
    """transformers reads a tied model's own head, and says no more of it."""
    config = small(recipe="rtn", w_bits=16, a_bits=16)
    folder = Path(config.model)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    save_file(tensors | {"lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    exact = logits_of(get_model(config.model), tokens())
    for form in ("hf", "jointquant"):
        export(config, form, tmp_path / form)
        found = loaded(tmp_path / form, trust_remote_code=True)
        assert torch.allclose(logits_of(found, tokens()), exact, atol=1e-5 * exact.abs().max())
    save_model(get_model(config.model), tmp_path / "kept")
    assert torch.equal(logits_of(load_model(tmp_path / "kept"), tokens()), exact)
    whole, streamed = (pipeline.evaluate(replace(config, stream=stream, refine_steps=0), None, 16, 16)["ppl"]
                       for stream in (False, True))  # fmt: skip
    assert streamed == pytest.approx(whole, rel=1e-5)


def test_streamed_weights_are_exported_too(small, tmp_path, tokens):
    settings = {"recipe": "deploy", "refine_steps": 0}
    export(small(**settings), "compressed-tensors", tmp_path / "whole")
    export(small(**settings, stream=True), "compressed-tensors", tmp_path / "streamed")
    whole, streamed = (loaded(tmp_path / name, dtype=torch.float32) for name in ("whole", "streamed"))
    assert torch.allclose(logits_of(whole, tokens()), logits_of(streamed, tokens()), atol=1e-4)
