from typing import get_args

import pytest

from jqlib.choices import InitMode, Solver, Weights
from jqlib.config import (
    CHOICES,
    PRESETS,
    PROFILES,
    Config,
    get_llama_1b_config,
    get_llama_8b_config,
    get_smollm2_135m_config,
    make_config,
    slug,
)
from jqlib.learn.objectives import OBJECTIVES
from jqlib.recipes import RECIPES


def test_choices_are_what_the_modules_take():
    for name, taken in {"solver": Solver, "init_mode": InitMode, "weights": Weights}.items():
        assert CHOICES[name] == get_args(taken)
    assert CHOICES["objective"] == tuple(OBJECTIVES)


def test_defaults_are_the_specifications():
    c = get_llama_1b_config()
    assert (c.model, c.nsamples, c.seqlen, c.r1_lr, c.r1_epochs, c.r2_lr, c.r2_epochs) == (
        "meta-llama/Llama-3.2-1B", 128, 2048, 1e-3, 10, 1e-3, 5)  # fmt: skip
    assert (c.use_smooth, c.smooth_alpha, c.w_bits, c.a_bits, c.w_groupsize, c.output_dir) == (
        True, 0.5, 4, 4, 128, "./jointquant_output")  # fmt: skip
    assert c == Config(**PRESETS[c.model])


def test_a_parameter_beats_the_profile_and_the_profile_the_default():
    c = make_config({"model": "smollm2-135m", "profile": "quick", "nsamples": 3, "seqlen": None})
    assert (c.nsamples, c.seqlen, c.eval_windows) == (3, PROFILES["quick"]["seqlen"], PROFILES["quick"]["eval_windows"])


def test_presets():
    assert get_llama_8b_config().dtype == "bfloat16"
    assert get_llama_8b_config(dtype="float32").dtype == "float32"
    for model in PRESETS:
        assert make_config({"model": model, "recipes": "rtn"}).recipes == "rtn"
        assert make_config({"model": model, "profile": "quick"}).nsamples == PROFILES["quick"]["nsamples"]
    assert get_smollm2_135m_config().profile == "quick"
    assert get_smollm2_135m_config(profile="standard").seqlen == 2048


BAD = [
    ({"w_bit": 4}, "unknown parameter 'w_bit'; there are model, profile"),
    ({"w_bits": 1}, "w_bits=1: bits are whole numbers from 2 to 16, and 16 means not quantised"),
    ({"a_bits": 17}, "a_bits=17: bits are whole numbers from 2 to 16, and 16 means not quantised"),
    ({"w_bits": 13}, "w_bits=13: weights have 2 to 12 bits, or 16, which leaves them alone"),
    ({"w_bits": "4"}, "w_bits='4': expected int"),
    ({"w_bits": 4.0}, "w_bits=4.0: expected int"),
    ({"use_smooth": 1}, "use_smooth=1: expected bool"),
    ({"smooth_alpha": 1.5}, "smooth_alpha=1.5: expected a value from 0 to 1"),
    ({"smooth_alpha": float("nan")}, "smooth_alpha=nan: expected a value from 0 to 1"),
    ({"w_groupsize": 0}, "w_groupsize=0: expected a value from 1"),
    ({"nsamples": 0}, "nsamples=0: expected a value from 1"),
    ({"profile": "fast"}, "profile='fast' is unknown; there are quick, standard, full"),
    ({"solver": "newton"}, "solver='newton' is unknown; there are mm, sgd, adam, cayley, greedy"),
    ({"recipes": "rtn,gptq"}, "recipes='gptq' is unknown; there are rtn"),
    ({"recipe": "gptq"}, "recipe='gptq' is unknown; there are rtn"),
    ({"objective": "entropy"}, "objective='entropy' is unknown"),
    ({"dtype": "int8"}, "dtype='int8' is unknown"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD, ids=[str(p) for p, _ in BAD])
def test_bad_values_are_named(parameters, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below
        make_config(parameters)
    assert str(error.value).startswith(message)


def test_whole_numbers_serve_as_floats():
    assert make_config({"smooth_alpha": 1}).smooth_alpha == 1.0


def test_output_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("JOINTQUANT_OUTPUT", raising=False)
    assert make_config({"output_dir": str(tmp_path)}).folder == tmp_path / "meta-llama--Llama-3.2-1B"
    monkeypatch.setenv("JOINTQUANT_OUTPUT", str(tmp_path / "moved"))
    assert make_config({}).folder.parent == tmp_path / "moved"
    assert make_config({"output_dir": str(tmp_path)}).folder.parent == tmp_path  # what is given beats it


@pytest.mark.parametrize(
    ("model", "expected"),
    [("smollm2-135m", "smollm2-135m"), ("a/b", "a--b"), ("/data/my model/", "my-model"), ("./x/m.gguf", "m.gguf")],
)
def test_slug_is_a_folder_name(model, expected):
    assert slug(model) == expected


def test_a_folder_above_is_named_by_its_own_name(tmp_path, monkeypatch):
    """Else results would go above the output folder."""
    (tmp_path / "model" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "sub")
    assert slug("..") == "model"
    assert slug("../sub/../../model") == "model"


def test_recipes_have_their_own_labels():
    assert len({recipe.label for recipe in RECIPES.values()}) == len(RECIPES)
