"""End-to-end refinement: the simulated model is the one that will be built, its gradients are right, it goes on."""

import copy

import pytest
import torch

from jqlib import collect_activations, site_targets
from jqlib.learn import steps
from jqlib.learn.lessons import teach
from jqlib.learn.refine import learnable_transforms, refine, simulated
from jqlib.learn.rotations import train_r1_joint, train_r2_independent
from jqlib.learn.smooth import compute_simple_smooth_scale
from jqlib.learn.steps import Steps
from jqlib.model.families import sites_of
from jqlib.transform.build import build, transforms_of
from jqlib.transform.orthogonal import orthogonality_error
from jqlib.transform.transform import Grid, Rotation

HIDDEN, HEADS, KV, D = 48, 6, 2, 8


@pytest.fixture
def start(tiny_model, tokens):
    """``start(online)``: model, windows, and transforms as the solvers leave them."""

    def make(online: bool, bits: int = 4, clip: float = 0.9):
        model, windows = tiny_model(), tokens(4, 64)
        acts = collect_activations(model, windows, site_targets(model))
        R1 = train_r1_joint({n: acts[n] for n in site_targets(model, "qkv", "ug")}, HIDDEN, 2, max_steps=2)
        R2 = train_r2_independent({n: acts[n] for n in site_targets(model, "o")}, HIDDEN, HEADS, KV, max_steps=2)
        sites = ("qkv", "o", "ug", "down") if online else ("o", "down")
        scales = compute_simple_smooth_scale(model, windows, sites=sites)
        grids = {n: Grid(bits, clip, D if p.kind == "o" else None) for n, p in sites_of(model).items()}
        kinds = ("qkv", "ug", "down") if online else ("down",)
        transforms = transforms_of(model, None if online else R1, R2, scales, online=kinds, grids=grids)
        return model, teach(model, windows), transforms

    return make


def built(model, transforms):
    """The model with the transforms merged, their grids in it, and weights left alone."""
    model = copy.deepcopy(model)
    build(model, copy.deepcopy(transforms))
    return model


def divergence(model, quantised, ids) -> float:
    """KL by the textbook."""
    p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (model, quantised))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("online", [False, True])
def test_the_simulated_model_is_the_one_that_is_built(start, online):
    model, lessons, transforms = start(online)
    refine(model, lessons, transforms, steps=Steps(3))
    with simulated(model, transforms):
        found = lessons.loss(model, torch.tensor([0])).item()
    assert found == pytest.approx(divergence(model, built(model, transforms), lessons.ids[:1]), rel=0.02)


@pytest.mark.parametrize("online", [False, True])
def test_it_gains_on_its_text_and_rotations_stay_rotations(start, online):
    model, lessons, transforms = start(online)
    before = built(model, transforms)
    refine(model, lessons, transforms, steps=Steps(40))
    first, last = (sum(divergence(model, m, w[None]) for w in lessons.ids) for m in (before, built(model, transforms)))
    assert last < 0.95 * first
    learned = {t.rotation for t in transforms.values() if isinstance(t.rotation, Rotation)}
    assert len(learned) == (2 if online else 3)  # R2 of two layers, and R1
    assert all(orthogonality_error(rotation.matrix) < 1e-5 for rotation in learned)
    gained = {name for name, t in transforms.items() if t.gain is not None}
    assert gained == (set() if online else set(site_targets(model, "qkv", "ug")))


def test_only_what_is_to_be_learned_moves(start):
    model, lessons, transforms = start(False)
    before = copy.deepcopy(transforms)
    refine(model, lessons, transforms, steps=Steps(3), learn=("R1", "R2"))
    for name, t in transforms.items():
        turned = name not in site_targets(model, "down")  # R4 is a Hadamard matrix
        assert not turned or not torch.allclose(t.rotation.matrix, before[name].rotation.matrix)
        torch.testing.assert_close(t.scale, before[name].scale, rtol=0, atol=0)
        assert t.gain is None
        assert t.grid.clip == before[name].grid.clip


def test_all_sites_behind_r1_share_it_before_and_after(start):
    model, lessons, transforms = start(False)
    refine(model, lessons, transforms, steps=Steps(2))
    assert len({transforms[name].rotation for name in site_targets(model, "qkv", "ug")}) == 1


def test_the_model_is_left_as_it_was(start, tmp_path):
    model, lessons, transforms = start(False)
    parts, weights = set(dir(model)), {name: p.clone() for name, p in model.state_dict().items()}
    expected = model(lessons.ids).logits
    refine(model, lessons, transforms, steps=Steps(2))
    assert torch.equal(model(lessons.ids).logits, expected)
    assert {name: p.shape for name, p in model.state_dict().items()} == {n: p.shape for n, p in weights.items()}
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert set(dir(model)) == parts
    model.save_pretrained(tmp_path)  # nothing stands in it


def test_after_a_loss_that_is_not_finite_the_model_is_as_it_was(start):
    model, lessons, transforms = start(False)
    expected = model(lessons.ids).logits
    transforms[site_targets(model, "down")[0]].scale.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="refining: the loss turned nan at step 0"):
        refine(model, lessons, transforms, steps=Steps(2))
    assert torch.equal(model(lessons.ids).logits, expected)
    assert not any(p.requires_grad for t in transforms.values() for p in t.parameters())


def test_an_interrupted_one_goes_on_as_if_nothing_had_been(start, monkeypatch):
    monkeypatch.setattr(steps, "KEEP_EVERY", 2)
    (model, lessons, whole), (_, _, resumed), kept = start(False), start(False), []
    keep = lambda state: kept.append({k: v.clone() for k, v in state.items()})  # noqa: E731
    refine(model, lessons, whole, steps=Steps(5, keep=keep))
    assert [int(state["step"]) for state in kept] == [2, 4]
    refine(model, lessons, resumed, steps=Steps(5, resume=kept[0], keep=keep))
    assert len(kept) == 3  # the second time from step 2 on
    for name, t in whole.items():
        assert all(torch.equal(p, resumed[name].get_parameter(part)) for part, p in t.named_parameters())


@pytest.mark.parametrize(("bits", "learn", "message"), [
    (16, ("R1",), "a_bits=16: refine learns by the rounding of activations, to 2..15 bits"),
    (4, ("r1",), r"learn=\('r1',\): expected some of R1, R2, scale, smooth, clip"),
    (4, (), r"learn=\(\): expected some of R1, R2, scale, smooth, clip"),
])  # fmt: skip
def test_what_it_cannot_learn_is_refused(start, bits, learn, message):
    with pytest.raises(ValueError, match=message):
        refine(*start(False, bits), learn=learn)


def test_a_clip_is_held_at_1(tokens):
    clip = torch.tensor(0.999, requires_grad=True)
    steps.minimise_by_steps({"clip a": clip}, lambda pieces: -clip, tokens(1, 8), {"clip": 0.1}, Steps(3), "up")
    assert clip.item() == 1


def test_a_clip_that_reached_1_comes_back(start):
    """Beyond 1 it would feel no gradient: `minimise_by_steps` holds it there."""
    model, lessons, transforms = start(False, clip=1.0)
    with simulated(model, transforms), learnable_transforms(sites_of(model), transforms, ("clip",)) as clips:
        lessons.loss(model, torch.tensor([0])).backward()
    assert len(clips) == 8
    assert all(knob.item() == 1 for knob in clips.values())
    assert all(knob.grad != 0 for knob in clips.values())
