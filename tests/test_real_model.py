"""The embedded model and corpus: nothing tiny, nothing random."""

import math

import pytest
import torch

from jqlib import (
    collect_activations,
    compute_simple_smooth_scale,
    evaluate_perplexity,
    fuse_layer_norms,
    rotate_model,
    site_targets,
    train_r1_joint,
    train_r2_independent,
)
from jqlib.learn.activations import Moments
from jqlib.learn.objectives import OBJECTIVES, mean_value
from jqlib.model.data import get_evaluation_windows
from jqlib.quant.quantize import quantize_model
from jqlib.transform.hadamard import random_hadamard

HIDDEN, LAYERS, HEADS, KV = 576, 30, 9, 3


@pytest.fixture(scope="module")
def windows(tokenizer):
    return get_evaluation_windows(tokenizer, seqlen=256, max_windows=2).ids


@pytest.fixture(scope="module")
def r1_acts(embedded_model, windows):
    return collect_activations(embedded_model, windows, site_targets(embedded_model, "qkv", "ug"))


def logits(model, windows):
    with torch.inference_mode():
        return model(windows[:1], use_cache=False).logits


def test_shape_of_the_embedded_model(embedded_model):
    config = embedded_model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (HIDDEN, LAYERS, HEADS)
    assert (config.num_key_value_heads, config.intermediate_size) == (KV, 1536)
    assert embedded_model.lm_head.weight.data_ptr() == embedded_model.model.embed_tokens.weight.data_ptr()


def test_logits_survive_everything_before_quantisation(smollm, windows):
    expected = logits(smollm, windows)
    smooth = compute_simple_smooth_scale(smollm, windows)
    targets = site_targets(smollm, "o")
    R2 = train_r2_independent(
        collect_activations(smollm, windows, targets), HIDDEN, HEADS, KV, smooth_scale=smooth, max_steps=3
    )
    fuse_layer_norms(smollm)
    rotate_model(smollm, random_hadamard(HIDDEN, seed=0), R2, smooth)
    found = logits(smollm, windows)
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_activations_carry_no_gamma_and_match_the_fused_model(smollm, r1_acts, windows):
    fuse_layer_norms(smollm)
    fused = collect_activations(smollm, windows, list(r1_acts), raw=True)
    for name, x in r1_acts.items():
        assert x.shape == (512, HIDDEN)
        assert x.square().mean(-1).amax() < 1.001  # RMS 1 a token: behind a norm, before gamma
        assert (fused[name] - x).norm() / x.norm() < 1e-4


@pytest.mark.parametrize(("objective", "max_steps"), [("whip", 10), ("range", 6)])
def test_joint_r1_descends_over_all_layers(r1_acts, objective, max_steps):
    history = []
    train_r1_joint(r1_acts, HIDDEN, LAYERS, objective=objective, max_steps=max_steps, history=history)
    losses = [row["loss"] for row in history]
    assert losses[-1] < 0.97 * losses[0]
    assert max(row["orthogonality"] for row in history) <= 1e-5


def test_joint_r1_beats_published_sgd(r1_acts):
    some = {name: x[::16] for name, x in r1_acts.items()}
    X = torch.cat(list(some.values()))[None]

    def whip(**arguments):
        R = train_r1_joint(some, HIDDEN, LAYERS, **arguments)
        return mean_value([X], R[None], OBJECTIVES["whip"]).item()

    assert whip(max_steps=12) < whip(solver="sgd", lr=1e-3, epochs=10) < whip(max_steps=0)


def test_rotation_removes_outliers(smollm, windows):
    targets = site_targets(smollm, "qkv", "ug")
    before, after = {}, {}
    fuse_layer_norms(smollm)
    collect_activations(smollm, windows, targets, moments=before)
    rotate_model(smollm, random_hadamard(HIDDEN, seed=0), None)
    collect_activations(smollm, windows, targets, moments=after)

    def mean_kurtosis(moments: dict[str, Moments]) -> float:
        return sum(m.kurtosis for m in moments.values()) / len(moments)

    assert mean_kurtosis(before) > 20
    assert mean_kurtosis(after) < 5


def test_perplexity_equals_a_plain_hugging_face_loop(embedded_model, tokenizer, windows):
    with torch.no_grad():
        nll = [embedded_model(w[None], labels=w[None]).loss.item() for w in windows]
    ppl = evaluate_perplexity(embedded_model, tokenizer, seqlen=256, max_windows=2)
    assert ppl.nll == pytest.approx(nll, rel=1e-5)
    assert ppl == pytest.approx(math.exp(sum(nll) / 2), rel=1e-5)
    assert 5 < ppl < 100


def test_rotation_saves_four_bits(smollm, embedded_model, tokenizer):
    """W16A4: without a rotation the model is lost (thousands), with a Hadamard one it is not."""
    full = evaluate_perplexity(embedded_model, tokenizer, seqlen=128, max_windows=2)
    fuse_layer_norms(smollm)
    rotate_model(smollm, random_hadamard(HIDDEN, seed=0), None)
    quantize_model(smollm, 16, 4, a_clip=0.9, o_per_head=True)
    rotated = evaluate_perplexity(smollm, tokenizer, seqlen=128, max_windows=2)
    assert full < rotated < 3 * full
