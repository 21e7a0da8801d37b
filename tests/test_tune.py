"""Tuning after rounding: codes stay, the loss falls, its gradients are right, and it goes on where it was."""

import pytest
import torch

from jqlib import distill, quantize_model
from jqlib.models import site_targets
from jqlib.tune import Factor, tune


@pytest.fixture
def quantised(tiny_model):
    """``quantised(a_bits, kv_bits)``: the tiny model with weights in groups of 20, a ragged last one, and its clips."""

    def make(a_bits: int = 4, kv_bits: int = 16):
        model = tiny_model()
        clips = {name: torch.tensor(0.9) for name in site_targets(model)}
        quantize_model(model, 4, a_bits, 20, kv_bits=kv_bits, a_clip=clips)
        return model, clips if a_bits < 16 else {}

    return make


def total(model, teacher, windows) -> float:
    with torch.no_grad():
        return sum(distill.divergence(model, w[None], distill.predictions(teacher, w[None])).item() for w in windows)


@pytest.mark.parametrize(("a_bits", "kv_bits"), [(4, 16), (4, 4), (16, 16)])
def test_the_loss_falls_and_codes_stay(quantised, tiny_model, tokens, a_bits, kv_bits):
    (model, clips), teacher, windows = quantised(a_bits, kv_bits), tiny_model(), tokens(4, 64)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = total(model, teacher, windows)
    tune(model, teacher, windows, clips, groupsize=20, steps=40)
    after = model.state_dict()
    assert total(model, teacher, windows) < 0.9 * first
    assert after.keys() == before.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == [name for name in before if "norm" in name or "proj" in name]
    for name in moved:
        for old, new in zip(before[name].split(20, -1), after[name].split(20, -1), strict=True):
            if "proj" in name:  # one factor a group
                factor = (new.abs().sum(-1) / old.abs().sum(-1)).nan_to_num(1.0)
                torch.testing.assert_close(new, old * factor[:, None])
    assert all(clip != 0.9 for clip in clips.values())
    assert not any(p.requires_grad for p in [*model.parameters(), *clips.values()])


def test_a_group_wider_than_a_row_is_the_row():
    factor = Factor(torch.ones(3, 8), 10**9)
    assert factor.factor.shape == (3, 1)
    assert torch.equal(factor(torch.ones(3, 8)), torch.ones(3, 8))


def test_gradients_of_factors_against_finite_differences(tiny_model, tokens):
    teacher, ids = tiny_model().double(), tokens(1, 16)
    model = tiny_model().double()
    quantize_model(model, 3, 16, 20)
    target = distill.predictions(teacher, ids)
    linear = model.get_submodule(site_targets(model, "down")[0])
    factor = Factor(linear.weight, 20).double()
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", factor)
    distill.divergence(model, ids, target).backward()
    for i, j in [(0, 0), (5, 2), (47, 4)]:  # the last group of 96 columns holds 16
        sides = []
        for change in (3e-2, -6e-2):
            factor.factor.data[i, j] += change
            sides.append(distill.divergence(model, ids, target).item())
        factor.factor.data[i, j] += 3e-2
        assert factor.factor.grad[i, j].item() == pytest.approx((sides[0] - sides[1]) / 6e-2, rel=0.03)


def test_an_interrupted_one_goes_on_as_if_nothing_had_been(quantised, tiny_model, tokens, monkeypatch):
    monkeypatch.setattr(distill, "KEEP_EVERY", 2)
    teacher, windows, kept = tiny_model(), tokens(4, 64), []
    (whole, clips), (resumed, clips_again) = quantised(), quantised()
    keep = lambda state: kept.append({k: v.clone() for k, v in state.items()})  # noqa: E731
    tune(whole, teacher, windows, clips, groupsize=20, steps=5, keep=keep)
    tune(resumed, teacher, windows, clips_again, groupsize=20, steps=5, keep=keep, resume=kept[0])
    assert [int(state["step"]) for state in kept] == [2, 4, 4]  # the second time from step 2 on
    assert all(torch.equal(p, resumed.get_parameter(name)) for name, p in whole.named_parameters())
    assert clips == clips_again


def test_weights_are_rounded_first(tiny_model, tokens):
    with pytest.raises(
        RuntimeError, match=r"tune needs a model whose weights are rounded: call quantize_model\(model\)"
    ):
        tune(tiny_model(), tiny_model(), tokens(), {})
