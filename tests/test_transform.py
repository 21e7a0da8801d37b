"""Every kind of transform against the matrix that it stands for; kept, copied, and looked at as a module."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jqlib.quant.quantize import quantize_model
from jqlib.transform.build import rotate_model
from jqlib.transform.grids import quantize_activation
from jqlib.transform.hadamard import hadamard_matrix, hadamard_transform
from jqlib.transform.transform import Grid, Hadamard, Rotation, Transform, packed, unpacked


def orthogonal(*shape, generator):
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.double))[0]


@st.composite
def transforms(draw):
    """A transform, without a grid, and A, (n, n): the matrix that it stands for, from explicit blocks."""
    kv, group, d = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    n, generator = kv * group * d, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A, scale, rotation, gain, heads = torch.eye(n, dtype=torch.double), None, None, None, 1
    kind = draw(st.sampled_from(["none", "scale", "shared scale"]))
    if kind == "scale":
        scale = torch.randn(n, generator=generator, dtype=torch.double).exp()
        A = A / scale[:, None]
    elif kind == "shared scale":
        scale, heads = torch.randn(kv * d, generator=generator, dtype=torch.double).exp(), kv
        A = A / torch.stack([scale[(i // d // group) * d + i % d] for i in range(n)])[:, None]
    kind = draw(st.sampled_from(["none", "dense", "heads", "hadamard"]))
    if kind == "dense":
        R = orthogonal(n, n, generator=generator)
        rotation, A = Rotation(R), A @ R
    elif kind == "heads":
        R = orthogonal(kv, d, d, generator=generator)
        rotation, A = Rotation(R), A @ torch.block_diag(*(R[h // group] for h in range(kv * group)))
    elif kind == "hadamard":
        rotation, A = Hadamard(n), A @ hadamard_matrix(n).double() / n**0.5
    if draw(st.booleans()):
        gain = torch.randn(n, generator=generator, dtype=torch.double).exp()
        A = A * gain
    return Transform(scale, rotation, gain, online=draw(st.booleans()), heads=heads), A


def pair(n: int, seed: int = 0):
    return torch.randn(2, 3, 5, n, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@settings(max_examples=150, deadline=None)
@given(made=transforms(), seed=st.integers(0, 2**31))
def test_a_transform_is_its_matrix(made, seed):
    (transform, A), (x, h) = made, pair(len(made[1]), seed)
    torch.testing.assert_close(transform.apply(x), x @ A, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(transform.undo(x), x @ A.inverse(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(transform.dual(h), h @ A.inverse().T, rtol=1e-10, atol=1e-10)
    assert torch.equal(transform(x), transform.apply(x))
    assert transform.turns or torch.equal(A, torch.eye(len(A)).double())
    assert transform.runs == transform.turns
    assert not transform.rounds


@settings(max_examples=150, deadline=None)
@given(made=transforms(), seed=st.integers(0, 2**31))
def test_undo_takes_it_back_and_the_dual_keeps_products(made, seed):
    transform, (x, h) = made[0], pair(len(made[1]), seed)
    torch.testing.assert_close(transform.undo(transform.apply(x)), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((transform.apply(x) * transform.dual(h)).sum(-1), (x * h).sum(-1), rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(made=transforms(), seed=st.integers(0, 2**31), bits=st.integers(2, 8), clip=st.sampled_from([1.0, 0.8]))
def test_simulated_is_merged_and_run(made, seed, bits, clip):
    """What is merged, then what is left to run, is the whole; simulated, the error of its grid in x's own basis."""
    (transform, A), (x, _) = made, pair(len(made[1]), seed)
    transform.grid = Grid(bits, clip)
    before, after = transform.split()
    assert before.grid is None
    torch.testing.assert_close(after.apply(before.apply(x)), transform.apply(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(after(before(x)), transform(x))
    assert after.grid is transform.grid
    rounded = quantize_activation(transform.apply(x), bits, transform.grid.clip)
    assert torch.equal(transform(x), rounded)
    torch.testing.assert_close(transform.simulate(x), rounded @ A.inverse(), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(made=st.lists(transforms(), min_size=1, max_size=3), bits=st.sampled_from([None, 4, 8, 16]), size=st.booleans())
def test_packed_and_unpacked_is_an_equal_transform(made, bits, size):
    given = {}
    for i, (transform, _) in enumerate(made):
        for twin in (f"site {i}", f"twin {i}"):  # the twin shares the rotation, as all sites behind R1 do
            grid = bits and Grid(bits, 0.87, 4 if size else None)
            given[twin] = Transform(transform.scale, transform.rotation, transform.gain, grid,
                                    online=transform.online, heads=transform.heads)  # fmt: skip
    tensors, layouts = packed(given)
    again = unpacked(tensors, json.loads(json.dumps(layouts)))
    assert again.keys() == given.keys()
    for name, transform in again.items():
        expected = given[name]
        assert repr(transform) == repr(expected)
        assert (transform.online, transform.heads) == (expected.online, expected.heads)
        assert transform.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(p, expected.state_dict()[key]) for key, p in transform.state_dict().items())
        x = pair(len(made[int(name[-1])][1]))
        assert torch.equal(transform(x), expected(x))
    for i, (transform, _) in enumerate(made):
        shared = again[f"site {i}"].rotation
        assert shared is again[f"twin {i}"].rotation
        dense = [t.rotation for t in again.values() if isinstance(t.rotation, Rotation)]
        assert isinstance(transform.rotation, Rotation) == any(r is shared for r in dense)
    assert sum(key.endswith("|rotation") for key in tensors) == len({id(r) for r in dense})


def built(tiny_model):
    model = tiny_model()
    rotate_model(model, None, online=("qkv", "o"))
    quantize_model(model, 16, 4, a_clip=0.9)
    return model


def test_modules_of_a_model_with_transforms_are_visited_once(tiny_model):
    """`Transform.apply` turns activations; given a function it is still nn.Module's."""
    model, seen = built(tiny_model), []
    assert model.apply(seen.append) is model
    assert len(seen) == len(set(seen))
    assert set(seen) == set(model.modules())
    assert sum(isinstance(module, Transform) for module in seen) == 8
    transform = model.get_submodule("model.layers.0.mlp.down_proj.transform")
    assert transform.apply(lambda module: None) is transform


def test_state_copies_and_print_see_transforms(tiny_model, tokens):
    model, batch = built(tiny_model), tokens()
    clips = [name for name in model.state_dict() if name.endswith(".transform.grid.clip")]
    assert len(clips) == 8
    assert {name.split(".")[3] for name in clips} == {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}
    text = repr(model)
    assert text.count("(transform): Transform(") == 4  # the two layers are alike, and printed once
    assert text.count("Hadamard(48)") == 2
    assert text.count("Hadamard(96)") == 1
    assert text.count("Grid(bits=4, groupsize=None)") == 4
    with torch.inference_mode():
        expected = model(batch).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(batch).logits, expected)
        for name in clips:
            twin.get_parameter(name).data.fill_(0.3)
        assert all(model.get_parameter(name) == torch.tensor(0.9) for name in clips)
        assert torch.equal(model(batch).logits, expected)
        assert not torch.allclose(twin(batch).logits, expected)
        model.load_state_dict(twin.state_dict())
        assert torch.equal(model(batch).logits, twin(batch).logits)


@pytest.mark.parametrize("kind", ["function", "hadamard", "dense", "heads"])
def test_autocast_does_not_drown_channels_beside_a_massive_one(kind):
    """In bfloat16 the error would be of the order of 1; simulated, and in a model's forward pass too."""
    n, generator = 96, torch.Generator().manual_seed(0)
    x = torch.randn(7, n, generator=generator)
    x[:, 3] = 1000
    H = hadamard_matrix(n).double() / n**0.5
    R = orthogonal(n, n, generator=generator) if kind == "dense" else orthogonal(4, 8, 8, generator=generator)
    A = {"function": H, "hadamard": H, "dense": R,
         "heads": torch.block_diag(*(R[h // 3] for h in range(12))) if kind == "heads" else None}[kind]  # fmt: skip
    transform = Transform(rotation=Hadamard(n) if kind in ("function", "hadamard") else Rotation(R.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ H.float()).dtype == torch.bfloat16  # autocast is at work
        z = hadamard_transform(x) if kind == "function" else transform.apply(x)
        back, ran = transform.undo(z), transform(x)
    assert z.dtype == torch.float32
    assert (z - x.double() @ A).abs().max() < 1e-3
    exact = transform.apply(x)
    assert torch.equal(ran, exact.bfloat16())  # cast once, for all that read it
    assert (back - x).abs().max() < 1e-3
