import copy

import pytest
import torch

from jqlib.learn.activations import collect_activations
from jqlib.learn.smooth import compute_simple_smooth_scale
from jqlib.model.families import site_targets
from jqlib.transform.build import done, fuse_layer_norms, rotate_model

HEADS, KV, D, INTERMEDIATE, HIDDEN = 6, 2, 8, 96, 48
O_PROJ, DOWN = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
QKV, UG = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def smooth(model, scales):
    rotate_model(model, None, None, scales, r4=False)


def logits(model, batch):
    with torch.inference_mode():
        return model(batch, use_cache=False).logits


def slow_scale(x, weights, alpha: float, channels: list[list[int]]) -> list[float]:
    """s of each group of channels that share one, in plain loops."""
    scales = []
    for group in channels:
        x_max = max(x[t, j].abs().item() for t in range(len(x)) for j in group)
        w_max = max(weight[i, j].abs().item() for weight in weights for i in range(len(weight)) for j in group)
        scales.append(x_max**alpha / w_max ** (1 - alpha))
    return scales


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("name", [O_PROJ, DOWN, QKV, UG])
def test_scales_against_slow_loops(tiny_model, tokens, alpha, name):
    model, batch = tiny_model(biases=True), tokens(2, 6)
    site = {O_PROJ: "o", DOWN: "down", QKV: "qkv", UG: "ug"}[name]
    scale = compute_simple_smooth_scale(model, batch, alpha=alpha, sites=(site,))
    assert list(scale) == site_targets(model, site)
    x = collect_activations(model, batch, [name], raw=True)[name]
    readers = {O_PROJ: ["o"], DOWN: ["down"], QKV: ["q", "k", "v"], UG: ["up", "gate"]}[name]
    parent = name.rsplit(".", 1)[0]
    weights = [model.get_submodule(f"{parent}.{reader}_proj").weight for reader in readers]
    shared = [[(kv * HEADS // KV + h) * D + j for h in range(HEADS // KV)] for kv in range(KV) for j in range(D)]
    channels = shared if name == O_PROJ else [[j] for j in range(x.shape[1])]
    assert scale[name].shape == (len(channels),)
    torch.testing.assert_close(scale[name], torch.tensor(slow_scale(x, weights, alpha, channels)))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("sites", [("o", "down"), ("qkv", "ug"), ("o",), ("qkv", "o", "ug", "down")])
def test_logits_survive(tiny_model, tokens, double_norms, biases, sites):
    model, batch = tiny_model(biases=biases, dtype=torch.float64), tokens()
    expected, before = logits(model, batch), copy.deepcopy(model.state_dict())
    smooth(model, compute_simple_smooth_scale(model, batch, sites=sites))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)
    changed = {name.split(".")[-2] for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    touched = {"o": {"v_proj", "o_proj"}, "down": {"up_proj", "down_proj"},
               "qkv": {"input_layernorm", "q_proj", "k_proj", "v_proj"},
               "ug": {"post_attention_layernorm", "up_proj", "gate_proj"}}  # fmt: skip
    assert changed == set().union(*(touched[site] for site in sites))
    assert done(model) == {"rotated"}


def test_smoothed_input_is_divided(tiny_model, tokens):
    model, batch = tiny_model(), tokens()
    before = collect_activations(model, batch, [O_PROJ, DOWN])
    scales = compute_simple_smooth_scale(model, batch, alpha=0.7)
    smooth(model, scales)
    after = collect_activations(model, batch, [O_PROJ, DOWN])
    per_head = scales[O_PROJ].view(KV, 1, D).repeat(1, HEADS // KV, 1).flatten()
    torch.testing.assert_close(after[O_PROJ], before[O_PROJ] / per_head, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after[DOWN], before[DOWN] / scales[DOWN], rtol=1e-3, atol=1e-4)


def test_moments_save_the_pass(tiny_model, tokens):
    model, moments = tiny_model(), {}
    collect_activations(model, tokens(), site_targets(model, "o", "down"), raw=True, moments=moments)
    given = compute_simple_smooth_scale(model, None, moments=moments)
    for name, scale in compute_simple_smooth_scale(model, tokens()).items():
        assert torch.equal(given[name], scale)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_dead_channels_keep_their_scale(tiny_model, tokens, alpha):
    model, batch = tiny_model(), tokens()
    model.model.layers[1].mlp.up_proj.weight[5] = 0  # its activation is always 0
    model.model.layers[1].mlp.down_proj.weight[:, 7] = 0  # nothing reads it
    expected = logits(model, batch)
    scales = compute_simple_smooth_scale(model, batch, alpha=alpha)
    assert scales[DOWN][5] == scales[DOWN][7] == 1
    assert all(torch.isfinite(scale).all() and (scale >= 1e-5).all() for scale in scales.values())
    smooth(model, scales)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, torch.nan])
def test_alpha_outside_its_range(tiny_model, tokens, alpha):
    with pytest.raises(ValueError, match=f"smooth_alpha={alpha}: alpha lies between 0"):
        compute_simple_smooth_scale(tiny_model(), tokens(), alpha=alpha)


def test_twice(tiny_model, tokens):
    model = tiny_model()
    scales = compute_simple_smooth_scale(model, tokens())
    smooth(model, scales)
    for again in (lambda: smooth(model, scales), lambda: rotate_model(model, None)):
        with pytest.raises(RuntimeError, match="rotated already"):
            again()
    with pytest.raises(RuntimeError, match="rotated already: it must be fused before"):
        fuse_layer_norms(model)


@pytest.mark.parametrize(("scales", "message"), [
    ({"layers.1.o_proj": torch.ones(16)}, "layers.1.o_proj"),
    ({O_PROJ: torch.ones(8)}, O_PROJ),
    ({DOWN: torch.ones(48)}, DOWN),
    ({DOWN: torch.zeros(96)}, DOWN),
    ({DOWN: torch.full((96,), torch.nan)}, DOWN),
])  # fmt: skip
def test_scales_that_do_not_fit_are_named_and_leave_the_model_alone(tiny_model, scales, message):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        smooth(model, scales)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_root_mean_squares_reach_the_bound_of_both_roundings(tiny_model, tokens):
    """‖X S⁻¹‖ ‖W S‖ is Σ ‖X_j‖ ‖W_:j‖ and no less: max-based scales stay above it (Cauchy–Schwarz)."""
    model, windows, name = tiny_model(), tokens(4, 64), "model.layers.0.mlp.down_proj"
    x = collect_activations(model, windows, [name], max_tokens=None)[name]
    weight = model.get_submodule(name).weight
    bound = (x.norm(dim=0) * weight.norm(dim=0)).sum()
    costs = {}
    for measure in ("l2", "max"):
        s = compute_simple_smooth_scale(model, windows, measure=measure)[name]
        costs[measure] = (x / s).norm() * (weight * s).norm()
    torch.testing.assert_close(costs["l2"], bound)
    assert costs["max"] > 1.001 * bound
    with pytest.raises(ValueError, match="measure='l1' is unknown; there are max, l2"):
        compute_simple_smooth_scale(model, windows, measure="l1")
