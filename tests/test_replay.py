"""On a processor a replayed function is the function; that a GPU replays it is in tests/gpu."""

import torch

from jqlib.replay import Replayed


def test_on_a_processor_it_runs_as_it_is_written():
    seen = []
    double = Replayed(lambda x: seen.append(len(x)) or 2 * x, torch.device("cpu"))
    assert [double(torch.ones(n)).sum().item() for n in (1, 2)] == [2, 4]
    assert seen == [1, 2]
