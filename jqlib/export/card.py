"""The model card of an exported folder: what it is, its figures and how they were measured, how to load it."""

import shlex
from dataclasses import asdict

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from yaml import YAMLError

from jqlib import pipeline
from jqlib.config import Config, make_config
from jqlib.model import embedded
from jqlib.model.load import folder_of
from jqlib.recipes import Recipe
from jqlib.store import git_commit, versions
from jqlib.transform.grids import OFF

LOADS = {
    "hf": 'AutoModelForCausalLM.from_pretrained(folder)  # transformers\nvllm serve folder',
    "compressed-tensors": 'AutoModelForCausalLM.from_pretrained(folder)  # transformers, with compressed-tensors\n'
                          "vllm serve folder",
    "gguf": "llama-server -m folder/model.gguf",
    "jointquant": "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)   # runs the file "
                  "modeling_jointquant.py of this folder",
}  # fmt: skip
IS = {
    "hf": "The floating-point model, rotated: rotations, gains and scales are merged into its weights, nothing runs "
          "online, and it computes what the original does. A start for other quantisers.",
    "compressed-tensors": "{codes}.",
    "gguf": "{codes}; embeddings and head in float16.",
    "jointquant": "All that was measured. {codes}, activations rounded to {a_bits} bits, the KV cache to {kv_bits} "
                  "(16: not rounded), and what runs online. Rounding of activations is simulated.",
}  # fmt: skip
CODES = {
    "hf": "",
    "compressed-tensors": "Weights as codes of {w_bits} bits with float16 scales, packed by compressed-tensors",
    "gguf": "Weights as Q4_0 for llama.cpp, codes and scales exactly ours",
    "jointquant": "Weights as codes of {w_bits} bits",
}  # fmt: skip

CARD = """---
library_name: {library}
license: {licence}
base_model: {model}
tags: [jointquant]
---

# {model}: {label}

{what}

```
{loads}
```

## Figures

| | perplexity | 95% interval | KL from FP |
|---|---|---|---|
{rows}

A weight of the layers takes {bits:.3f} bits in these files. Rounding is simulated in these figures; an engine's own
kernels differ a little. Protocol:

{protocol}

## How it was made

```
{command}
```

jointquant at commit {commit}, {versions}. Settings and rows: `jointquant.json`; the transforms of all sites:
`rotations/transforms.safetensors`.
"""


def card(config: Config, recipe: Recipe, form: str, rows: dict[str, dict], bits: float) -> str:
    """Markdown, with the metadata that the hub reads. ``rows``: of notebook 05; ``bits``: that a weight takes."""
    return CARD.format(
        library="llama.cpp" if form == "gguf" else "transformers", licence=licence_of(config.model),
        model=config.model, label=recipe.label, what=_is(form, config), loads=LOADS[form], bits=bits,
        rows="\n".join(f"| {name} | {r['ppl']:.3f} | {_span(r)} | {r['kl']:.4f} |" for name, r in rows.items()),
        protocol="\n".join(f"* {name}: {value}" for name, value in pipeline.protocol(config).items()),
        command=_command(config, recipe, form), commit=git_commit(),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )  # fmt: skip


def _span(row: dict) -> str:
    ends = row["ppl_low"], row["ppl_high"]
    return "not known" if None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _is(form: str, config: Config) -> str:
    codes = CODES[form] if config.w_bits < OFF else "Weights in floating point"
    return IS[form].format(codes=codes.format(**asdict(config)), **asdict(config))


def _command(config: Config, recipe: Recipe, form: str) -> str:
    if recipe != pipeline.recipe_of(config):
        return "by jqlib.export.export.export, with a recipe of its own: its settings are in jointquant.json"
    named = {"model": config.model, "profile": config.profile} | ({"stream": True} if config.stream else {})
    usual = asdict(make_config(named))
    flags = named | {name: value for name, value in asdict(config).items() if value != usual[name]}
    words = shlex.join(str(word) for name, value in flags.items() for word in (f"--{name}", value))
    return f"python -m jqlib export {words} --format {form} --to FOLDER"


def licence_of(model: str) -> str:
    """The source model's, as its own card says; "other" where that is not known."""
    if model == embedded.MODEL:
        return "apache-2.0"
    try:
        readme = folder_of(model) / "README.md"
        source = ModelCard(readme.read_text(encoding="utf-8")) if readme.is_file() else ModelCard.load(model)
        return source.data.license or "other"
    except (OSError, ValueError, YAMLError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return "other"
