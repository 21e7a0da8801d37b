"""A model kept in one file, read by another process; and what a Hugging Face checkpoint may hold."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from jqlib import fuse_layer_norms, get_model, load_model, quantize_model, rotate_model, save_model
from jqlib.learn.smooth import compute_simple_smooth_scale
from jqlib.quant.packed import pack, unpack
from jqlib.transform.build import build, done, transforms_of

READ = """
import sys, torch
from jqlib import load_model
path, batch, out = sys.argv[1:]
torch.set_num_threads(1)
model = load_model(path)
with torch.inference_mode():
    torch.save((model(torch.load(batch)).logits, model.state_dict(), sorted(model.jointquant)), out)
"""


def logits(model, batch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = model(batch).logits
    torch.set_num_threads(threads)
    return found


def rotated(model, orthogonal, batch, online=("down",)):
    """With all that `rotate_model` takes."""
    smooth = compute_simple_smooth_scale(model, batch)
    R2 = {f"model.layers.{i}.self_attn.o_proj": orthogonal(8, i, torch.float32, (2,)) for i in range(2)}
    fuse_layer_norms(model)
    gains = {"model.layers.1.mlp.up_proj": torch.linspace(0.5, 2, 48)}
    rotate_model(model, orthogonal(48, 0, torch.float32), R2, smooth, norm_scale=gains, r4=False, online=online)
    return model


@pytest.mark.parametrize("biases", [False, True])
def test_a_w4a4kv4_model_is_the_same_in_another_process(tiny_model, tokens, orthogonal, tmp_path, biases):
    batch = tokens()
    model = rotated(tiny_model(biases=biases), orthogonal, batch)
    clips = {name: 0.8 + 0.02 * i for i, name in enumerate(transforms_of(tiny_model()))}
    quantize_model(model, 4, 4, 20, kv_bits=4, weights="gptq", calib_data=tokens(4, 64), a_clip=clips, o_per_head=True)
    save_model(model, tmp_path / "model.safetensors")
    torch.save(batch, tmp_path / "batch")
    arguments = [str(tmp_path / name) for name in ("model.safetensors", "batch", "logits")]
    subprocess.run([sys.executable, "-c", READ, *arguments], check=True)
    found, state, steps = torch.load(tmp_path / "logits")
    assert torch.equal(found, logits(model, batch))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in state.items())
    assert steps == ["fused", "quantised", "rotated"]


SETTINGS = [
    {"w_bits": 16, "a_bits": 16},
    {"w_bits": 3, "a_bits": 16},
    {"w_bits": 12, "a_bits": 16, "w_groupsize": 7},
    {"w_bits": 16, "a_bits": 4, "a_groupsize": 16},
    {"w_bits": 16, "a_bits": 16, "kv_bits": 3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_part_alone_is_kept_and_can_go_on(tiny_model, tokens, tmp_path, dtype, settings):
    tiny_model().save_pretrained(tmp_path)
    model, batch = get_model(str(tmp_path), dtype=dtype), tokens()
    quantize_model(model, **settings)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert not again.training
    assert {name: (p.dtype, p.requires_grad) for name, p in again.named_parameters()} == {
        name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}  # fmt: skip
    with pytest.raises(RuntimeError, match="quantised already"):
        quantize_model(again)
    save_model(again, tmp_path / "once more")
    assert torch.equal(logits(load_model(tmp_path / "once more"), batch), logits(model, batch))


def test_a_rotated_model_is_quantised_after_it_was_kept(tiny_model, tokens, orthogonal, tmp_path):
    model = rotated(tiny_model(), orthogonal, tokens())
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert done(again) == {"fused", "rotated"}
    for either in (model, again):
        quantize_model(either, 4, 4, 16)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_four_bits_take_four_bits(tiny_model, tmp_path):
    model = tiny_model()
    quantize_model(model, 4, 16, 16)
    save_model(model, tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    rounded = sum(t.numel() * t.element_size() for key, t in tensors.items() if key.startswith("rounded "))
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert rounded == weights * (4 + 16 / 16) / 8
    assert not [key for key in tensors if key.startswith("weight ") and key.endswith("_proj.weight")]


@pytest.mark.parametrize("part", ["r4", "online", "activations", "kv cache"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_hugging_face_checkpoint_that_would_lose_a_part_is_refused(tiny_model, tmp_path, part, loaded):
    model = tiny_model()
    if part in ("r4", "online"):
        rotate_model(model, None, r4=part == "r4", online=("qkv",) if part == "online" else ())
    else:
        quantize_model(model, 16, 4 if part == "activations" else 16, kv_bits=4 if part == "kv cache" else 16)
    if loaded:
        save_model(model, tmp_path / "model")
        model = load_model(tmp_path / "model")
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"would compute something else. Keep it by jqlib.save_model\(model, p"):
            one.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("w_bits", [16, 4])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_merged_model_is_a_hugging_face_checkpoint(tiny_model, tokens, orthogonal, tmp_path, w_bits, at_once):
    model = tiny_model(biases=True)
    if at_once:
        build(model, transforms_of(model, orthogonal(48, 0, torch.float32)))
    else:
        rotated(model, orthogonal, tokens(), online=())
    quantize_model(model, w_bits, 16, 16)
    model.save_pretrained(tmp_path)
    again = get_model(str(tmp_path))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_a_foreign_file_is_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    for name in ("model.safetensors", "other.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} was not written by jqlib.save_model; a model folder is read by"):
            load_model(tmp_path / name)


def test_folders_are_no_files_and_are_not_made(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere for model: make it first"):
        save_model(tiny_model(), tmp_path / "nowhere" / "model")
    with pytest.raises(ValueError, match=r"is a folder: jqlib\.get_model reads a model folder"):
        load_model(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    assert get_model(tmp_path).config.hidden_size == 48  # a Path will do


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("These are not the weights you are looking for.")
    with pytest.raises(ValueError, match=r"notes.txt is damaged, or no safetensors file"):
        load_model(tmp_path / "notes.txt")


def test_a_file_that_lacks_a_weight_is_refused(tiny_model, tmp_path):
    model = tiny_model()
    quantize_model(model, 4, 16, 16)
    save_model(model, tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for lost in ("weight model.norm.weight", "rounded model.layers.1.mlp.down_proj|codes"):
        save_file({key: t for key, t in tensors.items() if key != lost}, tmp_path / "part", about)
        with pytest.raises(ValueError, match=r"does not fit its own config: model\."):
            load_model(tmp_path / "part")


def test_a_file_is_there_whole_or_not_at_all(tiny_model, tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "model"
    save_model(model, path)
    before = path.read_bytes()
    quantize_model(model, 4, 16, 16)
    model.config.anything = object()  # JSON can't hold it
    with pytest.raises(TypeError):
        save_model(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(2, 15), rows=st.integers(1, 5), columns=st.integers(1, 33), seed=st.integers(0, 2**31))
def test_codes_packed_and_unpacked(bits, rows, columns, seed):
    top, generator = 2 ** (bits - 1), torch.Generator().manual_seed(seed)
    codes = torch.randint(-top, top, (rows, columns), generator=generator).float()
    codes[0, 0], codes[-1, -1] = -top, top - 1
    kept = pack(codes, bits)
    size = {1: (columns + 1) // 2, 2: columns, 3: 2 * columns}[1 + (bits > 4) + (bits > 8)]
    assert kept.numel() * kept.element_size() == rows * size
    assert torch.equal(unpack(kept, bits, columns), codes)
