"""What a run will meet and take, before it starts (no weights are read), and what is on disk already."""

import torch
from torch import nn
from torch.utils.benchmark import Timer

from jqlib.config import Config
from jqlib.inputs import dtype_of, steps_of
from jqlib.lab.disk import on_disk
from jqlib.lab.pages import outdated
from jqlib.learn.lessons import ROWS
from jqlib.learn.recompute import kept_bytes
from jqlib.model.embedded import MODEL
from jqlib.model.families import R1_SITES, family_of, linears_of, rotated_sizes, sites_of
from jqlib.model.load import without_weights
from jqlib.precision import products_dtype
from jqlib.product import product
from jqlib.transform.hadamard import block_order, factors, in_blocks

TEST_TEXT = 300_000  # tokens, about, of WikiText-2's test split
PYTHON = 700_000_000  # bytes of a process that has torch and transformers: the runner is one, a kernel another


def describe(config: Config) -> str:
    """Sites, sizes, which rotations can start from a Hadamard matrix, memory, and time on this machine.

    Times are estimates from one matrix product; they count products only. Raises as `jqlib.get_model` does for a
    model that is missing or not supported.
    """
    model, dtype = without_weights(config.model), dtype_of(config)
    shape, linears = model.config, linears_of(model)
    in_layers, parameters = _numel(linears.values()), sum(p.numel() for p in model.parameters())
    head = model.get_submodule(family_of(model).head).weight.numel()
    sites = list(sites_of(model).values())[: len(family_of(model).sites)]
    return "\n".join([
        f"profile {config.profile}: {config.nsamples} windows of {config.seqlen} tokens to calibrate",
        f"{config.model}: {shape.model_type}, {shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads ({shape.num_key_value_heads} kv), vocabulary {shape.vocab_size:,}"
        + (", tied head (untied when norms are fused)" if shape.tie_word_embeddings else ""),
        f"{parameters:,} parameters, {in_layers:,} of them in the {len(linears)} linears that are quantised",
        "", *(f"site {site.kind:5s} {site.width:6d} channels, read by {_short(site.linears)}" for site in sites),
        "", *(_rotation(name, size) for name, size in rotated_sizes(shape).items()),
        "", f"memory: {parameters * dtype.itemsize / 1e9:.1f} GB of weights in {dtype}".replace("torch.", ""),
        f"{peak_bytes(config) / 1e9:.1f} GB at most: two models, what tuning keeps of one, and the runner; by --stream "
        f"{streamed_bytes(config) / 1e9:.1f} GB: embeddings, heads, one layer",
        "", *_time(config, in_layers, head, dtype),
        "", on_disk(config.folder), *_old_pages(config.model),
    ])  # fmt: skip


def peak_bytes(config: Config) -> int:
    """About the most memory a run takes: FP and quantised model and what tuning keeps of its weights and of activations
    (five float32 copies, as measured) for the way back, samples or Hessians, a window's logits, two Pythons."""
    model, dtype = without_weights(config.model), dtype_of(config)
    shape, linears = model.config, linears_of(model)
    untied = shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0
    weights = 2 * sum(p.numel() for p in model.parameters()) + untied + _numel(linears.values())
    sites = sites_of(model, *R1_SITES, "o").values()
    samples = 4 * config.max_tokens * sum(site.width for site in sites) + 8 * 4 * shape.hidden_size**2
    hessian = 8 * 4 * max(linear.in_features for linear in linears.values()) ** 2
    logits = 4 * (config.eval_seqlen + 4 * ROWS) * shape.vocab_size  # float32: a window's, and a few of some rows
    kept = kept_bytes(shape, steps_of(config).together)
    return weights * dtype.itemsize + max(samples, hessian) + kept + logits + 2 * PYTHON


def streamed_bytes(config: Config) -> int:
    """About the most memory that a run by ``--stream`` takes, the notebook's Python: embeddings and two heads; rounded
    weights, packed; hidden states thrice; a layer, and its largest matrix thrice or a Hessian twice in float64."""
    model, size = without_weights(config.model), dtype_of(config).itemsize
    shape, linears = model.config, linears_of(model)
    ends = 3 * shape.vocab_size * shape.hidden_size * size
    packed = _numel(linears.values()) * config.w_bits / 8
    evaluated = config.eval_windows * config.eval_seqlen or TEST_TEXT
    hidden = 3 * max(config.nsamples * config.seqlen, evaluated) * shape.hidden_size * size
    sites = sites_of(model).values()
    hessians = 4 * sum(site.width**2 for site in sites) // shape.num_hidden_layers
    widest, largest = max(site.width for site in sites), max(linear.weight.numel() for linear in linears.values())
    matrix = max(4 * 3 * largest, 8 * 2 * widest**2)
    layer = _numel(linears.values()) // shape.num_hidden_layers * size
    return int(ends + packed + hidden + hessians + matrix + layer) + PYTHON


def _old_pages(model: str) -> list[str]:
    old = ", ".join(outdated()) if model == MODEL else ""
    return [f"figures/pages: not of today's notebooks: {old} (make workbook pages)"] if old else []


def _numel(linears) -> int:
    return sum(linear.weight.numel() for linear in linears)


def _short(linears: dict[str, nn.Linear]) -> str:
    """Names within the layer."""
    return ", ".join(".".join(name.split(".")[-2:]) for name in linears)


def _rotation(name: str, size: int) -> str:
    try:
        made, parts = in_blocks(size), " · ".join(map(str, factors(block_order(size))))
        return f"{name:6s} {size:6d} = {'' if made == 'whole' else f'{made} = '}{parts}"
    except ValueError as error:
        return f"{name:6s} {size:6d}: {error}"


def _time(config: Config, in_layers: int, head: int, dtype: torch.dtype) -> list[str]:
    speed = _operations_per_second(config.device, dtype)
    calibration = 2 * in_layers * config.nsamples * config.seqlen / speed
    window = 2 * (in_layers + head) * config.eval_seqlen / speed
    fast = _operations_per_second(config.device, products_dtype(config.compute_dtype, config.device))
    stage = 6 * (in_layers + head) * config.refine_steps * config.step_tokens / fast  # forward, backward
    return [
        f"time at {speed / 1e9:.0f} billion operations a second ({config.device}): {calibration:.0f} s to collect "
        f"activations, {window:.1f} s per window of perplexity, of which a row takes "
        f"{config.eval_windows or 'all of the test text'},",
        f"{stage:.0f} s to refine or to tune ({config.refine_steps} steps of {config.step_tokens} tokens).",
        "Products alone: expect about twice as long, and solvers and GPTQ besides.",
    ]


def _operations_per_second(device: str, dtype: torch.dtype, n: int = 1024) -> float:
    x = torch.ones(n, n, device=device, dtype=dtype)
    timer = Timer("product(x, x)", globals={"x": x, "product": product}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.timeit(4).mean
