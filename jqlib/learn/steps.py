"""The loop of the stages that go by the loss (`fisher`, `refine`, `tune`): small steps of Adam.

The last two go by KL to the FP model's predictions (LLM-QAT, Liu et al. 2023), which says more of each token than
the text's own loss, by which SpinQuant (§3.2) learns its rotations.

Rates, numbers of steps and the noise of weights in these stages, and the clip of 0.9, were chosen by perplexity on the
articles "A" and "Aristotle", which are validation text (`embedded`); so is all that we choose (``--eval_split``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

TOKENS = 512  # of a step
KEEP_EVERY = 25  # steps


@dataclass(frozen=True)
class Steps:
    """How many, on text in the order of ``seed``. ``keep`` receives the state every KEEP_EVERY steps, flat tensors by
    name, and ``resume`` continues from one."""

    count: int = 100
    seed: int = 0
    keep: Callable[[dict[str, Tensor]], object] | None = None
    resume: dict[str, Tensor] | None = None


def minimise_by_steps(
    knobs: dict[str, Tensor], loss_of: Callable[[Tensor], Tensor], windows: Tensor, rates: dict[str, float],
    steps: Steps, label: str,
) -> None:  # fmt: skip
    """Adam on ``knobs``, in place; the first word of a knob's name is its kind, and ``rates`` has that kind's rate.

    ``loss_of``: the loss on token ids, (1, tokens). ``windows``: (windows, seqlen) of calibration text, cut into pieces
    of TOKENS, or of seqlen if that is less. Rates rise over 5 steps and fall linearly to 0; knobs of the kind "clip"
    are held at 1.

    Raises FloatingPointError if the loss is not finite.
    """
    groups = [{"params": [knob], "kind": name.split()[0]} for name, knob in knobs.items()]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    first = _load(steps.resume, knobs, optimiser) if steps.resume else 0
    length = min(TOKENS, windows.shape[1])
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(steps.seed))
    with tqdm(desc=label, total=steps.count, initial=first, unit="step") as bar:
        for step in range(first, steps.count):
            loss = loss_of(pieces[order[step % len(pieces)]][None])
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{label}: the loss turned {loss.item()} at step {step}")
            optimiser.zero_grad()
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = rates[group["kind"]] * min(1, (step + 1) / 5) * (1 - step / steps.count)
            optimiser.step()
            for clip in (group["params"][0] for group in groups if group["kind"] == "clip"):
                clip.data.clamp_(max=1)  # a ratio: beyond 1 it would feel no gradient
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
            if steps.keep and (step + 1) % KEEP_EVERY == 0:
                steps.keep(_state(knobs, optimiser, step + 1))


@torch.no_grad()
def predictions(model: nn.Module, ids: Tensor) -> Tensor:
    """The probabilities that ``model`` gives every next token, (tokens, vocabulary), float32."""
    return model(ids, use_cache=False).logits[0].float().softmax(-1)


def divergence(model: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
    """Mean KL (nats per token) of ``model``'s predictions on ``ids``, (1, tokens), from ``target``, another's."""
    logits = model(ids, use_cache=False).logits[0].float()
    return F.cross_entropy(logits, target) - torch.special.entr(target).sum(-1).mean()


def low_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16, but for processors: many that have the instructions take twice float32's time with them."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def _state(knobs: dict[str, Tensor], optimiser, step: int) -> dict[str, Tensor]:
    state = {"step": torch.tensor(step)} | {f"value {name}": p.detach() for name, p in knobs.items()}
    for name, p in knobs.items():
        state |= {f"{key} {name}": value for key, value in optimiser.state[p].items()}
    return state


def _load(state: dict[str, Tensor], knobs: dict[str, Tensor], optimiser) -> int:
    for name, p in knobs.items():
        p.data.copy_(state[f"value {name}"])
        optimiser.state[p] = {key: state[f"{key} {name}"].to(p.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
        optimiser.state[p]["step"] = state[f"step {name}"].clone()
    return int(state["step"])
