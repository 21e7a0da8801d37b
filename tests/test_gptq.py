"""GPTQ against brute force, against RTN in its own metric, and layer by layer on a model."""

import copy
import logging

import pytest
import torch

from jqlib.model.families import linears_of
from jqlib.quant.gptq import DAMPING, _inverse_cholesky, corrected, gptq, quantize_weights_gptq
from jqlib.quant.quantize import quantize_model
from jqlib.transform.build import fuse_layer_norms, rotate_model
from jqlib.transform.grids import group_scale, grouped, quantize_activation, quantize_weight


def problem(rows: int = 6, columns: int = 40, tokens: int = 200, seed: int = 0):
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x


def output_error(change, H):
    """The diagonal of ΔW H ΔWᵀ: (out,), for a change (out, in)."""
    return ((change @ H) * change).sum(1)


def test_closer_to_the_best_of_all_roundings_than_to_rtn():
    """4 columns of 3 bits: every rounding of a row can be tried; GPTQ's greedy choice must come near the best."""
    grid = torch.cartesian_prod(*[torch.arange(-4.0, 4)] * 4)
    best = ours = nearest = 0.0
    for seed in range(5):
        W, H = problem(rows=8, columns=4, seed=seed)
        scales = [group_scale(grouped(W, 4), 3, importance)[:, 0] for importance in (1.0, H.diagonal())]
        for w, *pair in zip(W, *scales, strict=True):
            best += min(output_error(s * grid - w, H).min() for s in pair)
        ours += output_error(gptq(W, H, 3, 4)[0] - W, H).sum()
        nearest += output_error(quantize_weight(W, 3, 4) - W, H).sum()
    assert best <= ours * (1 + 1e-5)
    assert ours - best <= 0.5 * (nearest - best)


def test_a_diagonal_hessian_leaves_nothing_to_make_up_for():
    """Unrelated inputs: rounding to nearest is the best there is, with the same weighted scales."""
    W, _ = problem()
    H = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.1)
    groups = grouped(W, 16)
    scale = group_scale(groups, 4, grouped(H.diagonal()[None], 16))
    nearest = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)[:, :40]
    torch.testing.assert_close(gptq(W, H, 4, 16)[0], nearest)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groupsize", [1, 7, 16, 40, 128])
def test_never_worse_than_rtn_in_its_own_metric(bits, groupsize):
    W, H = problem(seed=bits)
    ours = output_error(gptq(W, H, bits, groupsize)[0] - W, H)
    nearest = output_error(quantize_weight(W, bits, groupsize) - W, H)
    assert (ours <= nearest * (1 + 1e-5)).all()
    if groupsize >= 16:
        assert ours.sum() < 0.8 * nearest.sum()


@pytest.mark.parametrize("groupsize", [7, 16, 128])
def test_values_lie_on_each_groups_grid(groupsize):
    W, H = problem()
    rounded, scales, _ = gptq(W, H, 4, groupsize)
    assert torch.equal(scales, scales.half().float())  # as a file holds them
    groups = rounded.split(groupsize, dim=1)
    assert scales.shape == (len(W), len(groups))
    for rows, scale in zip(groups, scales.T, strict=True):
        codes = (rows / scale[:, None]).round()
        assert torch.equal(codes * scale[:, None], rows)
        assert -8 <= codes.min() < codes.max() <= 7


def test_blocks_of_columns_change_nothing(monkeypatch):
    W, H = problem(columns=96, tokens=400)
    whole = gptq(W, H)[0]
    monkeypatch.setattr("jqlib.quant.gptq.BLOCK", 5)
    torch.testing.assert_close(gptq(W, H)[0], whole, rtol=1e-4, atol=1e-4)


def column_by_column(W, H, scales, groupsize, bits):
    """The paper's algorithm as it is written: after each column the others make up for its error, and H⁻¹ loses it.

    Also which rows came nowhere so near to the middle between two codes that float32 could take the other one.
    """
    damped = H.double() + DAMPING * H.diagonal().double().mean() * torch.eye(len(H))
    W, inverse = W.double().clone(), torch.linalg.inv(damped)
    rounded, clear = torch.empty_like(W), torch.ones(len(W), dtype=bool)
    for j in H.diagonal().argsort(descending=True).tolist():
        scale = scales[:, j // groupsize].double()
        code = W[:, j] / scale
        clear &= ((code - code.floor()) - 0.5).abs() > 1e-4
        rounded[:, j] = code.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        row = inverse[j].clone()
        W -= torch.outer((W[:, j] - rounded[:, j]) / row[j], row)
        inverse -= torch.outer(row, row) / row[j]
    return rounded.float(), clear


@pytest.mark.parametrize(("bits", "groupsize"), [(4, 128), (4, 16), (3, 32), (2, 7)])
def test_equals_the_papers_loop(bits, groupsize):
    W, H = problem(rows=24, columns=96, tokens=400, seed=bits)
    ours, scales, _ = gptq(W, H, bits, groupsize)
    reference, clear = column_by_column(W, H, scales, groupsize, bits)
    by_gptq = (ours != quantize_weight(W, bits, groupsize)).any(1)  # other rows are better off rounded to nearest
    same = clear & by_gptq
    assert same.float().mean() > 0.7
    torch.testing.assert_close(ours[same], reference[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["one token", "dead channels", "zero"])
def test_poor_hessians(kind):
    W, H = problem()
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    alive = (torch.arange(40) % 2).float()
    H = {"one token": x.T @ x, "dead channels": H * alive * alive[:, None], "zero": 0 * H}[kind]
    rounded = gptq(W, H, 4, 16)[0]
    assert torch.isfinite(rounded).all()
    assert (output_error(rounded - W, H) <= output_error(quantize_weight(W, 4, 16) - W, H) + 1e-4).all()


def test_says_that_it_damps_more_and_gives_up_with_a_name(caplog):
    H = -0.05 * torch.eye(8) + torch.diag(torch.tensor([2.0] + [0.0] * 7))  # not positive: damping must grow
    with caplog.at_level(logging.WARNING):
        _inverse_cholesky(H, torch.arange(len(H)), "layers.3.q_proj")
    assert "layers.3.q_proj: damping 0.01 is too small" in caplog.text
    with pytest.raises(FloatingPointError, match=r"layers.3.q_proj: its Hessian has no Cholesky factor"):
        _inverse_cholesky(torch.full((4, 4), torch.nan), torch.arange(4), "layers.3.q_proj")


@torch.inference_mode()
def test_sequential_hessians_on_a_rotated_model(tiny_model, tokens, orthogonal):
    """The second layer is calibrated on what the quantised first one gives it, R4 included."""
    model = tiny_model(seed=1)
    fuse_layer_norms(model)
    R2 = {f"model.layers.{i}.self_attn.o_proj": orthogonal(8, i, torch.float32, (2,)) for i in range(2)}
    rotate_model(model, orthogonal(48, 0, torch.float32), R2, None)
    before, windows = copy.deepcopy(model), tokens(4, 64)
    quantize_weights_gptq(model, windows, 4, 16)
    half, inputs = copy.deepcopy(before), []
    half.model.layers[0] = model.model.layers[0]
    target = half.get_submodule("model.layers.1.mlp.down_proj")
    target.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    for window in windows:
        half(window[None])
    X = torch.cat(inputs)
    expected = gptq(target.weight, X.T @ X, 4, 16)[0]
    torch.testing.assert_close(model.get_submodule("model.layers.1.mlp.down_proj").weight, expected)


@torch.inference_mode()
def test_hessians_of_inputs_that_will_be_rounded(tiny_model, tokens):
    """Layer 0 is calibrated on its own inputs rounded, layer 1 on what a layer 0 in 4 bits gives it, rounded too."""
    model, windows = tiny_model(seed=1), tokens(4, 64)
    before = copy.deepcopy(model)
    quantize_model(model, 4, 4, 16, weights="gptq", calib_data=windows, gptq_inputs="quantised", a_clip=0.9)
    half = copy.deepcopy(before)
    half.model.layers[0] = model.model.layers[0]
    for layer, whole in ((0, before), (1, half)):
        target, inputs = whole.get_submodule(f"model.layers.{layer}.self_attn.v_proj"), []
        target.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
        for window in windows:
            whole(window[None])
        X = quantize_activation(torch.cat(inputs), 4, 0.9)
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        torch.testing.assert_close(model.get_parameter(name), gptq(target.weight, X.T @ X, 4, 16)[0])


def rounded_problem():
    """A weight, exact inputs whose energy lies in few directions, and the same in 3 bits."""
    generator = torch.Generator().manual_seed(0)
    energy = torch.logspace(0, -1.5, 20)
    X = (torch.randn(400, 20, generator=generator) * energy) @ torch.randn(20, 20, generator=generator)
    return torch.randn(5, 20, generator=generator), X, quantize_activation(X, 3)


def test_corrected_weights_are_the_least_squares_solution(monkeypatch):
    W, X, Xq = rounded_problem()
    monkeypatch.setattr("jqlib.quant.gptq.PRIOR", 0)
    found = corrected(W, Xq.T @ Xq, (X - Xq).T @ Xq, len(X))
    expected = torch.linalg.lstsq(Xq.double(), X.double() @ W.T.double()).solution.T
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


def test_the_prior_holds_a_correction_back(monkeypatch):
    """Few tokens teach noise: with the prior the correction is smaller, and better on other tokens."""
    W, X, Xq = rounded_problem()
    seen, later = slice(0, 30), slice(30, None)
    H, E = Xq[seen].T @ Xq[seen], (X - Xq)[seen].T @ Xq[seen]
    with_prior = corrected(W, H, E, 30)
    monkeypatch.setattr("jqlib.quant.gptq.PRIOR", 0)
    without = corrected(W, H, E, 30)
    assert 0 < (with_prior - W).norm() < (without - W).norm()

    def error(weight):
        return (Xq[later] @ weight.T - X[later] @ W.T).square().mean()

    assert error(with_prior) < min(error(without), error(W))


def test_inputs_that_are_always_zero_correct_nothing():
    W, zero = torch.ones(5, 20), torch.zeros(20, 20)
    assert torch.equal(corrected(W, zero, zero, 8), W)


@torch.inference_mode()
def test_correction_goes_site_by_site(tiny_model, tokens):
    """o_proj of layer 1 aims at the FP model's outputs, on rounded inputs that came through rounded q, k, v."""
    model, windows = tiny_model(seed=1), tokens(4, 64)
    before, target = copy.deepcopy(model), "model.layers.1.self_attn.o_proj"
    quantize_model(model, 4, 4, 16, weights="gptq", calib_data=windows, gptq_inputs="corrected", a_clip=0.9)

    def inputs_of(whole):
        found = []
        handle = whole.get_submodule(target).register_forward_pre_hook(
            lambda _, args: found.append(args[0].flatten(0, -2))
        )
        for window in windows:
            whole(window[None])
        handle.remove()
        return torch.cat(found)

    X, Xq = inputs_of(before), inputs_of(model)
    W = before.get_submodule(target).weight
    expected = gptq(corrected(W, Xq.T @ Xq, (X - Xq).T @ Xq, windows.numel()), Xq.T @ Xq, 4, 16)[0]
    torch.testing.assert_close(model.get_submodule(target).weight, expected)


@torch.inference_mode()
def test_lower_output_error_than_rtn_on_a_model(tiny_model, tokens):
    model, windows = tiny_model(seed=2), tokens(8, 64)
    logits = model(windows).logits
    errors = {}
    for weights in ("rtn", "gptq"):
        quantised = copy.deepcopy(model)
        quantize_model(quantised, 3, 16, 16, weights=weights, calib_data=windows)
        errors[weights] = (quantised(windows).logits - logits).square().mean()
        changed = {name for name, p in quantised.named_parameters() if not torch.equal(p, model.get_parameter(name))}
        assert changed == {f"{name}.weight" for name in linears_of(model)}
    assert errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("inputs", ["fp", "corrected"])
def test_failing_half_way_leaves_no_hook_of_the_walk_and_is_final(tiny_model, tokens, inputs):
    model, windows = tiny_model(), tokens(4, 64)
    model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan  # the second layer's Hessians are NaN
    with pytest.raises(FloatingPointError, match=r"model.layers.1.self_attn.q_proj: its Hessian has no Cholesky"):
        quantize_model(model, weights="gptq", calib_data=windows, gptq_inputs=inputs)
    hooked = {m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks}
    assert hooked == {m for m in model.modules() if hasattr(m, "transform")}  # grids, where inputs are rounded first
    assert bool(hooked) == (inputs == "corrected")
    assert all(len(m._forward_pre_hooks) + len(m._forward_hooks) == 1 for m in hooked)
    with pytest.raises(RuntimeError, match="quantised already"):
        quantize_model(model)


def test_bad_input(tiny_model):
    with pytest.raises(ValueError, match="weights='gptq' needs calib_data: token windows"):
        quantize_model(tiny_model(), weights="gptq")
    with pytest.raises(ValueError, match="weights='awq' is unknown; there are rtn, gptq"):
        quantize_model(tiny_model(), weights="awq")
