"""Does a family's entry in the table keep its logits? Tried on a small random model before a large one is touched."""

import json
from copy import deepcopy
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from jqlib.model.families import by_layer, head_dim_in, head_dim_of, sites_of, split
from jqlib.transform.hadamard import random_hadamard
from jqlib.transform.install import install_left
from jqlib.transform.merge import gamma_of, merge
from jqlib.transform.transform import Hadamard, Rotation, Transform

TOLERANCE = 1e-3  # of the logits' root mean square; rightly merged they differ by about 1e-6
HEAD_DIM, VOCABULARY, TOKENS = 8, 64, 24


def check_family(config: PreTrainedConfig) -> None:
    """Raises ValueError unless logits survive R1, R2, R4 and scales in a model of this config's class and kind: its
    biases, groups of heads, tied head, windows and kinds of layers, but two layers, small widths and random weights.
    """
    _check(json.dumps(shrunk(config).to_dict(), default=str))


@cache
def _check(small: str) -> None:
    config = AutoConfig.for_model(**json.loads(small))
    error = change_of_logits(config)
    if not error < TOLERANCE:
        raise ValueError(
            f"a {config.model_type!r} model can't be rotated by its entry in jqlib.model.families: on a small random "
            f"model the logits change by {100 * error:.2g}% of their size, so a large one would be wrong without a word"
        )


def change_of_logits(config: PreTrainedConfig) -> float:
    """Root mean square change of a random model's logits by all transforms, beside that of the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = split(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            p.data = (
                (0.3 * torch.randn(p.shape)).exp() if p.ndim == 1 and "norm" in name else 0.3 * torch.randn(p.shape)
            )
        ids = torch.randint(VOCABULARY, (2, TOKENS))
        before = model(ids, use_cache=False).logits
        _transform(model)
        after = model(ids, use_cache=False).logits
    return ((after - before).square().mean() / before.square().mean()).sqrt().item()


def _transform(model: nn.Module) -> None:
    d, stream, transforms = head_dim_of(model), Rotation(random_hadamard(model.config.hidden_size, 0)), {}
    for name, place in sites_of(model).items():
        positive = (0.3 * torch.randn(place.width if place.norm else place.source.out_features)).exp()
        if place.norm is not None:
            transforms[name] = Transform(gamma_of(place.norm), stream, positive)
        elif place.kind == "o":
            heads = place.source.out_features // d
            R2 = torch.linalg.qr(torch.randn(heads, d, d))[0]
            transforms[name] = Transform(positive, Rotation(R2), heads=heads)
        else:
            transforms[name] = Transform(positive, Hadamard(place.width), online=True)
    merge(model, transforms, fuse=True)
    install_left(model, transforms)


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same kind of model, small: two layers, of two kinds if it has them."""
    small, layers = deepcopy(config), config.num_hidden_layers
    groups = min(8, config.num_attention_heads // config.num_key_value_heads)
    kv = min(2, config.num_key_value_heads)
    odd = head_dim_in(config) * config.num_attention_heads != config.hidden_size
    apart = by_layer(config)
    kinds = [tuple(values[i] for values in apart.values()) for i in range(layers)]
    second = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), layers - 1)
    sizes = {
        "num_hidden_layers": 2, "num_attention_heads": kv * groups, "num_key_value_heads": kv, "head_dim": HEAD_DIM,
        "hidden_size": kv * groups * HEAD_DIM * (2 if odd else 1), "intermediate_size": 96, "vocab_size": VOCABULARY,
        "sliding_window": 8, "max_position_embeddings": 64, "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None, "max_window_layers": 1, "quantization_config": None,
    }  # fmt: skip
    for name, value in (sizes | {name: [values[0], values[second]] for name, values in apart.items()}).items():
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    return small
