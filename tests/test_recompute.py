"""Layers that are run again on the way back: the same numbers, and little kept on the way there."""

import pytest
import torch

from jqlib import quantize_model
from jqlib.learn import recompute
from jqlib.learn.fisher import train_r1_output
from jqlib.learn.lessons import teach
from jqlib.learn.recompute import recomputing
from jqlib.learn.refine import refine
from jqlib.learn.steps import Steps
from jqlib.learn.tune import tune
from jqlib.model.families import sites_of
from jqlib.transform.build import transforms_of
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.transform import Grid


@pytest.fixture
def memory(monkeypatch):
    """``memory(bytes)``: how much the machine has free from now on."""
    return lambda free: monkeypatch.setattr(recompute, "free_bytes", lambda device: free)


def by_output(model, windows):
    R1, gains = train_r1_output(model, windows, steps=Steps(3, tokens=64))
    return {"R1": R1} | gains


def by_refining(model, windows):
    heads = torch.stack([random_hadamard(8, i) for i in range(2)])
    R2 = dict.fromkeys(sites_of(model, "o"), heads)
    grids = {name: Grid(4, 0.9) for name in sites_of(model)}
    transforms = transforms_of(model, random_hadamard(48, 0), R2, online=("down",), grids=grids)
    refine(model, teach(model, windows), transforms, steps=Steps(3, tokens=64))
    return {f"{site} {name}": p for site, t in transforms.items() for name, p in t.state_dict().items()}


def by_tuning(model, windows):
    lessons = teach(model, windows)
    quantize_model(model, 4, 4, 20, a_clip=0.9)
    tune(model, lessons, Steps(3, tokens=64))
    return model.state_dict()


@pytest.mark.parametrize("stage", [by_output, by_refining, by_tuning])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_ends_the_same_where_memory_is_short(stage, dtype, tiny_model, tokens, memory):
    found = []
    for free in (2**40, 0):
        memory(free)
        model = tiny_model(dtype=dtype)
        found.append(stage(model, tokens(4, 64)))
        assert not any("forward" in vars(layer) for layer in model.model.layers)
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_a_layer_keeps_its_input_alone(tiny_model, tokens, memory):
    model, ids, kept = tiny_model(), tokens(2, 64), []

    def numbers() -> int:
        """Of what autograd keeps of the layers; what the ends keep is the same both times."""
        seen = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: seen.setdefault(x.data_ptr(), x), lambda x: x)
        with hooks:
            model(ids, use_cache=False).logits.sum()
        return sum(x.numel() for x in seen.values())

    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for free in (2**40, 0):
        memory(free)
        with recomputing(model, ids.numel()):
            kept.append(numbers())
    assert kept[1] < kept[0] / 4
