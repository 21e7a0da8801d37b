"""Parts left unrounded again: that part, and no other."""

import pytest
import torch

from jqlib import quantize_model
from jqlib.model.families import sites_of
from jqlib.quant.spare import spare
from jqlib.transform.grids import quantize_activation


def read(model, ids):
    """What the linears of each site read, by site."""
    found, handles = {}, []
    for name, place in sites_of(model).items():
        linear = place.linears[name]
        handles.append(linear.register_forward_hook(lambda m, args, y, name=name: found.__setitem__(name, args[0])))
    model(ids)
    for handle in handles:
        handle.remove()
    return found


def rounded(x) -> bool:
    """Rounding what lies on a grid changes nothing."""
    return torch.allclose(quantize_activation(x, 4), x, atol=1e-5)


@pytest.mark.parametrize(("part", "spared"), [
    ({"kind": "ug"}, lambda place: place.kind == "ug"),
    ({"layers": (1, 1)}, lambda place: place.layer == 1),
    ({"kind": "down", "layers": (0, 0)}, lambda place: place.kind == "down" and place.layer == 0),
])  # fmt: skip
def test_a_part_is_left_unrounded(tiny_model, tokens, part, spared):
    model, ids = tiny_model(), tokens(1, 16)
    quantize_model(model)
    spare(model, **part)
    for name, x in read(model, ids).items():
        assert rounded(x) != spared(sites_of(model)[name]), name


def test_the_first_token_is_left_unrounded(tiny_model, tokens):
    model, ids = tiny_model(), tokens(2, 16)
    quantize_model(model)
    spare(model, first_token=True)
    for x in read(model, ids).values():
        assert rounded(x[:, 1:])
        assert not rounded(x[:, :1])


def test_an_unknown_kind_is_refused(tiny_model):
    with pytest.raises(ValueError, match="site 'qk' is unknown; there are qkv, o, ug, down"):
        spare(tiny_model(), "qk")
