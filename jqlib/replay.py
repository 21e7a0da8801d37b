"""Many small kernels made one launch: on a GPU each would wait for Python longer than it runs."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Replayed:
    """A function of tensors, for calls with the same shapes; on a GPU it is recorded once as a CUDA graph.

    What it returns there is overwritten by the next call. Where CUDA refuses to record it, as for a function that
    waits for its own numbers, it runs as it is written; so it does on a processor.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.graph, self.can = function, None, device.type == "cuda"
        self.device = device

    def __call__(self, *given: Tensor):
        if self.can and self.graph is None:
            self._record(given)
        if self.graph is None:
            return self.function(*given)
        for kept, x in zip(self.given, given, strict=True):
            kept.copy_(x)
        self.graph.replay()
        return self.found

    def _record(self, given: tuple[Tensor, ...]) -> None:
        self.given = [x.to(self.device, copy=True) for x in given]
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(before)
        try:
            with torch.cuda.stream(aside):
                self.function(*self.given)  # what is made at first use is made now
            before.wait_stream(aside)
            with torch.cuda.graph(graph):
                self.found = self.function(*self.given)
            self.graph = graph
        except RuntimeError as error:
            self.can = False
            torch.cuda.set_stream(before)  # a capture that fails may leave its own current
            log.info("%s is not replayed: CUDA said %s", self.function, str(error).split("\n")[0])
