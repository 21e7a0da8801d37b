import copy

import pytest
import torch

from jqlib.quant.quantize import quantize_model
from jqlib.transform.build import done, fuse_layer_norms, rotate_model
from jqlib.transform.grids import quantize_activation, quantize_weight

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]  # fmt: skip
NAMES = [f"model.layers.{i}.{linear}" for i in range(2) for linear in LINEARS]


def logits(model, batch):
    with torch.inference_mode():
        return model(batch, use_cache=False).logits


def linear_inputs(model, batch, monkeypatch):
    """What each linear multiplies with, behind every hook."""
    names = {module: name for name, module in model.named_modules()}
    seen, forward = {}, torch.nn.Linear.forward

    def spy(self, x):
        seen[names[self]] = x.flatten(0, -2).clone()
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    logits(model, batch)
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


def distinct(x) -> int:
    return max(len(row.unique()) for row in x)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("o_per_head", "a_groupsize"), [(False, None), (True, None), (True, 16), (False, 16)])
def test_every_linear_reads_sixteen_values_a_token(
    tiny_model, tokens, monkeypatch, orthogonal, rotated, o_per_head, a_groupsize
):
    model, batch = tiny_model(), tokens()
    if rotated:
        fuse_layer_norms(model)
        rotate_model(model, orthogonal(48), None)
    before = linear_inputs(model, batch, monkeypatch)
    assert all(distinct(before[name]) > 16 for name in NAMES)
    quantize_model(model, 16, 4, a_clip=0.9, o_per_head=o_per_head, a_groupsize=a_groupsize)
    after = linear_inputs(model, batch, monkeypatch)
    assert set(after) == {*NAMES, "lm_head"}
    for name in NAMES:
        size = 8 if o_per_head and "o_proj" in name else a_groupsize or after[name].shape[-1]
        assert distinct(after[name].view(-1, size)) <= 16, name
        assert a_groupsize is None or distinct(after[name]) > 16
    assert distinct(after["lm_head"]) > 16
    if o_per_head:
        assert distinct(after[NAMES[3]]) > 16
    first = NAMES[0]  # nothing before it is quantised: its input is the plain one, rounded
    torch.testing.assert_close(
        after[first], quantize_activation(before[first], 4, 0.9, a_groupsize), rtol=1e-4, atol=1e-5
    )
    for reader in NAMES[1:3]:
        assert torch.equal(after[reader], after[first])


def test_weights_of_the_layers_alone(tiny_model):
    model = tiny_model(biases=True)
    before = copy.deepcopy(model.state_dict())
    quantize_model(model, 4, 16, w_groupsize=20)
    for name, p in model.state_dict().items():
        is_linear = name.removesuffix(".weight") in NAMES
        expected = quantize_weight(before[name], 4, 20) if is_linear else before[name]
        assert torch.equal(p, expected), name
        assert is_linear != torch.equal(p, before[name])
    assert done(model) == {"quantised"}


def test_sixteen_bits_change_nothing_and_four_do(tiny_model, tokens):
    model, batch = tiny_model(), tokens()
    expected, errors = logits(model, batch), {}
    for w_bits, a_bits in [(16, 16), (8, 16), (4, 16), (16, 8), (16, 4), (4, 4)]:
        quantized = copy.deepcopy(model)
        quantize_model(quantized, w_bits, a_bits)
        errors[w_bits, a_bits] = (logits(quantized, batch) - expected).norm().item() / expected.norm().item()
    assert errors[16, 16] == 0
    assert 0 < errors[8, 16] < errors[4, 16] < errors[4, 4]
    assert 0 < errors[16, 8] < errors[16, 4] < errors[4, 4]


def test_bfloat16_stays(tiny_model, tokens):
    model = tiny_model(dtype=torch.bfloat16)
    quantize_model(model)
    weights = {name: p for name, p in model.named_parameters() if not name.endswith(".transform.grid.clip")}
    assert set(weights) == set(dict(tiny_model().named_parameters()))
    assert {p.dtype for p in weights.values()} == {torch.bfloat16}
    assert logits(model, tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize(("arguments", "message"), [
    ({"w_bits": 1}, "w_bits=1: bits are whole numbers from 2 to 16"),
    ({"w_bits": 15}, "w_bits=15: weights have 2 to 12 bits, or 16, which leaves them alone"),
    ({"a_bits": 1}, "a_bits=1: bits are whole numbers"),
    ({"a_bits": 17}, "a_bits=17"),
    ({"w_bits": 4.0}, r"w_bits=4.0"),
    ({"w_bits": "4"}, "w_bits=4"),
    ({"w_bits": True}, "w_bits=True"),
    ({"w_bits": None}, "w_bits=None"),
    ({"w_bits": -4}, "w_bits=-4"),
    ({"w_groupsize": 0}, "w_groupsize=0: a group holds at least 1 weight"), ({"w_groupsize": 1.5}, "w_groupsize=1.5"),
    ({"w_groupsize": -1}, "w_groupsize=-1"),
    ({"a_groupsize": 0}, "a_groupsize=0 does not divide the 48 channels of model.layers.0.self_attn.q_proj"),
    ({"a_groupsize": 32}, "a_groupsize=32 does not divide the 48 channels"),
    ({"a_clip": 0}, r"a_clip=0: a clip ratio lies in \(0, 1\]"),
    ({"a_clip": 1.5}, "a_clip=1.5"),
    ({"a_clip": torch.nan}, "a_clip=nan"),
    ({"a_clip": {"model.layers.0.self_attn.q_proj": 0.9}}, "a_clip has no entry for model.layers.0.self_attn.o_proj"),
    ({"gptq_inputs": "int4"}, "gptq_inputs='int4' is unknown; there are fp, quantised, corrected"),
])  # fmt: skip
def test_bad_settings_leave_the_model_alone(tiny_model, arguments, message):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        quantize_model(model, **arguments)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    quantize_model(model)


def test_twice(tiny_model):
    model = tiny_model()
    quantize_model(model)
    with pytest.raises(RuntimeError, match="quantised already"):
        quantize_model(model, 8, 8)
