"""Every family in the table: logits survive, all stages run, what can't be right is refused with the reason."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jqlib import pipeline
from jqlib.config import make_config
from jqlib.model.families import FAMILIES, LLAMA, REASONS, sites_of, split
from jqlib.model.load import get_model, load_config
from jqlib.recipes import RECIPES
from jqlib.transform.selfcheck import TOLERANCE, change_of_logits, check_family, shrunk

SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": None, "bos_token_id": None,
         "eos_token_id": None, "max_position_embeddings": 256}  # fmt: skip
KINDS = {
    "llama": {"head_dim": 8, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 8, "sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "phi3": {"sliding_window": 16},
}


def config_of(kind: str, **more):
    return AutoConfig.for_model(kind, **(SMALL | KINDS[kind] | more))


def random_model(kind: str, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, **more)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        noise = 0.2 * torch.randn(p.shape)
        p.data = noise.exp() if p.ndim == 1 and "norm" in name else noise
    return model


def test_the_table_here_is_the_table():
    assert KINDS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_survive_all_transforms(kind, heads, tied):
    config = config_of(kind, num_attention_heads=heads[0], num_key_value_heads=heads[1], tie_word_embeddings=tied)
    check_family(config)
    assert change_of_logits(config) < 1e-5


@pytest.mark.parametrize(("hidden", "heads", "kv", "head_dim"), [(96, 6, 6, 20), (96, 6, 2, 8), (64, 7, 7, 16)])
def test_heads_that_are_not_as_wide_as_the_model(hidden, heads, kv, head_dim):
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim}
    config = config_of("qwen3", **sizes)
    small = shrunk(config)
    assert small.num_attention_heads * small.head_dim != small.hidden_size
    check_family(config)
    if hidden % heads == 0:
        check_family(config_of("llama", **sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_one_is_of_the_same_kind(kind):
    config = config_of(kind)
    small = shrunk(config)
    assert type(small) is type(config)
    assert small.num_hidden_layers == 2
    assert {*(getattr(small, "layer_types", None) or ())} == {*(getattr(config, "layer_types", None) or ())}
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"):
        assert getattr(small, name, None) == getattr(config, name, None)


def test_a_wrong_entry_is_found_out(monkeypatch):
    """Gemma's norms multiply by 1 + weight: with Llama's entry it would be wrong without a word."""
    monkeypatch.setitem(FAMILIES, "gemma", LLAMA)
    config = AutoConfig.for_model("gemma", **(SMALL | {"head_dim": 8}))
    assert change_of_logits(shrunk(config)) > 100 * TOLERANCE
    with pytest.raises(
        ValueError, match=r"a 'gemma' model can't be rotated by its entry .* logits change by [\d.e+]+%"
    ):
        check_family(config)


@pytest.mark.parametrize("kind", ["gemma", "mixtral", "olmo2"])
def test_what_is_known_not_to_work_is_refused_with_the_reason(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REASONS[kind][:30].replace("+", r"\+")):
        load_config(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_computes_what_it_did(tmp_path, kind):
    model, ids = random_model(kind), torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    again = get_model(str(tmp_path))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert [place.kind for place in sites_of(again).values()] == ["qkv", "o", "ug", "down"] * 4


@pytest.mark.parametrize("bias", [False, True])
def test_a_joined_linear_is_its_parts(bias):
    model = random_model("phi3")
    layer = model.model.layers[0]
    if bias:
        layer.mlp.gate_up_proj.bias = torch.nn.Parameter(torch.randn(192))
    x = torch.randn(3, 48)
    expected = layer.self_attn.qkv_proj(x), layer.mlp.gate_up_proj(x)
    split(model)
    assert torch.equal(layer.self_attn.qkv_proj(x), expected[0])
    torch.testing.assert_close(layer.mlp.gate_up_proj(x), expected[1])
    sizes = {name: len(part.weight) for name, part in layer.self_attn.qkv_proj.named_children()}
    assert sizes == {"q_proj": 48, "k_proj": 12, "v_proj": 12}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_runs_on_every_family(tmp_path, tiny_tokenizer, kind, name):
    """From collecting to perplexity, all learned for a step; before rounding the model computes what it did."""
    random_model(kind, num_hidden_layers=2, **({"max_window_layers": 1} if kind == "qwen2" else {})).save_pretrained(
        tmp_path / "model"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    names = {"model": "model", "calib_dataset": "text.txt", "eval_dataset": "text.txt", "output_dir": "out"}
    config = make_config({name: str(tmp_path / file) for name, file in names.items()} | {
        "profile": "quick", "nsamples": 2, "seqlen": 32, "max_tokens": 64, "eval_seqlen": 32, "eval_windows": 2,
        "refine_steps": 1, "step_tokens": 64, "kv_bits": 8,
    })  # fmt: skip
    ids = pipeline.load_calibration(config)[:1]
    expected = pipeline.load_model(config)(ids).logits
    found = pipeline.transformed(config, RECIPES[name])(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert 1 < pipeline.evaluate(config, RECIPES[name], 4, 4)["ppl"] < 1e6


def test_one_that_was_taken_apart_is_not_saved_as_what_it_was(tmp_path):
    random_model("phi3").save_pretrained(tmp_path)
    model = get_model(str(tmp_path))
    with pytest.raises(RuntimeError, match="taken apart: a Hugging Face checkpoint of it could not be read again"):
        model.save_pretrained(tmp_path / "again")
