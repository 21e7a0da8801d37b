"""End-to-end refinement: what rotates, scales and clips, by the loss that counts, KL to the FP model's predictions.

A few hundred small steps from where the solvers end, through straight-through rounding of the activations (SpinQuant,
eq. 2, with the norms' scales of OSTQuant and learned clips). Weights stay as they are: whoever rounds them (GPTQ)
wants rotations trained for activations alone. The model stays in its own basis too: a site's input x is transformed,
rounded and turned back (`Transform.simulate`), with no merging of weights at any step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jqlib.learn.lessons import Lessons
from jqlib.learn.recompute import recomputing
from jqlib.learn.steps import Steps, minimise_by_steps
from jqlib.model.families import Place, sites_of
from jqlib.precision import products_in
from jqlib.transform.grids import OFF
from jqlib.transform.install import install
from jqlib.transform.orthogonal import turned
from jqlib.transform.transform import Rotation, Transform

RATES = {"R1": 4e-4, "R2": 8e-4, "scale": 1e-2, "smooth": 1e-2, "clip": 2e-3}  # of Adam; "scale": gains behind R1


def refine(
    model: nn.Module, lessons: Lessons, transforms: dict[str, Transform], *, learn: tuple[str, ...] = tuple(RATES),
    steps: Steps = Steps(),
) -> None:  # fmt: skip
    """Refine the transforms of all sites in place. They may be any that `build` takes, each with its grid.

    ``model``: as loaded; nothing of it changes. ``lessons``: its own (`lessons.teach`). ``learn``: which kinds
    move, of "R1", "R2", "scale" (gains of the norms behind R1), "smooth" (scales of the other sites), "clip".

    Raises ValueError for grids of 16 bits or an unknown kind, FloatingPointError if the loss is not finite.
    """
    if any(transform.grid.bits == OFF for transform in transforms.values()):
        raise ValueError(f"a_bits={OFF}: refine learns by the rounding of activations, to 2..15 bits")
    if not learn or not {*learn} <= {*RATES}:
        raise ValueError(f"learn={learn!r}: expected some of {', '.join(RATES)}")

    lessons = lessons.to(model.device)

    def loss(pieces: Tensor) -> Tensor:
        with products_in(steps.dtype, model.device):
            return lessons.loss(model, pieces)

    learning = learnable_transforms(sites_of(model), transforms, learn)
    with simulated(model, transforms), learning as knobs, recomputing(model, steps.together):
        once = partial(made_once, transforms)
        minimise_by_steps(knobs, loss, lessons.ids, RATES, steps, "refining", once)


@contextmanager
def made_once(transforms: dict[str, Transform]) -> Iterator[None]:
    """Within it their parts are made of what is learned once, before the layers: these may run twice (`recompute`)."""
    with parametrize.cached():
        for module in {module for transform in transforms.values() for module in transform.modules()}:
            for name in getattr(module, "parametrizations", ()):
                getattr(module, name)
        yield


class Simulated(nn.Module):
    """Stands at a site while its transform is simulated."""

    def __init__(self, transform: Transform):
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        return self.transform.simulate(x)


@contextmanager
def simulated(model: nn.Module, transforms: dict[str, Transform]) -> Iterator[None]:
    """Within it the model rounds its sites' inputs as the built one will."""
    places, saves = sites_of(model), vars(model).get("save_pretrained")
    handles = [install(model, places[name], Simulated(transform)) for name, transform in transforms.items()]
    try:
        yield
    finally:
        for handle, name in zip(handles, transforms, strict=True):
            handle.remove()
            del places[name].host.transform
        if saves:
            model.save_pretrained = saves
        else:
            del model.save_pretrained


class Turn(nn.Module):
    """A rotation as a start, turned by the Cayley transform of what is learned."""

    def forward(self, generator: Tensor) -> Tensor:
        return turned(self.start, generator)

    def right_inverse(self, R: Tensor) -> Tensor:
        self.register_buffer("start", R.detach().clone())
        return torch.zeros_like(R)


class Exp(nn.Module):
    """A positive number as the exponential of what is learned."""

    def forward(self, logarithm: Tensor) -> Tensor:
        return logarithm.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log()


@contextmanager
def learnable_transforms(
    places: dict[str, Place], transforms: dict[str, Transform], kinds: tuple[str, ...]
) -> Iterator[dict[str, Tensor]]:
    """Within it the parts of these kinds are functions of what is learned: ``{"<kind> <site>": parameter}``.

    Scales and gains that a transform has not got start at 1.
    """
    knobs, forms = {}, []
    for name, t in transforms.items():
        dense = isinstance(t.rotation, Rotation) and t.rotation.matrix.ndim == 2
        behind_r1, source = dense and not t.online, places[name].source
        width = places[name].width if source is None else source.out_features
        parts = [("clip", t.grid, "clip", None)]
        parts.append(("scale", t, "gain", Exp()) if behind_r1 else ("smooth", t, "scale", Exp()))
        if isinstance(t.rotation, Rotation):
            parts.append(("R1" if behind_r1 else "R2", t.rotation, "matrix", Turn()))
        for kind, module, attribute, form in parts:
            if kind not in kinds or parametrize.is_parametrized(module, attribute):  # all sites share R1
                continue
            if getattr(module, attribute) is None:
                setattr(module, attribute, nn.Parameter(torch.ones(width, device=t.grid.clip.device), False))
            if form is not None:
                parametrize.register_parametrization(module, attribute, form)
                forms.append((module, attribute))
            knob = getattr(module, attribute) if form is None else module.parametrizations[attribute].original
            knobs[f"{kind} {name}"] = knob.requires_grad_()
    try:
        yield knobs
    finally:
        for knob in knobs.values():
            knob.requires_grad_(False)
        for module, attribute in forms:
            parametrize.remove_parametrizations(module, attribute)
