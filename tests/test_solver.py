"""The solver's own steps: which tokens each is taken on, that none on all of them rises, and when it stops."""

import itertools

import pytest
import torch
from test_joint import N, layers, loss_of
from tqdm import tqdm

from jqlib.learn.objectives import OBJECTIVES
from jqlib.learn.rotations import initial_rotation
from jqlib.learn.solver import Minibatches, _descend, minimise


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_step_on_all_tokens_descends(objective):
    """As the solver takes them; a history, which keeps new lows only, could not show a rise."""
    acts, taken = layers(0), []
    start = initial_rotation(N, "hadamard", 0)[None]
    record = lambda R, loss: taken.append((R[0], loss))  # noqa: E731
    _descend([torch.cat(list(acts.values()))[None]], start, OBJECTIVES[objective], 20, record, tqdm(disable=True))
    assert len(taken) > 2
    measured = [loss_of(acts, R, objective) for R, _ in taken]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(measured))
    assert [claimed for _, claimed in taken] == pytest.approx(measured, rel=1e-5)


def steps_on_parts(batches, objective: str, max_steps: int | None = None) -> int:
    """How many steps the solver took on less than all tokens, after which it knows no loss."""
    losses, start = [], torch.eye(N)[None]

    def record(R, loss=None):
        assert R.isfinite().all()
        losses.append(loss)

    minimise(batches, start, OBJECTIVES[objective], record=record, max_steps=max_steps)
    assert max_steps is None or len(losses) <= max_steps
    return losses.count(None)


def test_minibatches_have_eight_tokens_per_channel():
    assert len(Minibatches({"a": torch.ones(1, 300, N), "b": torch.ones(1, 200, N)})) == 500 // (8 * N)
    assert len(Minibatches({"a": torch.ones(1, 100, N)})) == 1


@pytest.mark.parametrize(("count", "max_steps", "expected"), [
    (8, None, 8 + 4 + 2), (2, None, 2), (1, None, 0), (8, 5, 5), (8, 9, 9), (8, 0, 0),
])  # fmt: skip
def test_minibatches_double_until_they_are_half_of_all(count, max_steps, expected):
    tokens = torch.cat(list(layers().values())).repeat(4, 1)[: 128 * count]  # 8 a channel in each
    assert steps_on_parts(list(tokens.view(count, 1, 128, N)), "whip", max_steps) == expected


@pytest.mark.parametrize(("objective", "expected"), [("range", 4), ("whip", 0)])
def test_what_has_no_majoriser_begins_with_adam_on_one_batch_too(objective, expected):
    assert steps_on_parts([torch.cat(list(layers().values()))[None]], objective, 4) == expected


def test_a_problem_that_is_solved_does_not_end_the_others():
    """Two in one batch, of which the first has nothing to gain: the second ends where it ends alone, and it ends."""
    x, whip, taken = torch.stack(list(layers(count=2).values())), OBJECTIVES["whip"], []
    record = lambda R, loss: taken.append(R)  # noqa: E731
    start = initial_rotation(N, "hadamard", 0)[None]
    solved = _descend([x[:1]], start, whip, 200, record, tqdm(disable=True))
    alone = _descend([x[1:]], start, whip, 200, record, tqdm(disable=True))
    taken.clear()
    both = _descend([x], torch.cat([solved, start]), whip, 200, record, tqdm(disable=True))
    assert loss_of({"x": x[1]}, both[1]) < 1.0005 * loss_of({"x": x[1]}, alone[0])
    assert loss_of({"x": x[1]}, alone[0]) < 0.99 * loss_of({"x": x[1]}, start[0])
    assert 2 < len(taken) < 200
