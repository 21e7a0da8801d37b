"""Layer by layer: nearer to the FP layers than GPTQ alone, on the grid, and it goes on where it was."""

import pytest
import torch

from jqlib.learn.layerwise import round_layer_by_layer
from jqlib.learn.lessons import teach
from jqlib.learn.rounded import INSIDE, OnGrid, Placed
from jqlib.learn.steps import Steps
from jqlib.model.families import linears_of, sites_of
from jqlib.model.walk import walk
from jqlib.quant.gptq import gptq
from jqlib.quant.packed import codes_of, pack_weights, set_weight, unpack_weights, vectors_of
from jqlib.quant.quantize import round_inputs, round_weights
from jqlib.transform.build import build, transforms_of
from jqlib.transform.grids import spread
from jqlib.transform.transform import Grid


def grids_of(model, bits: int = 4) -> dict[str, Grid]:
    return {name: Grid(bits, 0.9) for name in sites_of(model)}


def errors(model, exact, windows) -> list[float]:
    """Each layer's output, against FP's: squared error by the token's energy, mean."""
    pairs = []
    for step, plain in zip(walk(model, windows), walk(exact, windows), strict=True):
        step.forward()
        plain.forward()
        x, y = step.hidden, plain.hidden
        pairs.append(((x - y).square().sum(-1) / y.square().sum(-1)).mean().item())
    return pairs


@pytest.mark.parametrize("a_bits", [4, 16])
def test_every_layer_is_nearer_to_fp_than_gptq_leaves_it(tiny_model, tokens, a_bits):
    windows, unseen = tokens(16, 64), tokens(4, 64, seed=1)
    model, other, exact = tiny_model(), tiny_model(), tiny_model()
    round_layer_by_layer(model, windows, 3, 20, grids_of(model, a_bits), Steps(60, tokens=256))
    round_weights(other, 3, 20, "gptq", windows[::4], "quantised", grids_of(model, a_bits))
    round_inputs(other, grids_of(model, a_bits))
    for text in (windows, unseen):
        pairs = zip(errors(model, exact, text), errors(other, exact, text), strict=True)
        assert all(ours < 0.97 * gptqs for ours, gptqs in pairs)
    lessons = teach(exact, unseen)
    every = torch.arange(len(unseen))
    assert lessons.loss(model, every) < lessons.loss(other, every)


def test_what_it_leaves_lies_on_the_grid_and_is_all_in_its_tensors(tiny_model, tokens):
    model, again, windows = tiny_model(), tiny_model(), tokens(8, 32)
    round_layer_by_layer(model, windows, 4, 20, grids_of(model), Steps(10, tokens=64))
    for name, linear in linears_of(model).items():
        codes = codes_of(linear)
        assert -8 <= codes.min() <= codes.max() <= 7, name
        assert linear.grid.scale.dtype == torch.float16
        assert torch.equal(linear.weight, codes * spread(linear.grid.scale.float(), 20, codes))
    assert not any(p.requires_grad for p in model.parameters())
    round_inputs(again, grids_of(again))
    unpack_weights(again, pack_weights(model) | vectors_of(model), 4, 20)
    assert torch.equal(model(windows).logits, again(windows).logits)


def test_activations_left_alone_behind_a_transform_that_runs(tiny_model, tokens):
    """W4A16 with R4: its site has a transform and no grid, so no clip to learn."""
    model, windows = tiny_model(), tokens(8, 32)
    build(model, transforms_of(model, online=("down",)))
    exact = model(windows).logits
    round_layer_by_layer(model, windows, 8, 20, grids_of(model, 16), Steps(2, tokens=64))
    torch.testing.assert_close(model(windows).logits, exact, rtol=0, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_learn(tiny_model, tokens, dtype):
    """Outputs whose squares float16 can't hold; gains of bfloat16, whose next number above 1 is two steps away."""
    model, windows = tiny_model(dtype=dtype), tokens(8, 32)
    model.get_input_embeddings().weight.data *= 400
    round_layer_by_layer(model, windows, 3, 20, grids_of(model), Steps(40, tokens=256))
    fp, found = tiny_model(dtype=dtype).state_dict(), model.state_dict()
    gains = torch.cat([found[name].float() / fp[name].float() for name in fp if "layernorm" in name])
    assert gains.isfinite().all()
    assert (gains > 1).float().mean() > 0.1
    assert (gains < 1).float().mean() > 0.1


def test_it_resumes_at_the_layer_it_was_at(tiny_model, tokens):
    windows, kept = tokens(8, 32), []
    whole, resumed = tiny_model(), tiny_model()
    round_layer_by_layer(whole, windows, 4, 20, grids_of(whole), Steps(10, tokens=64, keep=kept.append))
    assert len(kept) == len(linears_of(whole)) // 7
    state = {name: tensor.clone() for name, tensor in kept[0].items()}
    round_layer_by_layer(resumed, windows, 4, 20, grids_of(resumed), Steps(10, tokens=64, resume=state))
    assert torch.equal(whole(windows).logits, resumed(windows).logits)


def test_codes_begin_as_gptqs_and_where_its_weights_stood(tiny_model):
    linear = next(iter(linears_of(tiny_model()).values()))
    X = torch.randn(200, linear.in_features, generator=torch.Generator().manual_seed(0))
    rounded, scale, aim = gptq(linear.weight, X.T @ X, 4, 20)
    set_weight(linear, rounded, scale, 4, 20)
    form, cells = OnGrid(linear, aim), aim / spread(scale, 20, aim)
    torch.testing.assert_close(form(linear.weight), rounded)
    inside = (cells - codes_of(linear)).abs() < INSIDE
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(form.place[inside], cells[inside])
    assert (form.place - codes_of(linear)).abs().max() <= INSIDE


def test_slopes_go_straight_through_the_rounding_but_not_off_the_grid():
    place, scale = torch.tensor([[0.2, -0.4, 9.0, 1.3]]), torch.tensor([[2.0, 0.5]])
    slope = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    place.requires_grad_(), scale.requires_grad_()
    found = Placed.apply(place, scale, 8, 2, torch.float32)
    assert found.tolist() == [[0, 0, 3.5, 0.5]]
    found.backward(slope)
    assert place.grad.tolist() == [[2, 4, 0, 2]]  # each the slope times the scale
    assert scale.grad.tolist() == [[0, 25]]  # 3·7 + 4·1
