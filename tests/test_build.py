"""What `build` refuses, and what it leaves alone."""

import copy

import pytest
import torch

from jqlib.model.families import linears_of, site_targets
from jqlib.transform.build import build, fuse_layer_norms, rotate_model, transforms_of

HIDDEN = 48


def test_a_stream_turned_for_some_of_its_readers_is_refused(tiny_model, orthogonal):
    model = tiny_model()
    transforms = transforms_of(model, orthogonal(HIDDEN, 0, torch.float32))
    transforms[site_targets(model, "ug")[0]].rotation = None
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="read one residual stream: all of them need the same R1, or none has one"):
        build(model, transforms)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("biases", [False, True])
def test_weights_to_be_replaced_are_left_and_all_else_is_built(tiny_model, orthogonal, biases):
    whole, waiting = (tiny_model(biases=biases) for _ in range(2))
    untouched = {name: linear.weight.clone() for name, linear in linears_of(waiting).items()}
    for model, replaced in ((whole, ()), (waiting, linears_of(waiting).values())):
        build(model, transforms_of(model, orthogonal(HIDDEN), online=("down",)), list(replaced))
    linears, expected = linears_of(waiting), whole.state_dict()
    for name, tensor in waiting.state_dict().items():
        linear = name.removesuffix(".weight")
        assert torch.equal(tensor, untouched[linear] if linear in linears else expected[name]), name


@pytest.mark.parametrize("step", ["fused", "rotated"])
def test_a_model_whose_merging_was_interrupted_is_not_merged_again(tiny_model, orthogonal, monkeypatch, step):
    """Gammas are 1 already, but weights have not taken them: a second call would go on from there in silence."""

    def ctrl_c(*args, **kwargs):
        raise KeyboardInterrupt

    model = tiny_model()
    again = fuse_layer_norms if step == "fused" else lambda model: rotate_model(model, orthogonal(HIDDEN))
    if step == "rotated":
        fuse_layer_norms(model)
    with monkeypatch.context() as patch:
        patch.setattr("jqlib.transform.build.merge", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            again(model)
    with pytest.raises(RuntimeError, match=f"this model is {step} already: load it again"):
        again(model)
