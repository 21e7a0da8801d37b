"""What is left of transforms after merging stands in the model, at its site, and runs with it."""

from collections.abc import Iterable

from torch import Tensor, nn

from jqlib.model.families import Place, linears_of, sites_of
from jqlib.model.refuse import refuse_to_save
from jqlib.transform.transform import Grid, Transform

ONLINE = (
    "this model has Hadamard transforms online or rounds its activations, which a Hugging Face checkpoint does not "
    "hold: loaded again it would compute something else. Keep it by jqlib.save_model(model, path), which "
    "jqlib.load_model(path) reads, or build it with r4=False, no online sites and a_bits=16"
)


def install_left(model: nn.Module, transforms: dict[str, Transform]) -> None:
    """Install, at every site, what merging leaves of its transform."""
    for name, place in sites_of(model).items():
        if (left := transforms[name].split()[1]).runs:
            install(model, place, left)


def install(model: nn.Module, place: Place, transform: nn.Module):
    """From now on the site's input goes through ``transform``, which stands in the model; returns the hook's handle."""
    place.host.transform = transform
    refuse_to_save(model, ONLINE)
    if place.norm is not None:
        return place.norm.register_forward_hook(_behind)
    return place.host.register_forward_pre_hook(_before)


def _behind(norm: nn.Module, args, output: Tensor) -> Tensor:
    return norm.transform(output)


def _before(linear: nn.Module, args) -> tuple:
    return (linear.transform(args[0]), *args[1:])


def standing(model: nn.Module) -> dict[str, Transform]:
    """The transforms that stand in the model, by site."""
    return {name: place.host.transform for name, place in sites_of(model).items() if hasattr(place.host, "transform")}


def standing_grids(places: Iterable[Place]) -> dict[str, Grid]:
    """The grids at these sites that round what runs through, by site."""
    there = {place.name: place.host.transform for place in places if hasattr(place.host, "transform")}
    return {name: transform.grid for name, transform in there.items() if transform.rounds}


def online_operations(model: nn.Module) -> float:
    """Multiply-adds of the transforms that run in the model, as a share of those of all decoder layers' linears."""
    running = [t.rotation.operations for t in standing(model).values() if t.online and t.rotation is not None]
    return sum(running) / sum(linear.weight.numel() for linear in linears_of(model).values())
