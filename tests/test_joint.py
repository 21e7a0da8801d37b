import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from jqlib.choices import Solver
from jqlib.learn.objectives import OBJECTIVES, mean_value
from jqlib.learn.rotations import initial_rotation, train_r1_joint
from jqlib.learn.solver import Minibatches, minimise
from jqlib.transform.orthogonal import nearby_polar, orthogonality_error, polar

N, LAYERS = 16, 4
SOLVERS = get_args(Solver)


def layers(seed: int = 0, tokens: int = 100, n: int = N, count: int = LAYERS) -> dict[str, torch.Tensor]:
    """Heavy-tailed data with outlier channels, RMS 1 a token, as behind a norm."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(n, generator=generator).exp()
    acts = {}
    for i in range(count):
        x = torch.randn(tokens, n, generator=generator) * scales * (1 + 0.2 * torch.randn(n, generator=generator))
        acts[f"layer.{i}"] = x / x.square().mean(-1, keepdim=True).sqrt()
    return acts


def loss_of(acts, R, objective: str = "whip") -> float:
    X = torch.cat(list(acts.values()))
    return mean_value([X[None]], R[None], OBJECTIVES[objective]).item()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_descends_on_all_layers(objective, seed):
    acts, history = layers(seed), []
    R = train_r1_joint(acts, N, LAYERS, objective=objective, seed=seed, history=history)
    assert len(history) > 2
    steps = [row["step"] for row in history]
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert history[-1]["loss"] < 0.99 * history[0]["loss"]
    assert history[-1]["loss"] == pytest.approx(loss_of(acts, R, objective), rel=1e-5)
    assert max(row["orthogonality"] for row in history) <= 1e-5
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


@pytest.mark.parametrize("seed", range(3))
def test_a_history_holds_new_lows_where_early_steps_see_a_sample(seed):
    """A step on a sample may rise over all tokens: it is not recorded."""
    history = []
    train_r1_joint(layers(seed, tokens=1000), N, LAYERS, seed=seed, history=history)
    losses = [row["loss"] for row in history]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("seed", range(3))
def test_ends_below_published_sgd(seed):
    acts = layers(seed, tokens=1000)
    joint = train_r1_joint(acts, N, LAYERS, seed=seed)
    published = train_r1_joint(acts, N, LAYERS, lr=1e-3, epochs=10, solver="sgd", seed=seed)
    assert loss_of(acts, joint) < loss_of(acts, published) < loss_of(acts, initial_rotation(N, "hadamard", seed))


@pytest.mark.parametrize("init_mode", ["hadamard", "random", "identity"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_orthogonal_seeded_and_plain(solver, init_mode):
    arguments = {"init_mode": init_mode, "solver": solver, "max_steps": 4}
    R = train_r1_joint(layers(), N, LAYERS, **arguments, seed=5)
    assert R.shape == (N, N)
    assert R.dtype == torch.float32
    assert not R.requires_grad
    assert orthogonality_error(R) <= 1e-5
    assert torch.equal(R, train_r1_joint(layers(), N, LAYERS, **arguments, seed=5))
    if init_mode != "identity":
        assert not torch.equal(R, train_r1_joint(layers(), N, LAYERS, **arguments, seed=6))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("init_mode", ["hadamard", "random", "identity"])
def test_no_steps_returns_the_start(solver, init_mode):
    history = []
    R = train_r1_joint(layers(), N, LAYERS, init_mode=init_mode, solver=solver, max_steps=0, seed=3, history=history)
    assert torch.equal(R, initial_rotation(N, init_mode, 3))
    assert len(history) == 1
    assert history[0]["loss"] == pytest.approx(loss_of(layers(), R), rel=1e-5)


def degenerate(kind: str) -> dict[str, torch.Tensor]:
    x = torch.randn(200, N, generator=torch.Generator().manual_seed(0))
    return {"a": {
        "zero": torch.zeros(200, N),
        "constant": torch.full((200, N), 3.0),
        "one token": x[:1],
        "rank 1": x[:, :1] * x[:1],
        "rank 3": x[:, :3] @ x[:3],
        "ill-conditioned": x * torch.logspace(-4, 4, N),
        "large": 1e6 * x,
        "one dead channel": x * (torch.arange(N) > 0),
    }[kind]}  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "kind",
    ["zero", "constant", "one token", "rank 1", "rank 3", "ill-conditioned", "large", "one dead channel"],
)
def test_degenerate_data_gives_a_rotation(kind, objective):
    acts, history = degenerate(kind), []
    R = train_r1_joint(acts, N, 1, objective=objective, history=history)
    assert orthogonality_error(R) <= 1e-5
    assert loss_of(acts, R, objective) <= history[0]["loss"] * (1 + 1e-6)


@pytest.mark.parametrize("solver", SOLVERS[1:])
@pytest.mark.parametrize("kind", ["zero", "constant", "one token", "rank 1", "ill-conditioned"])
def test_degenerate_data_gives_a_rotation_from_the_baselines(kind, solver):
    assert orthogonality_error(train_r1_joint(degenerate(kind), N, 1, solver=solver)) <= 1e-5


def test_greedy_warm_starts_each_layer_from_the_one_before():
    acts, history = layers(), []
    R = train_r1_joint(acts, N, LAYERS, solver="greedy", max_steps=5, seed=1, history=history)
    by_hand = initial_rotation(N, "hadamard", 1)[None]
    for x in acts.values():
        tokens = Minibatches({"layer": x[None]}, seed=1)
        by_hand = minimise(tokens, by_hand, OBJECTIVES["whip"], record=lambda *_: None, max_steps=5)
    torch.testing.assert_close(R, by_hand[0])
    assert [row["step"] for row in history] == list(range(LAYERS + 1))
    backwards = dict(reversed(acts.items()))
    assert not torch.allclose(R, train_r1_joint(backwards, N, LAYERS, solver="greedy", max_steps=5, seed=1), atol=1e-3)


def test_joint_does_not_depend_on_the_order_of_layers():
    acts = layers()
    R, backwards = (train_r1_joint(a, N, LAYERS, max_steps=5) for a in (acts, dict(reversed(acts.items()))))
    torch.testing.assert_close(R, backwards, rtol=0, atol=1e-4)


def test_inputs_are_not_changed_and_may_be_bfloat16():
    acts = {name: x.bfloat16() for name, x in layers().items()}
    before = {name: x.clone() for name, x in acts.items()}
    assert orthogonality_error(train_r1_joint(acts, N, LAYERS)) <= 1e-5
    assert all(torch.equal(acts[name], x) for name, x in before.items())


@pytest.mark.parametrize(("solver", "lines"), [("mm", 1), ("greedy", 1), ("sgd", 0), ("adam", 0), ("cayley", 0)])
def test_says_once_that_no_learning_rate_is_needed(caplog, solver, lines):
    with caplog.at_level(logging.INFO):
        train_r1_joint(layers(), N, LAYERS, lr=0.1, solver=solver, max_steps=3)
    assert caplog.text.count("needs no learning rate") == lines


def spoiled(value: float):
    acts = layers()
    acts["layer.2"][7, 3] = value
    return acts


def two_sites_a_layer(count: int) -> dict[str, torch.Tensor]:
    """As a model names them: as many tensors as `layers` gives, of half as many layers."""
    names = [f"layers.{i}.{site}" for i in range(count) for site in ("q", "up")]
    return dict(zip(names, layers(count=2 * count).values(), strict=True))


def test_layers_are_counted_by_their_numbers():
    assert orthogonality_error(train_r1_joint(two_sites_a_layer(2), N, 2, max_steps=2)) <= 1e-5


@pytest.mark.parametrize(("acts", "arguments", "error", "message"), [
    (spoiled(torch.nan), {}, FloatingPointError, "NaN or Inf in the activations of layer.2"),
    (spoiled(torch.inf), {}, FloatingPointError, "NaN or Inf in the activations of layer.2"),
    (spoiled(-torch.inf), {"max_steps": 0}, FloatingPointError, "layer.2"),
    (layers(count=3), {}, ValueError, "all 4 layers; got those of 3: layer.0, layer.1, layer.2"),
    ({}, {}, ValueError, "all 4 layers; got those of 0"),
    (two_sites_a_layer(2), {}, ValueError, "all 4 layers; got those of 2: layers.0.q, layers.0.up, layers.1.q"),
    (layers(n=12), {}, ValueError, r"layer.0 have shape \(100, 12\), expected \(tokens, 16\)"),
    ({**layers(), "x": torch.ones(N)}, {}, ValueError, r"x have shape \(16,\)"),
    ({**layers(), "x": torch.ones(2, 5, N)}, {}, ValueError, r"x have shape \(2, 5, 16\)"),
    ({**layers(), "x": torch.ones(0, N)}, {}, ValueError, r"x have shape \(0, 16\)"),
    (layers(), {"solver": "newton"}, ValueError, "solver='newton' is unknown; there are mm, sgd, adam, cayley, greedy"),
    (layers(), {"objective": "wipe"}, ValueError, "objective='wipe' is unknown; there are whip"),
    (layers(), {"init_mode": "zeros"}, ValueError, "init_mode='zeros' is unknown; there are hadamard"),
    (layers(), {"solver": "newton", "max_steps": 0}, ValueError, "solver='newton' is unknown"),
    (layers(), {"solver": "sgd", "lr": torch.inf}, FloatingPointError, "lr=inf: lower lr"),
    (layers(), {"solver": "cayley", "lr": torch.inf}, FloatingPointError, "lr=inf: lower lr"),
    (layers(), {"solver": "sgd", "epochs": 0}, ValueError, "epochs=0: at least 1 is needed"),
    (layers(), {"solver": "sgd", "max_steps": -1}, ValueError, "max_steps=-1: 0 or more are needed"),
    (layers(), {"max_steps": -1}, ValueError, "max_steps=-1: 0 or more are needed"),
])  # fmt: skip
def test_bad_input(acts, arguments, error, message):
    with pytest.raises(error, match=message):
        train_r1_joint(acts, N, LAYERS, **arguments)


@pytest.mark.parametrize("kind", ["random", "singular", "zero", "ill-conditioned", "tiny", "huge"])
def test_polar_is_the_nearest_rotation(kind, orthogonal):
    M = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0))
    M = {"random": M, "singular": M[:, :, :2] @ M[:, :2, :], "zero": 0 * M, "tiny": 1e-20 * M, "huge": 1e15 * M,
         "ill-conditioned": M * torch.logspace(-8, 8, 12)}[kind]  # fmt: skip
    R = polar(M)
    assert orthogonality_error(R) <= 1e-5
    inner = (R * M).sum((1, 2))  # ‖R − M‖² = const − 2⟨R, M⟩
    for seed in range(20):
        other = orthogonal(12, seed, torch.float32)
        assert torch.all(inner >= (other * M).sum((1, 2)) - 1e-5 * M.abs().amax())
    nuclear = torch.linalg.svdvals(M.double()).sum(-1)
    torch.testing.assert_close(inner.double(), nuclear, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("stretch", [0.5, 1.01, 1.7, 1.9, 2.2, 2.8, 10.0])
def test_nearby_polar_equals_polar_however_far(stretch, orthogonal):
    """An extrapolation by beta = 0.9 has singular values up to 2.8, where plain Newton–Schulz diverges or flips."""
    scale = torch.ones(12)
    scale[::3] = stretch
    M = orthogonal(12, 0, torch.float32) * scale
    torch.testing.assert_close(nearby_polar(M), polar(M), rtol=0, atol=1e-5)


class Mapped:
    """Batches in files, opened one at a time."""

    def __init__(self, folder, batches):
        self.paths = [folder / f"{i}.bin" for i in range(len(batches))]
        for path, x in zip(self.paths, batches, strict=True):
            path.write_bytes(x.numpy().tobytes())

    def __len__(self):
        return len(self.paths)

    def __iter__(self):
        for path in self.paths:
            yield torch.from_file(str(path), size=path.stat().st_size // 4).view(-1, N)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stream_of_files_gives_what_the_same_batches_in_memory_give(tmp_path, objective):
    X = torch.cat(list(layers(tokens=600).values()))
    batches = list(X[torch.randperm(len(X), generator=torch.Generator().manual_seed(0))].split(150))
    history = []
    R = train_r1_joint(Mapped(tmp_path, batches), N, LAYERS, objective=objective, max_steps=20, history=history)
    assert torch.equal(R, train_r1_joint(batches, N, LAYERS, objective=objective, max_steps=20))
    assert orthogonality_error(R) <= 1e-5
    assert history[-1]["loss"] < 0.99 * history[0]["loss"]
    assert history[-1]["loss"] == pytest.approx(loss_of({"all": X}, R, objective), rel=1e-5)


def test_a_data_loader_of_small_batches():
    """Batches smaller than a step wants are taken together; a TensorDataset's come in lists."""
    X = torch.cat(list(layers(tokens=600).values()))
    loader = DataLoader(TensorDataset(X), batch_size=20)
    R = train_r1_joint(loader, N, LAYERS)
    large = train_r1_joint(list(X.split(160)), N, LAYERS)  # 160 is 8 times 20, and more than 8 tokens a channel
    assert loss_of({"all": X}, R) == pytest.approx(loss_of({"all": X}, large), rel=0.02)


@pytest.mark.parametrize("solver", ["sgd", "adam", "cayley"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_baseline_lowers_every_objective(solver, objective):
    lr = {"sgd": 1e-3, "adam": 1e-3, "cayley": 1e-4}[solver]
    acts, history = layers(), []
    train_r1_joint(acts, N, LAYERS, solver=solver, objective=objective, lr=lr, history=history)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(("stream", "arguments", "error", "message"), [
    ((x for x in layers().values()), {}, ValueError, "acts is a generator: give a dict, or batches that have a length"),
    ([spoiled(torch.nan)["layer.2"]], {}, FloatingPointError, "NaN or Inf in batch 0 of the activations"),
    ([], {}, ValueError, "acts holds no batches"),
    ([torch.ones(5, N), torch.ones(5, 7)], {}, ValueError, r"batch 1 of the activations have shape \(5, 7\)"),
    ([torch.ones(5, N)], {"solver": "sgd"}, ValueError, "solver='sgd' needs the activations of all layers in memory"),
])  # fmt: skip
def test_bad_streams(stream, arguments, error, message):
    with pytest.raises(error, match=message):
        train_r1_joint(stream, N, LAYERS, **arguments)


def test_two_processes_find_what_one_finds(tmp_path):
    """Under torchrun each process holds half of the layers; one all-reduce a step makes them one."""
    acts = layers(tokens=600)
    torch.save(acts, tmp_path / "acts.pt")
    script = Path(__file__).with_name("torchrun_r1.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for steps, tolerance in ((3, 1e-4), (None, 1e-2)):
        alone = train_r1_joint(acts, N, LAYERS, max_steps=steps)
        together = [torch.load(tmp_path / f"{steps}-{rank}.pt") for rank in range(2)]
        assert torch.equal(*together)
        torch.testing.assert_close(together[0], alone, rtol=0, atol=tolerance)
        assert loss_of(acts, together[0]) == pytest.approx(loss_of(acts, alone), rel=1e-5)
