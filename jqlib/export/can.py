"""What each form can say of a run's model. What it can't is refused before any work, with what can be done instead."""

from dataclasses import dataclass

from jqlib.config import Config
from jqlib.export.gguf_tokenizer import check_tokenizer
from jqlib.model.families import head_dim_in
from jqlib.model.load import get_tokenizer, load_config
from jqlib.recipes import RECIPES, Recipe
from jqlib.transform.grids import OFF

FORMS = ("hf", "compressed-tensors", "gguf", "jointquant")
ENGINES = ("compressed-tensors", "gguf")  # whose programs know nothing of us
BLOCK = 32  # weights that share a scale in GGUF's Q4_0
CHOSEN_THERE = 8  # bits of activations from which on an engine may choose their grid itself: it costs next to nothing
ROPES = ("default", "linear", "llama3")  # those whose frequencies, each divided by a number, say it all
DEPLOY = "the recipe made for engines is deploy; the form that holds everything is jointquant"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's code of an architecture takes for granted."""

    name: str  # GGUF's
    paired: bool = False  # rows of queries and keys come in the pairs that RoPE turns
    ropes: tuple[str, ...] = ROPES
    unturned: int = 0  # each so many-th layer has no RoPE
    square: bool = False  # all heads together are as wide as the model


ARCHITECTURES = {  # by transformers' model_type
    "llama": Architecture("llama", paired=True), "mistral": Architecture("llama", paired=True),
    "qwen2": Architecture("qwen2"), "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", paired=True, ropes=("default",), unturned=4),
    "phi3": Architecture("phi3", ropes=("default",), square=True),
}  # fmt: skip


def check_form(form: str, config: Config, recipe: Recipe) -> None:
    """Raises ValueError if a form can't hold the run's model under a (settled) recipe."""
    if reason := reason_against(form, config, recipe):
        name = next((name for name, known in RECIPES.items() if known.label == recipe.label), recipe.label)
        raise ValueError(f"format {form!r} can't hold recipe {name!r}: {reason}")


def reason_against(form: str, config: Config, recipe: Recipe) -> str | None:
    """Why a form can't hold the run's model under a (settled) recipe; None if it can."""
    if form == "hf":
        return "the whole model is written: leave out stream=True" if config.stream else None
    if form not in ENGINES:
        return None
    if recipe.online:
        return f"Hadamard transforms would run online, and engines drop them without a word; {DEPLOY}"
    learns = "clip" in recipe.refine or recipe.layerwise or recipe.tune
    if config.a_bits < CHOSEN_THERE and not (recipe.a_clip is None or (recipe.a_clip == 1 and not learns)):
        return f"its activations are clipped, which engines don't do; {DEPLOY}"
    if config.kv_bits < OFF:
        return f"kv_bits={config.kv_bits}: its keys are rotated (R3). Let the engine round its own cache"
    if form == "gguf":
        return _gguf(config)
    return None if config.w_bits in (4, 8) else f"w_bits={config.w_bits}: engines read 4 or 8"


def _gguf(config: Config) -> str | None:
    shape = load_config(config.model)
    if shape.model_type not in ARCHITECTURES:
        return f"{shape.model_type} models are not written as GGUF here; there are {', '.join(ARCHITECTURES)}"
    if config.w_bits not in (4, OFF) or config.a_bits < CHOSEN_THERE:
        return (
            f"w_bits={config.w_bits}, a_bits={config.a_bits}: GGUF has weights of 4 bits here (Q4_0), or 16, and "
            f"llama.cpp rounds activations to 8 as it does; {DEPLOY}"
        )
    heads = shape.num_attention_heads * head_dim_in(shape)
    sizes = config.w_groupsize, shape.hidden_size, shape.intermediate_size, heads
    if odd := [n for n in sizes if n % BLOCK and config.w_bits == 4]:
        return f"{odd[0]} is no multiple of {BLOCK}, the weights that share a scale in Q4_0 (w_groupsize, channels)"
    if _slides(shape):
        return "it has sliding windows, which its GGUF would lose"
    if reason := _otherwise(shape, ARCHITECTURES[shape.model_type]):
        return reason
    try:
        check_tokenizer(get_tokenizer(config.model))
    except ValueError as error:
        return str(error)
    return None


def _otherwise(shape, known: Architecture) -> str | None:
    """What a config says that llama.cpp's code does otherwise."""
    rope, layers = getattr(shape, "rope_parameters", None) or {}, range(1, shape.num_hidden_layers + 1)
    if (kind := rope.get("rope_type", "default")) not in known.ropes:
        return f"its RoPE is of type {kind!r}; written are {', '.join(known.ropes)}"
    if (part := rope.get("partial_rotary_factor", 1)) != 1:
        return f"its RoPE turns a part of each head, {part}: written are those that turn all"
    turned = [int(not known.unturned or layer % known.unturned != 0) for layer in layers]
    if list(getattr(shape, "no_rope_layers", None) or [1 for _ in layers]) != turned:
        return f"its layers without RoPE are others than each {known.unturned}th, which llama.cpp takes for granted"
    heads = shape.num_attention_heads * head_dim_in(shape)
    if known.square and heads != shape.hidden_size:
        return f"its heads have {heads} channels together and it has {shape.hidden_size}: llama.cpp wants as many"
    return None


def _slides(shape) -> bool:
    """Whether a layer sees a window: its config says so of each layer, or of all together."""
    windows = bool(getattr(shape, "sliding_window", None))
    return any(kind != "full_attention" for kind in getattr(shape, "layer_types", None) or ["sliding"] * windows)
