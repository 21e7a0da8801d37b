import pytest
import torch

from jqlib.learn.objectives import OBJECTIVES, mean_value
from jqlib.learn.rotations import initial_rotation, train_r2_independent
from jqlib.learn.solver import minimise
from jqlib.transform.orthogonal import orthogonality_error

HEADS, KV, D = 6, 2, 8
NAMES = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]


def o_inputs(seed: int = 0, tokens: int = 60) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tokens, HEADS * D, generator=generator) ** 3 for name in NAMES}


def scales(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(KV * D, generator=generator) + 0.2 for name in NAMES}


def head_data(x, kv: int, scale=None):
    """What the rotation of one kv head sees: the channels of its query heads, one after the other."""
    parts = [x[:, h * D : (h + 1) * D] for h in range(HEADS) if h // (HEADS // KV) == kv]
    return torch.cat(parts) / (1 if scale is None else scale[kv * D : (kv + 1) * D])


def whip(x, R) -> float:
    return (-(x @ R).abs()).exp().sum(-1).mean().item()


def train(acts, **arguments):
    return train_r2_independent(acts, HEADS * D, HEADS, KV, **arguments)


@pytest.mark.parametrize("init_mode", ["hadamard", "random", "identity"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_batched_heads_equal_each_head_alone(init_mode, smoothed):
    """Few steps on all tokens: a head that converged early would go on in the batch as long as another one moves."""
    acts, smooth = o_inputs(tokens=30), scales() if smoothed else None
    R2 = train(acts, init_mode=init_mode, smooth_scale=smooth, max_steps=3, seed=7)
    assert list(R2) == NAMES
    for i, name in enumerate(NAMES):
        assert R2[name].shape == (KV, D, D)
        assert R2[name].dtype == torch.float32
        for kv in range(KV):
            X = head_data(acts[name], kv, smooth and smooth[name])[None]
            start = initial_rotation(D, init_mode, 7 + i * KV + kv)[None]
            alone = minimise([X], start, OBJECTIVES["whip"], record=lambda *_: None, max_steps=3)
            torch.testing.assert_close(R2[name][kv], alone[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("solver", "tokens"), [("mm", 80), ("mm", 400), ("sgd", 80), ("greedy", 80)])
def test_every_head_descends_and_is_orthogonal(solver, tokens):
    """With 400 tokens the first steps see a sample: it must not leave a head worse than it was."""
    acts = o_inputs(tokens=tokens)
    R2 = train(acts, solver=solver)
    for i, name in enumerate(NAMES):
        assert orthogonality_error(R2[name]) <= 1e-5
        for kv in range(KV):
            x = head_data(acts[name], kv)
            assert whip(x, R2[name][kv]) < whip(x, initial_rotation(D, "hadamard", i * KV + kv))


def test_history_is_the_mean_over_heads_and_falls():
    acts, history = o_inputs(), []
    R2 = train(acts, history=history)
    losses = [row["loss"] for row in history]
    assert losses[-1] < losses[0]
    heads = [whip(head_data(acts[name], kv), R2[name][kv]) for name in NAMES for kv in range(KV)]
    assert losses[-1] == pytest.approx(sum(heads) / len(heads), rel=1e-5)


def test_smoothing_matters_and_only_where_it_is_given():
    acts, smooth = o_inputs(), scales()
    plain, both = train(acts, max_steps=3), train(acts, smooth_scale=smooth, max_steps=3)
    one = train(acts, smooth_scale={NAMES[1]: smooth[NAMES[1]]}, max_steps=3)
    torch.testing.assert_close(one[NAMES[0]], plain[NAMES[0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(one[NAMES[1]], both[NAMES[1]], rtol=0, atol=1e-5)
    assert not torch.allclose(both[NAMES[0]], plain[NAMES[0]], atol=1e-2)


def test_no_steps_seed_and_degenerate_heads():
    acts = o_inputs()
    start = train(acts, max_steps=0, seed=2)
    assert torch.equal(start[NAMES[1]][0], initial_rotation(D, "hadamard", 4))
    assert torch.equal(train(acts, seed=2)[NAMES[0]], train(acts, seed=2)[NAMES[0]])
    acts[NAMES[0]][:, : 3 * D] = 0  # the first kv head is dead
    R2 = train(acts)
    assert all(orthogonality_error(heads) <= 1e-5 for heads in R2.values())
    X = head_data(acts[NAMES[0]], 1)[None]
    start = initial_rotation(D, "hadamard", 1)[None]
    objective = OBJECTIVES["whip"]
    assert mean_value([X], R2[NAMES[0]][1][None], objective) < 0.999 * mean_value([X], start, objective)


def nan_acts():
    acts = o_inputs()
    acts[NAMES[1]][3, 3] = torch.nan
    return acts


@pytest.mark.parametrize(("acts", "heads", "arguments", "error", "message"), [
    (nan_acts(), (6, 2), {}, FloatingPointError, "NaN or Inf in the activations of model.layers.1.self_attn.o_proj"),
    (o_inputs(), (6, 4), {}, ValueError, "num_heads=6 is not a multiple of num_kv_heads=4"),
    (o_inputs(), (5, 5), {}, ValueError, r"have shape \(60, 48\), expected \(tokens, 45\)"),
    ({NAMES[0]: torch.ones(48)}, (6, 2), {}, ValueError, r"shape \(48,\)"),
    ({NAMES[0]: torch.ones(0, 48)}, (6, 2), {}, ValueError, r"shape \(0, 48\)"),
    (o_inputs(), (6, 2), {"solver": "newton"}, ValueError, "solver='newton' is unknown"),
    (o_inputs(), (6, 2), {"objective": "wipe"}, ValueError, "objective='wipe' is unknown"),
    (o_inputs(), (6, 2), {"init_mode": "zeros"}, ValueError, "init_mode='zeros' is unknown"),
    ({NAMES[0]: torch.ones(5, 48), NAMES[1]: torch.ones(6, 48)}, (6, 2), {}, ValueError, "tokens"),
    ({}, (6, 2), {}, ValueError, "no activations"),
])  # fmt: skip
def test_bad_input(acts, heads, arguments, error, message):
    with pytest.raises(error, match=message):
        train_r2_independent(acts, 48, *heads, **arguments)
