"""The walk against the model's own forward pass, where layers differ in what they attend to."""

import copy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from jqlib.learn.activations import collect_activations
from jqlib.learn.steps import Steps, minimise_by_steps
from jqlib.model.families import FAMILIES, LLAMA, site_targets
from jqlib.model.walk import walk

WINDOW, SEQLEN, KINDS = 8, 30, ["sliding_attention", "full_attention"] * 2


@pytest.fixture
def qwen(monkeypatch):
    """``qwen(attention)``: a tiny Qwen2, every other layer with a sliding window."""
    monkeypatch.setitem(FAMILIES, "qwen2", LLAMA)

    def make(attention: str = "sdpa"):
        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128, layer_types=KINDS, use_sliding_window=True, sliding_window=WINDOW, initializer_range=0.3,
            attn_implementation=attention, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return Qwen2ForCausalLM(config).eval().requires_grad_(False)

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_the_models_own(qwen, tokens, attention):
    model, windows = qwen(attention), tokens(3, SEQLEN)
    with torch.inference_mode():
        twin = copy.deepcopy(model)  # transformers leaves hooks of its own behind
        expected = twin(windows, output_hidden_states=True, use_cache=False).hidden_states
    assert len(expected) == 5
    for i, step in enumerate(walk(model, windows, "test")):
        assert step.name == f"model.layers.{i}"
        torch.testing.assert_close(step.hidden, expected[i], rtol=1e-4, atol=1e-5)
        if i % 2:
            step.forward()  # by hand or by the walk: once
    with torch.inference_mode():
        last = model.model.norm(step.hidden)
    torch.testing.assert_close(last, expected[4], rtol=1e-4, atol=1e-5)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_model_of_one_layer(tiny_model, tokens):
    model = tiny_model(layers=1)
    (step,) = walk(model, tokens())
    torch.testing.assert_close(model.lm_head(model.model.norm(step.hidden)), model(tokens()).logits)


def test_each_layer_gets_its_own_arguments(qwen, tokens):
    model, windows = qwen("eager"), tokens(2, SEQLEN)
    ahead = torch.arange(SEQLEN)[:, None] - torch.arange(SEQLEN)  # of a query's place, by how much a key's is behind
    for i, step in enumerate(walk(model, windows, "test")):
        seen = step.arguments["attention_mask"][0, 0] == 0
        near = ahead < WINDOW if KINDS[i] == "sliding_attention" else torch.ones_like(ahead, dtype=torch.bool)
        assert torch.equal(seen, (ahead >= 0) & near)


def test_wrong_arguments_would_be_seen(qwen, tokens):
    """The two kinds of layers do differ on these windows."""
    model, windows = qwen("eager"), tokens(1, SEQLEN)
    steps = list(walk(model, windows, "test"))
    x = torch.randn(1, SEQLEN, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs = [steps[0].layer(x, **step.arguments) for step in steps[:2]]
    assert torch.equal(outputs[0][:, :WINDOW], outputs[1][:, :WINDOW])
    assert not torch.allclose(outputs[0][:, WINDOW:], outputs[1][:, WINDOW:], atol=1e-2)


def test_activations_collected_on_the_walk_are_the_models_own(qwen, tokens):
    model, windows, seen = qwen(), tokens(2, SEQLEN), {}
    targets = site_targets(model)
    found = collect_activations(model, windows, targets, max_tokens=None, raw=True)
    for name in targets:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1))
        )
    with torch.inference_mode():
        model(windows, use_cache=False)
    for name, x in found.items():
        torch.testing.assert_close(x, seen[name], rtol=1e-3, atol=1e-4)


def test_a_walk_that_is_left_early_leaves_no_hook(qwen, tokens):
    model = qwen()
    for step in walk(model, tokens(2, SEQLEN), "test"):
        found = step.inputs(step.hidden[:1], {"mlp.down_proj": "here"})
        break
    assert found["here"].shape == (SEQLEN, 64)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_whoever_wants_no_progress_sees_none(tiny_model, tokens, capsys):
    """conftest sets TQDM_DISABLE: bars that are left out for other reasons must not overrule it elsewhere."""
    knob = torch.zeros(1, requires_grad=True)
    list(walk(tiny_model(), tokens(), "layers"))
    minimise_by_steps({"a": knob}, lambda _: knob.sum(), tokens(), {"a": 1.0}, Steps(2), "steps")
    assert capsys.readouterr().err == ""
