"""`export`: a run's model as a folder that others load, in one of four forms."""

import importlib.util
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from jqlib import pipeline
from jqlib.choices import check_choice
from jqlib.config import Config
from jqlib.export import compressed, gguf, hf, ours
from jqlib.export.can import CHOSEN_THERE, ENGINES, FORMS, check_form
from jqlib.export.card import card
from jqlib.export.size import bits_per_weight
from jqlib.model.load import get_tokenizer, load_config, without_weights
from jqlib.recipes import Recipe
from jqlib.store import check_place, git_commit, versions, write_json
from jqlib.transform.grids import OFF
from jqlib.transform.transform import packed

ABOUT = "jointquant.json"
MISSING = "format 'compressed-tensors' needs its library: pip install -c constraints.txt -e '.[export]'"
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
    _check_folder(to, config, overwrite)
    if form == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
        raise ModuleNotFoundError(MISSING)
    rows = _rows(form, config, recipe)
    folder = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        WRITERS[form](config, recipe, get_tokenizer(config.model), folder)
        (folder / "rotations").mkdir()  # apart: engines take every safetensors file beside the weights for weights
        tensors, _ = packed(pipeline.transforms(config, recipe))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                  folder / "rotations" / "transforms.safetensors")  # fmt: skip
        about = {"format": form, "config": asdict(config), "recipe": asdict(recipe), "rows": rows}
        about |= {"bits_per_weight": bits_per_weight(folder, without_weights(config.model))}
        write_json(folder / ABOUT, about | {"versions": versions(), "git_commit": git_commit()})
        (folder / "README.md").write_text(card(config, recipe, form, rows, about["bits_per_weight"]), encoding="utf-8")
        for file in (path for path in folder.rglob("*") if path.is_file()):
            file.chmod(folder.stat().st_mode & 0o666)  # the writer of safetensors lets nobody else read them
        if to.exists():
            shutil.rmtree(to)
        os.replace(folder, to)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return to


def _check_folder(to: Path, config: Config, overwrite: bool) -> None:
    """A folder that may be written, and can be, and holds nothing of this run's own."""
    if to.exists() and not (overwrite and (to / ABOUT).is_file()):
        raise FileExistsError(f"{to} is there already: export writes a new folder, or overwrites one of its own")
    model = Path(config.model).expanduser()
    for what, place in (("the model that is exported", model if model.exists() else None), ("results", config.folder)):
        if place and place.resolve().is_relative_to(to.resolve()):
            raise FileExistsError(f"{to} holds {what}: name another folder")
    check_place(to.parent, "to")


def _rows(form: str, config: Config, recipe: Recipe) -> dict[str, dict]:
    """FP's row, and that of what is written; and, where engines choose the activations' grid, of the weights alone."""
    rows = {"FP": pipeline.evaluate(config, None, OFF, OFF)}
    if form == "hf":
        return rows
    bits = config.w_bits, config.a_bits
    rows[f"W{bits[0]}A{bits[1]}"] = pipeline.evaluate(config, recipe, *bits)
    if form in ENGINES and CHOSEN_THERE <= config.a_bits < OFF:
        every = 0, load_config(config.model).num_hidden_layers - 1
        rows[f"W{bits[0]}A16, the same weights"] = pipeline.evaluate(config, recipe, *bits, layers=every)
    return rows
