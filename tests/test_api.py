"""The public names, used as DESIGN.md prints them, on the embedded model."""

import math

import pytest

import jqlib
from jqlib import (
    collect_activations,
    compute_simple_smooth_scale,
    evaluate_perplexity,
    fuse_layer_norms,
    get_calibration_data,
    get_model,
    get_tokenizer,
    quantize_model,
    rotate_model,
    site_targets,
    train_r1_joint,
    train_r2_independent,
)

DEVICE = "cpu"


def test_public_names_exist_and_have_docstrings():
    for name in jqlib.__all__:
        assert getattr(jqlib, name).__doc__, name


@pytest.fixture(scope="module")
def ingredients(embedded_model, tokenizer):
    """What is trained on the unfused model, in DESIGN.md's printed order and with its positional arguments."""
    config = embedded_model.config
    calib_data = get_calibration_data(tokenizer, nsamples=2, seqlen=128)
    r1_targets, r2_targets = site_targets(embedded_model, "qkv", "ug"), site_targets(embedded_model, "o")
    hidden_size, num_layers = config.hidden_size, config.num_hidden_layers
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    r1_acts = collect_activations(embedded_model, calib_data, r1_targets, DEVICE)
    R1 = train_r1_joint(r1_acts, hidden_size, num_layers, DEVICE, lr=1e-3, epochs=10, init_mode="hadamard", max_steps=2)
    r2_acts = collect_activations(embedded_model, calib_data, r2_targets, DEVICE)
    R2 = train_r2_independent(r2_acts, hidden_size, num_heads, num_kv_heads, DEVICE, max_steps=2)
    smooth_scale = compute_simple_smooth_scale(embedded_model, calib_data, DEVICE, alpha=0.5)
    return R1, R2, smooth_scale


def test_shapes_of_what_is_trained(ingredients):
    R1, R2, smooth_scale = ingredients
    assert R1.shape == (576, 576)
    assert len(R2) == 30
    assert all(heads.shape == (3, 64, 64) for heads in R2.values())
    assert len(smooth_scale) == 60
    assert {len(scale) for scale in smooth_scale.values()} == {3 * 64, 1536}


def test_the_printed_pipeline(ingredients):
    R1, R2, smooth_scale = ingredients
    model = get_model("smollm2-135m")
    tokenizer = get_tokenizer("smollm2-135m")

    def perplexity():
        return evaluate_perplexity(model, tokenizer, DEVICE, seqlen=128, max_windows=2)

    full = perplexity()
    fuse_layer_norms(model)
    rotate_model(model, R1, R2, smooth_scale)
    rotated = perplexity()
    assert rotated == pytest.approx(full, rel=1e-4)
    quantize_model(model, w_bits=4, a_bits=4, w_groupsize=128)
    quantized = perplexity()
    assert math.isfinite(quantized)
    assert full * 1.05 < quantized < full * 100
    assert isinstance(quantized, float)
    assert quantized.low <= quantized <= quantized.high


def test_collecting_after_fusing_gives_the_same_rotation(ingredients, smollm, tokenizer):
    """The trap of ALGORITHM.md §1: the specification collects before fusing, and must not see gamma."""
    calib_data = get_calibration_data(tokenizer, nsamples=2, seqlen=128)

    def distance(**arguments):
        acts = collect_activations(smollm, calib_data, site_targets(smollm, "qkv", "ug"), DEVICE, **arguments)
        return ((train_r1_joint(acts, 576, 30, DEVICE, max_steps=2) - ingredients[0]).norm() / 24).item()

    with_gamma = distance(raw=True)
    fuse_layer_norms(smollm)
    assert distance() < 0.1 * with_gamma  # not 0: rounding, through the small singular values of a step
