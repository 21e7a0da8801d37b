"""What a run will meet and take, told before it starts: no weights are read."""

import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from jqlib.config import Config
from jqlib.distill import TOKENS
from jqlib.hadamard import factors
from jqlib.models import R1_SITES, family_of, head_dim_of, linears_of, load_config, site_targets, sites_of

PYTHON = 700_000_000  # bytes of a process that has torch and transformers: the runner is one, a kernel another


def describe(config: Config) -> str:
    """Sites, sizes, which rotations can start from a Hadamard matrix, memory, and time on this machine.

    Times are estimates from one matrix product; they count products only. Raises as `jqlib.get_model` does for a
    model that is missing or not supported.
    """
    model = _without_weights(config)
    shape = model.config
    dtype = getattr(torch, config.dtype)
    linears = linears_of(model)
    in_layers = sum(linear.weight.numel() for linear in linears)
    parameters = sum(p.numel() for p in model.parameters())
    return "\n".join([
        f"profile {config.profile}: {config.nsamples} windows of {config.seqlen} tokens to calibrate",
        f"{config.model}: {shape.model_type}, {shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads ({shape.num_key_value_heads} kv), vocabulary {shape.vocab_size:,}"
        + (", tied head (untied when norms are fused)" if shape.tie_word_embeddings else ""),
        f"{parameters:,} parameters, {in_layers:,} of them in the {len(linears)} linears that are quantised",
        "", *_sites(model),
        "", *_rotations(shape.hidden_size, head_dim_of(model), shape.intermediate_size),
        "", *_memory(config, model, parameters * dtype.itemsize),
        "", *_time(config, in_layers, model.get_submodule(family_of(model).head).weight.numel(), dtype),
    ])  # fmt: skip


def _sites(model: nn.Module) -> list[str]:
    width = {site: model.get_submodule(name).in_features for name, (_, site) in sites_of(model).items()}
    return [f"site {site.name:5s} {n:6d} channels, read by {', '.join(site.readers)}" for site, n in width.items()]


def _rotations(hidden: int, head: int, intermediate: int) -> list[str]:
    lines = []
    for name, size in {"R1": hidden, "R2, R3": head, "R4": intermediate}.items():
        try:
            lines.append(f"{name:6s} {size:6d} = {' · '.join(map(str, factors(size)))}")
        except ValueError as error:
            lines.append(f"{name:6s} {size:6d}: {error}")
    return lines


def peak_bytes(config: Config) -> int:
    """About the most memory a run takes, rather too much: weights (FP, quantised, and what a step makes of them),
    token samples, solver, the logits of a window, and two Pythons."""
    model = _without_weights(config)
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, config.dtype).itemsize
    longest = max(config.eval_seqlen, TOKENS)
    logits = 3 * 4 * longest * model.config.vocab_size  # float32: they, their softmax, a copy
    head = model.config.vocab_size * model.config.hidden_size * getattr(torch, config.dtype).itemsize  # FP's, for KL
    return 3 * weights + sum(_working_memory(config, model)) + logits + head + 2 * PYTHON


def _without_weights(config: Config) -> nn.Module:
    shape = load_config(config.model)  # may have to convert a GGUF: not on the meta device
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def _working_memory(config: Config, model: nn.Module) -> tuple[int, int]:
    """Bytes of the token samples, and of the solver."""
    sampled = site_targets(model, *R1_SITES, "o")
    samples = sum(model.get_submodule(name).in_features * config.max_tokens * 4 for name in sampled)
    return samples, 8 * 4 * model.config.hidden_size**2


def _memory(config: Config, model: nn.Module, weights: int) -> list[str]:
    samples, solver = _working_memory(config, model)
    return [
        f"memory: {weights / 1e9:.1f} GB of weights in {config.dtype} (held up to three times), "
        f"{samples / 1e9:.1f} GB of token samples, {solver / 1e9:.2f} GB for the solver"
    ]


def _time(config: Config, in_layers: int, head: int, dtype: torch.dtype) -> list[str]:
    speed = _operations_per_second(config.device, dtype)
    calibration = 2 * in_layers * config.nsamples * config.seqlen / speed
    window = 2 * (in_layers + head) * config.eval_seqlen / speed
    stage = config.refine_steps * 4 * 2 * (in_layers + head) * TOKENS / speed  # forward, backward, and the FP model's
    return [
        f"time at {speed / 1e9:.0f} billion operations a second ({config.device}): {calibration:.0f} s to collect "
        f"activations, {window:.1f} s a window of perplexity, of which a row takes "
        f"{config.eval_windows or 'all of the test text'},",
        f"{stage:.0f} s to refine or to tune ({config.refine_steps} steps).",
        "Products alone: expect about twice as long, and solvers and GPTQ besides.",
    ]


def _operations_per_second(device: str, dtype: torch.dtype, n: int = 1024) -> float:
    x = torch.ones(n, n, device=device, dtype=dtype)
    (x @ x)[0, 0].item()  # warm
    start = time.perf_counter()
    for _ in range(4):
        y = x @ x
    y[0, 0].item()  # waits for the device
    return 4 * 2 * n**3 / (time.perf_counter() - start)
