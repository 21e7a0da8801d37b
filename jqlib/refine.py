"""End-to-end refinement: what rotates, scales and clips, by the loss that counts, KL to the FP model's predictions.

A few hundred small steps from the joint solution, through straight-through rounding of the activations (SpinQuant,
eq. 2, with the norms' scales of OSTQuant and learned clips). Weights stay as they are: whoever rounds them (GPTQ)
wants rotations trained for activations alone. The model stays in its own basis too: a site's input x is rotated,
rounded and turned back, which costs two products with a rotation a site, and no merging of weights at any step.
"""

from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jqlib.distill import Keep, distill, divergence, low_precision, predictions
from jqlib.hadamard import hadamard_transform
from jqlib.models import linears_of, norms_of, on_input, site_targets, sites_of
from jqlib.quant import OFF, quantize_activation
from jqlib.rotation import fuse_layer_norms
from jqlib.smooth import expand_to_heads

RATES = {"R1": 4e-4, "R2": 8e-4, "scale": 1e-2, "smooth": 1e-2, "clip": 2e-3}  # Adam's; scales: of norms behind R1


class Refined(NamedTuple):
    """What `rotate_model` and `quantize_model` take; the dicts are by a site's first reader."""

    R1: Tensor | None
    R2: dict[str, Tensor]
    norm_scale: dict[str, Tensor]
    smooth_scale: dict[str, Tensor]
    clips: dict[str, float]


def refine(
    model: nn.Module,
    windows: Tensor,
    R1: Tensor | None,
    R2: dict[str, Tensor],
    smooth_scale: dict[str, Tensor],
    *,
    a_bits: int = 4,
    a_clip: float = 0.9,
    o_per_head: bool = True,
    norm_scale: dict[str, Tensor] | None = None,
    learn: tuple[str, ...] = tuple(RATES),
    steps: int = 100,
    seed: int = 0,
    keep: Keep | None = None,
    resume: dict[str, Tensor] | None = None,
) -> Refined:
    """R1, R2, smoothing scales of ``o`` and ``down``, a scale a channel of every norm, and a clip a site, refined.

    ``model``: as loaded; it is copied, not changed. ``windows``: (windows, seqlen) of calibration text. R1 to
    ``o_per_head`` as `rotate_model` and `quantize_model` take them, the rest as `distill` does. R2 of every layer is
    needed, R4 is on; without R1 the sites of norms have a Hadamard transform online, and their scales are in
    ``smooth_scale``; behind R1 those of ``norm_scale`` are where they start, or 1. ``learn``: which kinds move, of
    "R1", "R2", "scale" (of norms behind R1), "smooth" (of the other sites) and "clip".

    Raises ValueError for ``a_bits`` outside 2..15, an unknown kind or a layer without R2, FloatingPointError where
    the loss is not finite.
    """
    if not 2 <= a_bits < OFF:
        raise ValueError(f"a_bits={a_bits}: refine learns by the rounding of activations, to 2..15 bits")
    if not learn or not {*learn} <= {*RATES}:
        raise ValueError(f"learn={learn!r}: expected some of {', '.join(RATES)}")
    if missing := [name for name in site_targets(model, "o") if name not in R2]:
        raise ValueError(f"refine needs R2 of every layer; there is none for {missing[0]}")
    model = working_copy(model, fuse=R1 is not None)
    knobs = _knobs(model, R1, R2, smooth_scale | (norm_scale or {}), a_clip)
    simulated = Simulation(model, R1, R2, knobs, a_bits, o_per_head)
    learned = {name: knob.requires_grad_() for name, knob in knobs.items() if name.split()[0] in learn}
    distill(
        learned, simulated.loss, windows, RATES, label="refining", steps=steps, seed=seed, keep=keep, resume=resume
    )  # fmt: skip
    return simulated.result()


def working_copy(model: nn.Module, fuse: bool) -> nn.Module:
    """A copy whose weights want no gradient; off the CPU its layers' linears are bfloat16, as `low_precision` wants."""
    model = deepcopy(model).requires_grad_(False)
    if fuse:
        fuse_layer_norms(model)
    if model.device.type != "cpu":
        for linear in linears_of(model):
            linear.bfloat16()
    return model


class Simulation:
    """The model with every site's input rounded as the rotated model's would be, and back in its own basis."""

    def __init__(self, model, R1: Tensor | None, R2: dict[str, Tensor], knobs: dict, a_bits: int, o_per_head: bool):
        self.model, self.knobs, self.bits, self.o_per_head, self.on = model, knobs, a_bits, o_per_head, False
        self.R1, self.R2 = R1, {name: R.to(model.device) for name, R in R2.items()}
        for name, (layer, site) in sites_of(model).items():
            change = self.heads if name in R2 else self.stream if site.norm and R1 is not None else self.online
            on_input(model, layer, site, partial(self.switched, change, name))

    def switched(self, change, name: str, x: Tensor) -> Tensor:
        return change(name, x.float()).to(x.dtype) if self.on else x

    def loss(self, ids: Tensor) -> Tensor:
        """Mean KL (nats a token) from the FP model's predictions on ``ids``, (1, tokens)."""
        if self.R1 is not None:
            self.turned1 = turned(self.R1.to(self.model.device), self.knobs["R1"])
        self.turned2 = {name: turned(R, self.knobs[f"R2 {name}"]) for name, R in self.R2.items()}
        ids = ids.to(self.model.device)
        with low_precision(self.model.device):
            self.on = False
            target = predictions(self.model, ids)
            self.on = True
            return divergence(self.model, ids, target)

    def stream(self, name: str, x: Tensor) -> Tensor:
        scale = self.knobs[f"scale {name}"].exp()
        return self.rounded(name, x @ self.turned1 * scale) / scale @ self.turned1.T

    def heads(self, name: str, x: Tensor) -> Tensor:
        R = self.turned2[name]  # (kv, d, d)
        scale = expand_to_heads(self.model, self.knobs[f"smooth {name}"].exp(), x.shape[-1])
        y = (x / scale).unflatten(-1, (len(R), -1, R.shape[-1]))  # (..., kv, group, d)
        y = torch.einsum("...kgd,kde->...kge", y, R)
        y = self.rounded(name, y) if self.o_per_head else self.rounded(name, y.flatten(-3)).view(y.shape)
        return torch.einsum("...kge,kde->...kgd", y, R).flatten(-3) * scale

    def online(self, name: str, x: Tensor) -> Tensor:
        scale = self.knobs[f"smooth {name}"].exp()
        return hadamard_transform(self.rounded(name, hadamard_transform(x / scale)), inverse=True) * scale

    def rounded(self, name: str, y: Tensor) -> Tensor:
        return quantize_activation(y.float(), self.bits, self.knobs[f"clip {name}"])

    @torch.no_grad()
    def result(self) -> Refined:
        """What was found; smoothing scales that are all 1 are none."""
        found: dict[str, dict] = {kind: {} for kind in RATES}
        for knob, value in self.knobs.items():
            kind, _, name = knob.partition(" ")
            found[kind][name] = value.detach().cpu()
        return Refined(
            turned(self.R1.cpu(), found["R1"][""]) if self.R1 is not None else None,
            {name: turned(R.cpu(), found["R2"][name]) for name, R in self.R2.items()},
            {name: scale.exp() for name, scale in found["scale"].items()},
            {name: scale.exp() for name, scale in found["smooth"].items() if scale.any()},
            {name: clip.item() for name, clip in found["clip"].items()},
        )


def _knobs(model, R1: Tensor | None, R2: dict[str, Tensor], scales: dict[str, Tensor], a_clip: float):
    """What is learned, by name: skew generators of the turns of R1 and R2, logarithms of scales, clips."""
    knobs = {"R1": torch.zeros_like(R1)} if R1 is not None else {}
    knobs |= {f"R2 {name}": torch.zeros_like(R) for name, R in R2.items()}
    behind_r1 = norms_of(model) if R1 is not None else {}
    for name in site_targets(model):
        features = R2[name][..., 0].numel() if name in R2 else model.get_submodule(name).in_features
        kind = "scale" if name in behind_r1 else "smooth"
        knobs[f"{kind} {name}"] = scales[name].log() if name in scales else torch.zeros(features)
        knobs[f"clip {name}"] = torch.tensor(a_clip)
    return {name: value.to(model.device) for name, value in knobs.items()}


def turned(R: Tensor, generator: Tensor) -> Tensor:
    """R turned by the Cayley transform of a generator's skew part: a rotation again."""
    skew, eye = (generator - generator.mT) / 2, torch.eye(R.shape[-1], device=R.device)
    return torch.linalg.solve(eye + skew, (eye - skew) @ R)
