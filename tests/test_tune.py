"""Tuning after rounding: codes stay, the loss falls, its gradients are right, and it goes on where it was."""

import pytest
import torch

from jqlib import quantize_model
from jqlib.learn import steps
from jqlib.learn.lessons import Lessons, teach
from jqlib.learn.rounded import OnGrid
from jqlib.learn.steps import Steps
from jqlib.learn.tune import tune
from jqlib.model.families import linears_of, site_targets
from jqlib.quant.packed import codes_of
from jqlib.transform.grids import spread
from jqlib.transform.install import standing


@pytest.fixture
def quantised(tiny_model):
    """``quantised(a_bits, kv_bits)``: the tiny model with weights in groups of 20, a ragged last one."""

    def make(a_bits: int = 4, kv_bits: int = 16):
        model = tiny_model()
        quantize_model(model, 4, a_bits, 20, kv_bits=kv_bits, a_clip=0.9)
        return model

    return make


def total(model, lessons) -> float:
    with torch.no_grad():
        return lessons.loss(model, torch.arange(len(lessons.ids))).item()


@pytest.mark.parametrize(("a_bits", "kv_bits"), [(4, 16), (4, 4), (16, 16)])
def test_the_loss_falls_and_codes_stay(quantised, tiny_model, tokens, a_bits, kv_bits):
    model, lessons = quantised(a_bits, kv_bits), teach(tiny_model(), tokens(4, 64))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    codes = {name: codes_of(linear) for name, linear in linears_of(model).items()}
    first = total(model, lessons)
    tune(model, lessons, Steps(40))
    after = model.state_dict()
    assert total(model, lessons) < 0.9 * first
    assert after.keys() == before.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == [name for name in before if "norm" in name or "proj" in name]
    for name, linear in linears_of(model).items():
        for old, new in zip(before[f"{name}.weight"].split(20, -1), linear.weight.split(20, -1), strict=True):
            factor = (new.abs().sum(-1) / old.abs().sum(-1)).nan_to_num(1.0)  # one factor a group
            torch.testing.assert_close(new, old * factor[:, None])
        assert linear.grid.scale.dtype == torch.float16
        assert torch.equal(linear.weight, codes[name] * spread(linear.grid.scale.float(), 20, linear.weight))
    clips = [transform.grid.clip.item() for transform in standing(model).values()]
    assert len(clips) == (8 if a_bits < 16 else 0)
    assert all(clip != torch.tensor(0.9).item() for clip in clips)
    assert not any(p.requires_grad for p in model.parameters())


def test_interrupted_it_leaves_what_was_learned_so_far(quantised, tiny_model, tokens, monkeypatch):
    """Norms, clips and weights of one moment, not some of them as before."""
    model, lessons = quantised(), teach(tiny_model(), tokens(4, 64))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first, loss, made = total(model, lessons), Lessons.loss, []

    def at_the_ninth(self, model, pieces):
        made.append(pieces)
        if len(made) == 9:
            raise KeyboardInterrupt
        return loss(self, model, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(Lessons, "loss", at_the_ninth)
        with pytest.raises(KeyboardInterrupt):
            tune(model, lessons, Steps(40))
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)]
    assert moved == [name for name in before if "norm" in name or "proj" in name]
    for linear in linears_of(model).values():
        codes = codes_of(linear)
        assert torch.equal(linear.weight, codes * spread(linear.grid.scale.float(), 20, codes))
    assert total(model, lessons) < first


def test_a_group_wider_than_a_row_is_the_row(tiny_model):
    model = tiny_model()
    quantize_model(model, 4, 16, 10**9)
    linear = next(iter(linears_of(model).values()))
    form = OnGrid(linear)
    assert form.factor.shape == (48, 1)
    assert torch.equal(form(linear.weight), linear.weight)


def test_gradients_of_scales_against_finite_differences(tiny_model, tokens):
    lessons, first = teach(tiny_model().double(), tokens(1, 16)), torch.tensor([0])
    model = tiny_model().double()
    quantize_model(model, 3, 16, 20)
    linear = model.get_submodule(site_targets(model, "down")[0])
    form = OnGrid(linear).double()
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", form, unsafe=True)
    lessons.loss(model, first).backward()
    for i, j in [(0, 0), (5, 2), (47, 4)]:  # the last group of 96 columns holds 16
        sides = []
        for change in (3e-2, -6e-2):
            form.factor.data[i, j] += change
            sides.append(lessons.loss(model, first).item())
        form.factor.data[i, j] += 3e-2
        assert form.factor.grad[i, j].item() == pytest.approx((sides[0] - sides[1]) / 6e-2, rel=0.03)


def test_an_interrupted_one_goes_on_as_if_nothing_had_been(quantised, tiny_model, tokens, monkeypatch):
    monkeypatch.setattr(steps, "KEEP_EVERY", 2)
    lessons, kept = teach(tiny_model(), tokens(4, 64)), []
    whole, resumed = quantised(), quantised()
    keep = lambda state: kept.append({k: v.clone() for k, v in state.items()})  # noqa: E731
    tune(whole, lessons, Steps(5, keep=keep))
    tune(resumed, lessons, Steps(5, keep=keep, resume=kept[0]))
    assert [int(state["step"]) for state in kept] == [2, 4, 4]  # the second time from step 2 on
    assert all(torch.equal(p, resumed.get_parameter(name)) for name, p in whole.named_parameters())
    assert {name.split(".")[-1] for name, _ in whole.named_parameters()} == {"weight", "clip"}


def test_weights_are_rounded_first(tiny_model, tokens):
    with pytest.raises(
        RuntimeError, match=r"tune needs a model whose weights are rounded: call quantize_model\(model\)"
    ):
        tune(tiny_model(), teach(tiny_model(), tokens()))
