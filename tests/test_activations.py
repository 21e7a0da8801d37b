import copy

import pytest
import torch

from jqlib.learn.activations import Moments, collect_activations, sampled
from jqlib.model.families import site_targets
from jqlib.transform.build import fuse_layer_norms

LAYER = "model.layers.1"
READERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"]
INSIDE = ["self_attn.o_proj", "mlp.down_proj"]
NAMES = [f"{LAYER}.{name}" for name in READERS + INSIDE]


def inputs(model, batch, names=NAMES):
    """The true inputs of modules over all tokens, by plain hooks on one batched forward pass."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).clone())
        )
        for name in names
    ]
    with torch.inference_mode():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("biases", [False, True])
def test_raw_gives_the_true_inputs(tiny_model, tokens, biases):
    model = tiny_model(biases=biases)
    acts = collect_activations(model, tokens(), NAMES, raw=True)
    assert list(acts) == NAMES
    for name, x in inputs(model, tokens()).items():
        assert acts[name].dtype == torch.float32
        assert acts[name].device.type == "cpu"
        torch.testing.assert_close(acts[name], x, rtol=1e-5, atol=1e-5)


def test_readers_of_a_norm_give_their_input_without_gamma(tiny_model, tokens):
    model = tiny_model()
    acts, seen = collect_activations(model, tokens(), NAMES), inputs(model, tokens())
    for name in READERS:
        norm = "input_layernorm" if "attn" in name else "post_attention_layernorm"
        gamma = model.get_submodule(f"{LAYER}.{norm}").weight
        x = seen[f"{LAYER}.{name}"]
        torch.testing.assert_close(acts[f"{LAYER}.{name}"], x / gamma, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(acts[f"{LAYER}.{name}"], x, atol=0.1)
    for name in INSIDE:
        torch.testing.assert_close(acts[f"{LAYER}.{name}"], seen[f"{LAYER}.{name}"], rtol=1e-5, atol=1e-5)


def test_fused_or_not_makes_no_difference(tiny_model, tokens):
    model = tiny_model(biases=True)
    fused = copy.deepcopy(model)
    fuse_layer_norms(fused)
    before = collect_activations(model, tokens(), NAMES)
    for raw in (False, True):
        after = collect_activations(fused, tokens(), NAMES, raw=raw)
        for name in NAMES:
            torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-4)


def test_sample_is_the_same_everywhere_seeded_and_bounded(tiny_model, tokens):
    model, batch = tiny_model(), tokens(3, 20)
    full = collect_activations(model, batch, NAMES, max_tokens=None)
    some = collect_activations(model, batch, NAMES, max_tokens=17, seed=1)
    again = collect_activations(model, batch, NAMES, max_tokens=17, seed=1)
    other = collect_activations(model, batch, NAMES, max_tokens=17, seed=2)

    def positions(name, kept):
        rows = (kept[:, None] == full[name][None]).all(-1)
        assert torch.all(rows.sum(1) == 1)
        return rows.int().argmax(1).tolist()

    chosen = positions(NAMES[0], some[NAMES[0]])
    assert len(set(chosen)) == 17
    assert max(chosen) >= 40
    assert min(chosen) < 20
    assert chosen == sampled(60, 17, 1).nonzero().flatten().tolist()
    for name in NAMES:
        assert positions(name, some[name]) == chosen
        assert torch.equal(some[name], again[name])
    assert positions(NAMES[0], other[NAMES[0]]) != chosen
    for wanted in (60, 61, 10_000):
        assert len(collect_activations(model, batch, NAMES[:1], max_tokens=wanted)[NAMES[0]]) == 60


@pytest.mark.parametrize("shape", ["list of windows", "list of batches", "generator", "one window"])
def test_calibration_data_may_be_a_list(tiny_model, tokens, shape):
    model, batch = tiny_model(), tokens(4, 10)
    data = {"list of windows": list(batch), "list of batches": list(batch.view(2, 2, 10)),
            "generator": (window for window in batch), "one window": batch[:1]}[shape]  # fmt: skip
    expected = collect_activations(model, batch[:1] if shape == "one window" else batch, NAMES)
    for name, x in collect_activations(model, data, (name for name in NAMES)).items():
        assert torch.equal(x, expected[name])


@pytest.mark.parametrize("raw", [False, True])
def test_moments_are_those_of_all_tokens(tiny_model, tokens, raw):
    model, moments = tiny_model(), {}
    full = collect_activations(model, tokens(3), NAMES, max_tokens=None, raw=raw)
    collect_activations(model, tokens(3), NAMES, max_tokens=5, raw=raw, moments=moments)
    assert list(moments)
    assert set(moments) == set(NAMES)
    for name in NAMES:
        x = full[name].double()
        centred = x - x.mean()
        assert moments[name].tokens == len(x) == 72
        expected = centred.pow(4).mean() / centred.square().mean() ** 2
        assert moments[name].kurtosis == pytest.approx(expected.item(), rel=1e-4)
        assert torch.equal(moments[name].absmax, full[name].abs().amax(0))


def test_moments_add_up_and_know_the_gaussian():
    x = torch.randn(40_000, 5, generator=torch.Generator().manual_seed(0))
    parts = Moments.of(x[:100]) + Moments.of(x[100:])
    torch.testing.assert_close(parts.sums, Moments.of(x).sums, rtol=1e-4, atol=1e-2)
    assert parts.kurtosis == pytest.approx(3, abs=0.05)
    assert Moments.of(torch.full((10, 5), 7.3)).kurtosis == 0
    assert Moments.of(torch.zeros(10, 5)).kurtosis == 0


def test_nothing_is_left_behind_and_result_is_trainable(tiny_model, tokens):
    model = tiny_model()
    x = collect_activations(model, tokens(1), NAMES)[NAMES[0]]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    weight = torch.ones(48, requires_grad=True)
    (x @ weight).sum().backward()  # fails on tensors made in inference mode
    torch.testing.assert_close(weight.grad, x.sum(0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_name_the_module(tiny_model, tokens, value):
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight[3, 3] = value
    with pytest.raises(FloatingPointError, match=r"input of model.layers.1.self_attn.q_proj"):
        collect_activations(model, tokens(), [f"model.layers.0.{READERS[0]}", f"{LAYER}.{READERS[0]}"])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.9.self_attn.q_proj",
        "q_proj",
        "model.layers.0.self_attn.qproj",
        "model.layers.1",
        "lm_head",
        "model.norm",
    ],
)
def test_unknown_target(tiny_model, tokens, name):
    with pytest.raises(ValueError, match=f"no module {name!r}. .* such as 'model.layers.0.self_attn.q_proj'"):
        collect_activations(tiny_model(), tokens(), [f"{LAYER}.{READERS[0]}", name])


def test_site_targets_name_one_module_a_site(tiny_model):
    assert site_targets(tiny_model(layers=3), "qkv", "ug") == [
        f"model.layers.{i}.{reader}" for i in range(3) for reader in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert site_targets(tiny_model(), "o") == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
