"""`export`: a run's model as a folder that others load, in one of four forms."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from jqlib import pipeline
from jqlib.choices import check_choice
from jqlib.config import Config
from jqlib.export import compressed, gguf, hf, ours
from jqlib.export.can import FORMS, check_form
from jqlib.export.card import card
from jqlib.model.load import get_tokenizer
from jqlib.recipes import Recipe
from jqlib.store import git_commit, versions, write_json
from jqlib.transform.transform import packed

ABOUT = "jointquant.json"
WRITERS = dict(zip(FORMS, (hf.write, compressed.write, gguf.write, ours.write), strict=True))


def export(
    config: Config, form: str, to: str | Path, recipe: Recipe | None = None, *, overwrite: bool = False
) -> Path:  # fmt: skip
    """Write the run's model under a recipe (default: the run's own) to a folder ``to``, which must not be there yet, or
    with ``overwrite`` be an earlier export.

    ``form``: ``"hf"``, the rotated FP model, without what runs online; ``"compressed-tensors"`` (transformers, vLLM);
    ``"gguf"`` (llama.cpp); ``"jointquant"``, all that `jqlib.pipeline.evaluate` measures, by a file of code in the
    folder. Weights are the codes and float16 scales of the artifacts: nothing is rounded once more. Beside them a model
    card with its figures, ``jointquant.json`` (settings and rows) and the transforms,
    ``rotations/transforms.safetensors``.

    Raises ValueError for what a form can't say (`jqlib.export.can`), FileExistsError if the folder may not be written.
    """
    check_choice("format", form, FORMS)
    recipe = recipe or pipeline.recipe_of(config)
    config, to = pipeline.settled(config, recipe), Path(to).expanduser()
    check_form(form, config, recipe)
    if to.exists() and not (overwrite and (to / ABOUT).is_file()):
        raise FileExistsError(f"{to} is there already: export writes a new folder, or overwrites one of its own")
    row = pipeline.evaluate(config, recipe, config.w_bits, config.a_bits) if form != "hf" else None
    fp = pipeline.evaluate(config, None, 16, 16)
    folder = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        WRITERS[form](config, recipe, get_tokenizer(config.model), folder)
        (folder / "rotations").mkdir()  # apart: engines take every safetensors file beside the weights for weights
        tensors, _ = packed(pipeline.transforms(config, recipe))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                  folder / "rotations" / "transforms.safetensors")  # fmt: skip
        (folder / "README.md").write_text(card(config, recipe, form, fp, row), encoding="utf-8")
        about = {"format": form, "config": asdict(config), "recipe": asdict(recipe), "fp": fp, "row": row}
        write_json(folder / ABOUT, about | {"versions": versions(), "git_commit": git_commit()})
        if to.exists():
            shutil.rmtree(to)
        os.replace(folder, to)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return to
