"""A model read layer by layer gives what it gives in memory, and holds one layer at a time."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_families import random_model

from jqlib import get_model, pipeline
from jqlib.config import make_config
from jqlib.model.evaluate import last_hidden
from jqlib.model.families import FAMILIES, linears_of
from jqlib.model.walk import walk
from jqlib.quant.keep import load_model, save_model
from jqlib.quant.quantize import quantize_model

METHODS = ("smoothquant", "quarot", "dartquant", "jointquant", "jointquant-best", "hadamard-online")


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """``folder(kind, **config)``: a random model in shards, with a tokenizer."""

    def make(kind: str, **more) -> str:
        random_model(kind, **more).save_pretrained(tmp_path / "model", max_shard_size="40KB")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        assert len([*(tmp_path / "model").glob("*.safetensors")]) > 2
        return str(tmp_path / "model")

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_hidden_states_are_those_in_memory(folder, kind, tied):
    name, ids = folder(kind, tie_word_embeddings=tied), torch.randint(128, (3, 20))
    for dtype in (torch.float32, torch.bfloat16):
        here, streamed = (walk(get_model(name, dtype=dtype, stream=stream), ids) for stream in (False, True))
        for a, b in zip(here, streamed, strict=True):
            assert torch.equal(a.hidden, b.hidden)
    whole, apart = get_model(name), get_model(name, stream=True)
    assert torch.equal(whole.get_output_embeddings().weight, apart.get_output_embeddings().weight)


def test_one_layer_is_there_at_a_time(folder):
    model = get_model(folder("llama"), stream=True)
    for step in walk(model, torch.randint(128, (1, 8))):
        there = {name for name, linear in linears_of(model).items() if not linear.weight.is_meta}
        assert len(there) == 7
        assert all(name.startswith(step.name) for name in there)
    assert all(linear.weight.is_meta for linear in linears_of(model).values())


@pytest.mark.parametrize(("kind", "name"), [
    *(("llama", name) for name in METHODS), ("phi3", "jointquant"), ("qwen2", "jointquant-best"), ("qwen3", "quarot"),
])  # fmt: skip
def test_rows_are_those_in_memory(folder, tmp_path, kind, name):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    text = str(tmp_path / "text.txt")
    config = make_config({
        "model": folder(kind), "calib_dataset": text, "eval_dataset": text, "output_dir": str(tmp_path / "out"),
        "profile": "quick", "nsamples": 2, "seqlen": 32, "max_tokens": 64, "eval_seqlen": 32, "eval_windows": 2,
        "refine_steps": 0, "kv_bits": 8,
    })  # fmt: skip
    recipe = pipeline.recipe_of(config, name)
    here, streamed = (pipeline.evaluate(replace(config, stream=stream), recipe, 4, 4) for stream in (False, True))
    assert streamed["nll"] == pytest.approx(here["nll"], rel=1e-6)
    assert streamed["kl"] == pytest.approx(here["kl"], rel=1e-6)


def test_a_copy_is_its_own(folder):
    model = get_model(folder("llama"), stream=True)
    twin = copy.deepcopy(model)
    assert not {*model.stream.places} & {*twin.stream.places}
    ids = torch.randint(128, (1, 8))
    for a, b in zip(walk(model, ids), walk(twin, ids), strict=True):
        assert torch.equal(a.hidden, b.hidden)


def test_files_that_lack_a_weight_or_have_one_too_many_are_named(folder):
    index = Path(folder("llama")) / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    others = {"weight_map": {k: v for k, v in whole["weight_map"].items() if k != name}}
    for content, problem in (
        (others, f"weights that its config needs are not in its files: {name}"),
        (
            {"weight_map": whole["weight_map"] | {"extra": whole["weight_map"][name]}},
            "weights in its files are not used by its config: extra",
        ),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=problem):
            get_model(str(index.parent), stream=True)


def test_stages_by_the_loss_are_left_out_or_refused():
    given = {"model": "smollm2-135m", "profile": "quick", "stream": True}
    assert make_config(given).refine_steps == 0
    with pytest.raises(ValueError, match="stream=True, refine_steps=20: the stages by the loss need the whole model"):
        make_config(given | {"refine_steps": 20})


def test_called_as_a_whole_or_saved_it_says_what_to_do(folder, tmp_path):
    model = get_model(folder("llama"), stream=True)
    with pytest.raises(RuntimeError, match=r"read layer by layer \(stream=True\) and can't be called as a whole"):
        model(torch.randint(128, (1, 8)))
    with pytest.raises(RuntimeError, match="its weights are not in memory to be saved"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"q_proj\.weight is not in memory"):
        save_model(model, tmp_path / "saved")
    quantize_model(model, 4, 4, 16)
    save_model(model, tmp_path / "saved")
    ids = torch.randint(128, (1, 8))
    torch.testing.assert_close(last_hidden(load_model(tmp_path / "saved"), ids), last_hidden(model, ids))


def test_another_models_config_is_found_out_at_once(folder):
    name = folder("llama")
    config = json.loads((Path(name) / "config.json").read_text())
    (Path(name) / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(ValueError, match=r"have other shapes than its config says: model\.layers\.0\.mlp\.down_proj"):
        get_model(name, stream=True)


def test_frequencies_in_older_checkpoints_are_no_weights(folder):
    index = Path(folder("llama")) / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    names = whole["weight_map"]
    names["model.layers.0.self_attn.rotary_emb.inv_freq"] = names["model.norm.weight"]
    index.write_text(json.dumps(whole | {"weight_map": names}))
    get_model(str(index.parent), stream=True)
