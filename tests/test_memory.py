"""The peak of memory is of what ran meanwhile, not of what ran before."""

import mmap
import re

import pytest
import torch

from jqlib.memory import STATUS, PeakMemory, free_bytes

MEGABYTES = 200


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", STATUS.read_text())[1]) * 1024


@pytest.mark.skipif(PeakMemory().measured()["peak_rss_bytes"] is None, reason="only Linux can forget an earlier peak")
def test_a_peak_is_seen_and_the_next_one_does_not_inherit_it():
    before, first = resident(), PeakMemory()
    with mmap.mmap(-1, MEGABYTES * 10**6) as pages:  # not the allocator's: it may hand out what it holds already
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1
    peak = first.measured()["peak_rss_bytes"]
    assert peak >= before + 0.95 * MEGABYTES * 10**6
    later = PeakMemory().measured()["peak_rss_bytes"]
    assert later <= peak - 0.9 * MEGABYTES * 10**6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_peak_is_not_known():
    assert PeakMemory().measured()["peak_gpu_bytes"] is None


def test_what_is_free_can_be_bounded(monkeypatch):
    monkeypatch.setenv("JOINTQUANT_MEMORY", "1e6")
    assert free_bytes(torch.device("cpu")) == 10**6
    monkeypatch.setenv("JOINTQUANT_MEMORY", "8GB")
    with pytest.raises(ValueError, match="JOINTQUANT_MEMORY='8GB': expected a number of bytes, such as 8e9"):
        free_bytes(torch.device("cpu"))
