"""What a model takes on a disk, beside files."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from jqlib import fuse_layer_norms, quantize_model
from jqlib.lab.cost import bits_per_weight, file_bytes, stored_bytes
from jqlib.model.families import linears_of
from jqlib.quant.packed import pack_weights


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_it_is_what_a_file_of_codes_and_halves_takes(tiny_model, tmp_path, bits):
    model = tiny_model()
    assert stored_bytes(model) == 2 * sum(p.numel() for p in model.parameters())
    quantize_model(model, w_bits=bits, a_bits=16, w_groupsize=16)
    packed = pack_weights(model)
    linears = {f"{name.split('|')[0]}.weight" for name in packed}
    others = {name: p.half() for name, p in model.named_parameters() if name not in linears}
    save_file(packed | others, tmp_path / "file")
    header = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") + 8
    assert stored_bytes(model) == (tmp_path / "file").stat().st_size - header


@pytest.mark.parametrize("groupsize", [16, 24, 1000])  # that divides a row, that doesn't, larger than it
@pytest.mark.parametrize("bits", [3, 4, 8, 12])
def test_bits_per_weight_are_those_of_what_is_packed(tiny_model, groupsize, bits):
    model = tiny_model()
    weights = sum(linear.weight.numel() for linear in linears_of(model).values())
    assert bits_per_weight(model, 16, groupsize) == 16
    expected = bits_per_weight(model, bits, groupsize)
    quantize_model(model, w_bits=bits, a_bits=16, w_groupsize=groupsize)
    assert expected == 8 * sum(part.nbytes for part in pack_weights(model).values()) / weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("w_bits", [2, 4, 8])
def test_bytes_by_shapes_are_those_of_the_model(tiny_model, tied, w_bits):
    model = tiny_model()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert file_bytes(model, 16, False) == stored_bytes(model)
    bits, plain = bits_per_weight(model, w_bits, 24), copy.deepcopy(model)
    fuse_layer_norms(model)  # a tied head gets weights of its own
    quantize_model(model, w_bits=w_bits, a_bits=16, w_groupsize=24)
    assert file_bytes(plain, bits, True) == pytest.approx(stored_bytes(model), abs=1)
