"""What the steps of a run read: its model and text, and the artifact of a step."""

from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor

from jqlib.code import code_of
from jqlib.config import Config
from jqlib.learn.steps import Steps
from jqlib.memory import release
from jqlib.model import load, text
from jqlib.model.data import Windows, get_calibration_data, get_evaluation_windows
from jqlib.precision import products_dtype
from jqlib.store import Artifact

MODEL = ("model", "dtype", "device", "stream")
TEXT = ("calib_dataset", "nsamples", "seqlen", "seed")
# what stages by the loss go by
LESSONS = (*MODEL, "calib_dataset", "seqlen", "seed", "refine_steps", "step_tokens", "compute_dtype")
CALIBRATION = ("model", "calib_dataset", "seqlen", "seed")
WINDOWS = ("eval_dataset", "eval_seqlen", "eval_windows", "eval_split", "eval_draw", "bos")


def dtype_of(config: Config) -> torch.dtype:
    """The dtype that a run's model is loaded in."""
    return load.default_dtype(config.model) if config.dtype == "auto" else getattr(torch, config.dtype)


def load_model(config: Config):
    """The FP model of a run, fresh."""
    return load.get_model(config.model, config.device, dtype_of(config), stream=config.stream)


def load_calibration(config: Config) -> Tensor:
    """The run's calibration windows, (nsamples, seqlen)."""
    return _calibration(*_known(config, CALIBRATION), config.nsamples, config.nsamples)


def text_for(config: Config, tokens: int, least: int = 1) -> Tensor:
    """As many calibration windows as so many ``tokens`` of text need, or as there are, at ``least`` so many."""
    return _calibration(*_known(config, CALIBRATION), max(1, -(-tokens // config.seqlen)), least)


def evaluation_windows(config: Config) -> Windows:
    """The run's evaluation windows."""
    return _evaluation(*_known(config, ("model", *WINDOWS)))


def _known(config: Config, names: tuple[str, ...]) -> tuple[tuple, tuple]:
    """These settings, and what they stand for, which other files of the same name would change."""
    return tuple(getattr(config, name) for name in names), tuple(_content(config, name) for name in names)


@cache  # a text takes longer to tokenise than a model to load, and all rows read the same
def _calibration(settings: tuple, contents: tuple, count: int, least: int) -> Tensor:
    model, dataset, seqlen, seed = settings
    windows = get_calibration_data(load.get_tokenizer(model), count, seqlen, dataset, seed, least=least)
    release()  # a tokenizer leaves some 70 MB behind
    return windows


@cache
def _evaluation(settings: tuple, contents: tuple) -> Windows:
    model, dataset, seqlen, count, split, draw, bos = settings
    tokenizer = load.get_tokenizer(model)
    windows = get_evaluation_windows(tokenizer, dataset, seqlen, count or None, split=split, windows=draw, bos=bos)
    release()
    return windows


def steps_of(s, seed: int = 0, **more) -> Steps:
    """Of a stage by the loss."""
    dtype = products_dtype(s.compute_dtype, s.device)
    return Steps(s.refine_steps, s.seed + seed, s.step_tokens, dtype, **more)


def artifact_of(
    step, config: Config, names: tuple[str, ...], make, *inputs: Artifact, resumable: bool = False, **also
) -> Artifact:
    """The artifact of a step. ``make(s, *inputs)``: s has the named settings and no other; ``also``: the recipe's."""
    s = SimpleNamespace(**{name: getattr(config, name) for name in names})
    settings = {name: _content(config, name) for name in names} | also
    kind = step.__name__.removesuffix("_step")
    return Artifact(config.folder, kind, settings, code_of(step), partial(make, s), inputs, resumable, config.model)


def _content(config: Config, name: str):
    """What a setting stands for: the model's and the text's content, not their names; what "auto" comes to here."""
    if name.endswith("compute_dtype"):
        return str(products_dtype(getattr(config, name), config.device))
    if name == "model":
        return load.fingerprint(config.model)
    if name == "dtype":
        return str(dtype_of(config))
    return text.fingerprint(getattr(config, name)) if name.endswith("_dataset") else getattr(config, name)
