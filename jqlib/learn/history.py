"""The history of a training: what a solver has reached, and when."""

import time

from torch import Tensor

from jqlib.learn.objectives import Loss, mean_value
from jqlib.transform.orthogonal import orthogonality_error


class Recorder:
    """Fills ``history``. The time it spends on measuring the loss over all tokens is not counted.

    If the solver does not know the loss, steps are recorded at growing intervals (10%).
    ``falling``: a step counts only if it is the lowest so far (one on a minibatch may raise the loss over all tokens).
    """

    def __init__(self, history: list[dict] | None, batches, objective: Loss, falling: bool):
        self.history, self.batches, self.objective, self.falling = history, batches, objective, falling
        self.step = self.due = 0
        self.start = time.perf_counter()

    def __call__(self, R: Tensor, loss: float | None = None) -> None:
        """Record R; ``loss`` over all tokens, where the solver knows it, need not be measured."""
        if self.history is None:
            return
        if loss is not None or self.step >= self.due:
            self._add(R, loss)
            self.due = self.step + 1 + self.step // 10
        self.step += 1

    def finish(self, R: Tensor) -> None:
        """The history ends now and with the R that is returned: forget what minibatch steps reached in passing."""
        if self.history is None:
            return
        self.step -= 1
        now = time.perf_counter()
        loss = mean_value(self.batches, R, self.objective).mean().item()
        self.start += time.perf_counter() - now
        while self.history and (self.history[-1]["step"] >= self.step or self._in_passing(loss)):
            self.history.pop()
        self._add(R, min(loss, self.history[-1]["loss"]) if self.falling and self.history else loss)

    def _in_passing(self, loss: float) -> bool:
        return self.falling and self.history[-1]["loss"] < loss * (1 - 1e-6)

    def _add(self, R: Tensor, loss: float | None = None) -> None:
        now = time.perf_counter()
        loss = mean_value(self.batches, R, self.objective).mean().item() if loss is None else loss
        if not (self.falling and self.history) or loss <= self.history[-1]["loss"]:
            error = orthogonality_error(R)
            self.history.append({"step": self.step, "seconds": now - self.start, "loss": loss, "orthogonality": error})
        self.start += time.perf_counter() - now
