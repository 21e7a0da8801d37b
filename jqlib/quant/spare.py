"""Where a rounded model's loss sits: a part of its activations is left unrounded again, and it is evaluated anew."""

from torch import Tensor, nn

from jqlib.model.families import sites_of
from jqlib.transform.grids import OFF
from jqlib.transform.transform import Grid


def spare(
    model: nn.Module, kind: str | None = None, layers: tuple[int, int] | None = None, first_token: bool = False
) -> None:
    """Leave in floating point what the sites of this kind, or of layers from … to (both included), read; or what all
    sites read of each window's first token, on which attention leans. In place; the weights stay rounded.

    Raises ValueError for a kind that the model has not.
    """
    for place in sites_of(model, *([kind] if kind else [])).values():
        transform = getattr(place.host, "transform", None)
        if transform is None or not transform.rounds or (layers and not layers[0] <= place.layer <= layers[1]):
            continue
        if first_token:
            transform.grid = AfterTheFirst(transform.grid)
        else:
            transform.grid.bits = OFF


class AfterTheFirst(nn.Module):
    """A grid for all tokens of a window but its first, (..., tokens, features)."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid, self.bits = grid, grid.bits

    def forward(self, x: Tensor) -> Tensor:
        rounded = self.grid(x).clone()
        rounded[..., 0, :] = x[..., 0, :]
        return rounded
