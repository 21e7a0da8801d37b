"""The loop of all stages that learn (`fisher`, `refine`, `layerwise`, `tune`): small steps of Adam.

Rates, numbers of steps and the noise of weights in these stages, and the clip of 0.9, were chosen on the articles "A"
and "Aristotle", which are validation text (`embedded`); so is all that we choose (``--eval_split``).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from jqlib.replay import Replayed

KEEP_EVERY = 25  # steps
TOGETHER = 2048  # tokens, at most, in memory at a time
BETAS, EPS = (0.9, 0.99), 1e-15  # gradients of single weights are far below Adam's usual 1e-8


@dataclass(frozen=True)
class Steps:
    """How many, each on so many ``tokens`` (in whole pieces, at least one), on text in the order of ``seed``, matrix
    products in ``dtype``.

    ``keep`` receives the state every KEEP_EVERY steps, flat tensors by name; ``resume`` continues from one. ``quiet``:
    no progress of their own.
    """

    count: int = 100
    seed: int = 0
    tokens: int = 512
    dtype: torch.dtype = torch.float32
    keep: Callable[[dict[str, Tensor]], object] | None = None
    resume: dict[str, Tensor] | None = None
    quiet: bool = False

    @property
    def together(self) -> int:
        """Tokens that are in memory at a time."""
        return min(self.tokens, TOGETHER)


def minimise_by_steps(
    knobs: dict[str, Tensor], loss_of: Callable[[Tensor], Tensor], ids: Tensor, rates: dict[str, float],
    steps: Steps, label: str, within: Callable[[], AbstractContextManager] = nullcontext,
) -> None:  # fmt: skip
    """Adam on ``knobs``, in place; the first word of a knob's name is its kind, and ``rates`` has that kind's rate.

    ``loss_of``: the mean loss on pieces of the text ``ids``, (pieces, tokens), given their numbers. Rates rise over 5
    steps and fall linearly to 0; knobs of the kind "clip" stay at 1 or less. ``within``: a loss is made, and the way
    back from it gone, within what it gives.

    Raises FloatingPointError if the loss is not finite.
    """
    groups = [{"params": [knob], "kind": name.split()[0]} for name, knob in knobs.items()]
    optimiser = torch.optim.Adam(groups, betas=BETAS, eps=EPS, fused=True)
    first = _load(steps.resume, knobs, optimiser) if steps.resume else 0
    size = max(1, steps.tokens // ids.shape[1])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(steps.seed))
    device = next(iter(knobs.values())).device
    together = max(1, steps.together // ids.shape[1])

    def backward(pieces: Tensor, share: float = 1.0) -> Tensor:
        with within():
            loss = loss_of(pieces) * share
            loss.backward()
        return loss.detach()

    def run(pieces: Tensor) -> Tensor:
        optimiser.zero_grad()
        return backward(pieces)

    whole = Replayed(run, device)
    shown = {"disable": True} if steps.quiet else {}  # False would overrule the user's TQDM_DISABLE
    with tqdm(desc=label, total=steps.count, initial=first, unit="step", **shown) as bar:
        for step in range(first, steps.count):
            pieces = order[torch.arange(step * size, (step + 1) * size) % len(ids)]
            if size <= together:
                loss = whole(pieces).item()
            else:
                optimiser.zero_grad()
                loss = sum(backward(some, len(some) / size).item() for some in pieces.split(together))
            if not math.isfinite(loss):
                raise FloatingPointError(f"{label}: the loss turned {loss} at step {step}")
            for group in optimiser.param_groups:
                group["lr"] = rates[group["kind"]] * min(1, (step + 1) / 5) * (1 - step / steps.count)
            optimiser.step()
            for clip in (group["params"][0] for group in groups if group["kind"] == "clip"):
                clip.data.clamp_(max=1)  # a ratio: beyond 1 it would feel no gradient
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if steps.keep and (step + 1) % KEEP_EVERY == 0:
                steps.keep(_state(knobs, optimiser, step + 1))


def _state(knobs: dict[str, Tensor], optimiser, step: int) -> dict[str, Tensor]:
    state = {"step": torch.tensor(step)} | {f"value {name}": p.detach() for name, p in knobs.items()}
    for name, p in knobs.items():
        state |= {f"{key} {name}": value for key, value in optimiser.state[p].items()}
    return state


def _load(state: dict[str, Tensor], knobs: dict[str, Tensor], optimiser) -> int:
    for name, p in knobs.items():
        p.data.copy_(state[f"value {name}"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimiser.state[p] = {key: state[f"{key} {name}"].to(p.device, copy=True) for key in keys}
    return int(state["step"])
