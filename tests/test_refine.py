"""End-to-end refinement: the simulated model is the one that will be built, its gradients are right, it goes on."""

import pytest
import torch

from jqlib import collect_activations, distill, fuse_layer_norms, quantize_model, refine, rotate_model, site_targets
from jqlib.joint import orthogonality_error, train_r1_joint, train_r2_independent
from jqlib.refine import Simulation, working_copy
from jqlib.smooth import compute_simple_smooth_scale

HIDDEN, HEADS, KV = 48, 6, 2


@pytest.fixture
def start(tiny_model, tokens):
    """``start(online)``: model, windows, and R1, R2, scales as the solvers leave them."""

    def make(online: bool):
        model, windows = tiny_model(), tokens(4, 64)
        acts = collect_activations(model, windows, site_targets(model))
        R1 = train_r1_joint({n: acts[n] for n in site_targets(model, "qkv", "ug")}, HIDDEN, 2, max_steps=2)
        R2 = train_r2_independent({n: acts[n] for n in site_targets(model, "o")}, HIDDEN, HEADS, KV, max_steps=2)
        sites = ("qkv", "o", "ug", "down") if online else ("o", "down")
        return model, windows, None if online else R1, R2, compute_simple_smooth_scale(model, windows, sites=sites)

    return make


def built(model, found: refine.Refined, online: bool):
    """The model that `rotate_model` and `quantize_model` make of a refinement, weights left alone."""
    if not online:
        fuse_layer_norms(model)
    sites = ("qkv", "ug") if online else ()
    rotate_model(model, found.R1, found.R2, found.smooth_scale, norm_scale=found.norm_scale, online=sites)
    quantize_model(model, 16, 4, a_clip=found.clips, o_per_head=True)
    return model


def divergence(model, quantised, ids) -> float:
    """KL by the textbook."""
    p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (model, quantised))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("online", [False, True])
def test_the_simulated_model_is_the_one_that_is_built(start, online):
    model, windows, R1, R2, scales = start(online)
    found = refine.refine(model, windows, R1, R2, scales, steps=3)
    quantised = built(working_copy(model, fuse=False), found, online)
    again = working_copy(model, fuse=not online)
    knobs = refine._knobs(again, found.R1, found.R2, found.smooth_scale | found.norm_scale, 0.9)
    knobs |= {f"clip {name}": torch.tensor(clip) for name, clip in found.clips.items()}
    ids = windows[:1]
    simulated = Simulation(again, found.R1, found.R2, knobs, 4, o_per_head=True).loss(ids)
    assert simulated.item() == pytest.approx(divergence(model, quantised, ids), rel=0.02)


@pytest.mark.parametrize("online", [False, True])
def test_it_gains_on_its_text_and_rotations_stay_rotations(start, online):
    model, windows, R1, R2, scales = start(online)
    before = refine.Refined(R1, R2, {}, scales, dict.fromkeys(site_targets(model), 0.9))
    after = refine.refine(model, windows, R1, R2, scales, steps=40)
    first, last = (
        sum(divergence(model, built(working_copy(model, False), found, online), w[None]) for w in windows)
        for found in (before, after)
    )
    assert last < 0.95 * first
    for R in [*after.R2.values(), *([] if online else [after.R1])]:
        assert orthogonality_error(R) < 1e-5
    assert set(after.norm_scale) == (set() if online else set(site_targets(model, "qkv", "ug")))


def test_only_what_is_to_be_learned_moves(start):
    model, windows, R1, R2, scales = start(False)
    found = refine.refine(model, windows, R1, R2, scales, steps=3, learn=("R1", "R2"))
    assert not torch.allclose(found.R1, R1)
    for name, scale in found.smooth_scale.items():
        torch.testing.assert_close(scale, scales[name])
    assert all((scale == 1).all() for scale in found.norm_scale.values())
    assert set(found.clips.values()) == {torch.tensor(0.9).item()}


def test_an_interrupted_one_goes_on_as_if_nothing_had_been(start, monkeypatch):
    monkeypatch.setattr(distill, "KEEP_EVERY", 2)
    arguments, kept = start(False), []
    whole = refine.refine(*arguments, steps=5, keep=lambda state: kept.append({k: v.clone() for k, v in state.items()}))
    assert [int(state["step"]) for state in kept] == [2, 4]
    resumed = refine.refine(*arguments, steps=5, resume=kept[0], keep=kept.append)
    assert len(kept) == 3  # the second time from step 2 on
    torch.testing.assert_close(resumed.R1, whole.R1, rtol=0, atol=0)
    assert resumed.clips == whole.clips


def test_every_layer_needs_its_r2(start):
    model, windows, R1, R2, scales = start(False)
    R2.popitem()
    with pytest.raises(ValueError, match=r"refine needs R2 of every layer; there is none for model.layers.1.self_attn"):
        refine.refine(model, windows, R1, R2, scales)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"a_bits": 16}, "a_bits=16: refine learns by the rounding of activations, to 2..15 bits"),
    ({"learn": ("r1",)}, r"learn=\('r1',\): expected some of R1, R2, scale, smooth, clip"),
    ({"learn": ()}, r"learn=\(\): expected some of R1, R2, scale, smooth, clip"),
])  # fmt: skip
def test_what_it_cannot_learn_is_refused(start, wrong, message):
    with pytest.raises(ValueError, match=message):
        refine.refine(*start(False), **wrong)


def test_a_clip_is_held_at_1(tokens):
    clip = torch.tensor(0.999, requires_grad=True)
    distill.distill({"clip a": clip}, lambda ids: -clip, tokens(1, 8), {"clip": 0.1}, label="up", steps=3)
    assert clip.item() == 1


def test_a_clip_that_reached_1_comes_back(start):
    """Beyond 1 it would feel no gradient: `distill` holds it there."""
    model, windows, R1, R2, scales = start(False)
    knobs = refine._knobs(model, R1, R2, scales, 1.0)
    simulated = refine.Simulation(refine.working_copy(model, fuse=True), R1, R2, knobs, 4, True)
    clips = {name: knob.requires_grad_() for name, knob in knobs.items() if name.startswith("clip ")}
    simulated.loss(windows[:1, :32]).backward()
    assert all(knob.item() == 1 for knob in clips.values())
    assert all(knob.grad != 0 for knob in clips.values())
