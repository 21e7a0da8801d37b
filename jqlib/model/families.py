"""The one table that knows the names of a family's modules, and the sites of a model.

Nothing else in jqlib says ``q_proj``. A *site* is the input of one group of linears: ``qkv`` and ``ug`` read the
residual stream behind a norm, ``o`` and ``down`` read inside a block and write back to the stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from jqlib.model.refuse import refuse_to_save


@dataclass(frozen=True)
class Site:
    """One group of linears that share an input. Names are relative to the decoder layer."""

    kind: str
    readers: tuple[str, ...]
    norm: str | None = None  # the norm whose output they read
    source: str | None = None  # else: the linear whose output channels become the input's


@dataclass(frozen=True)
class Family:
    """Where a family of architectures keeps its modules (dotted names from the model's root)."""

    sites: tuple[Site, ...]
    writers: tuple[str, ...]  # linears whose output is added to the residual stream
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)  # linears that hold several, by layer: `split`
    attention: str = "self_attn"  # relative to the layer
    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"


LLAMA = Family(
    sites=(
        Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
        Site("o", ("self_attn.o_proj",), source="self_attn.v_proj"),
        Site("ug", ("mlp.up_proj", "mlp.gate_proj"), norm="post_attention_layernorm"),
        Site("down", ("mlp.down_proj",), source="mlp.up_proj"),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)
QKV, UG = "self_attn.qkv_proj", "mlp.gate_up_proj"
PHI3 = replace(
    LLAMA,
    sites=(
        Site("qkv", (f"{QKV}.q_proj", f"{QKV}.k_proj", f"{QKV}.v_proj"), norm="input_layernorm"),
        Site("o", ("self_attn.o_proj",), source=f"{QKV}.v_proj"),
        Site("ug", (f"{UG}.up_proj", f"{UG}.gate_proj"), norm="post_attention_layernorm"),
        Site("down", ("mlp.down_proj",), source=f"{UG}.up_proj"),
    ),
    joined={QKV: ("q_proj", "k_proj", "v_proj"), UG: ("gate_proj", "up_proj")},
)
# transformers' model_type -> Family. Whether an entry is right, `jqlib.transform.selfcheck` tries on a small model.
FAMILIES = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "smollm3": LLAMA, "phi3": PHI3,
}  # fmt: skip
EXPERTS = "it has a mixture of experts: a linear of it sees only some tokens, and no one site feeds them all"
ONE_MORE = "its norms multiply by 1 + weight, and more norms stand behind its blocks: R1 can't pass those"
BEHIND = "its norms stand behind the blocks, not before them: R1 can't pass those"
REASONS = {  # why a model_type has no entry, where that is known
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "phimoe": EXPERTS, "gpt_oss": EXPERTS,
    "deepseek_v2": EXPERTS, "deepseek_v3": EXPERTS, "llama4": EXPERTS, "llama4_text": EXPERTS, "olmoe": EXPERTS,
    "gemma": "its norms multiply by 1 + weight and its embedding by √hidden", "gemma2": ONE_MORE, "gemma3": ONE_MORE,
    "gemma3_text": ONE_MORE, "olmo2": BEHIND, "olmo3": BEHIND, "glm4": BEHIND,
    "gpt2": "it has LayerNorms, which take the mean off", "phi": "it has LayerNorms, which take the mean off",
}  # fmt: skip
R1_SITES = ("qkv", "ug")
APART = (
    "linears of this model that hold several (such as qkv_proj) were taken apart: a Hugging Face checkpoint of it "
    "could not be read again. Keep it by jqlib.save_model(model, path), which jqlib.load_model(path) reads"
)


@dataclass(frozen=True)
class Place:
    """A site of one layer of one model. Its name is its first reader's: ``model.layers.0.self_attn.q_proj``."""

    name: str
    kind: str
    layer: int
    linears: dict[str, nn.Linear]  # the readers, by full name
    norm: nn.Module | None
    source: nn.Linear | None

    @property
    def host(self) -> nn.Module:
        """The module where the site's input is made or first read: it carries the site's Transform."""
        return self.norm if self.norm is not None else self.linears[self.name]

    @property
    def width(self) -> int:
        return self.linears[self.name].in_features

    @property
    def weight(self) -> Tensor:
        """Its readers' weights, one above the other: (out, in)."""
        return torch.cat([linear.weight.data for linear in self.linears.values()])


def family_of(model: nn.Module) -> Family:
    return FAMILIES[model.config.model_type]


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(name, decoder layer)``, first to last."""
    name = family_of(model).layers
    for i, layer in enumerate(model.get_submodule(name)):
        yield f"{name}.{i}", layer


def attentions_of(model: nn.Module) -> list[nn.Module]:
    """The attention module of every layer."""
    return [layer.get_submodule(family_of(model).attention) for _, layer in layers_of(model)]


def sites_of(model: nn.Module, *kinds: str) -> dict[str, Place]:
    """The sites of these kinds (default: all) by name, in the model's order. ValueError for an unknown kind."""
    sites = {site.kind: site for site in family_of(model).sites}
    if unknown := [kind for kind in kinds if kind not in sites]:
        raise ValueError(f"site {unknown[0]!r} is unknown; there are {', '.join(sites)}")
    places = {}
    for i, (name, layer) in enumerate(layers_of(model)):
        for site in sites.values():
            if not kinds or site.kind in kinds:
                linears = {f"{name}.{reader}": layer.get_submodule(reader) for reader in site.readers}
                norm, source = (at and layer.get_submodule(at) for at in (site.norm, site.source))
                first = next(iter(linears))
                places[first] = Place(first, site.kind, i, linears, norm, source)
    return places


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norm before each site that has one, by the site's name."""
    return {name: place.norm for name, place in sites_of(model).items() if place.norm is not None}


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """All linears of the decoder layers that read a site, by name: those that are quantised."""
    return {name: linear for place in sites_of(model).values() for name, linear in place.linears.items()}


def site_targets(model: nn.Module, *kinds: str) -> list[str]:
    """The module that stands for each site, its first reader: ``model.layers.0.self_attn.q_proj``.

    ``site_targets(model, "qkv", "ug")`` are R1's targets, ``site_targets(model, "o")`` are R2's.
    """
    return list(sites_of(model, *kinds))


def split(model: nn.Module) -> nn.Module:
    """Put a `Joined` in the place of every linear that holds several, in place; the model."""
    config, d = model.config, head_dim_of(model)
    rows = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
    rows |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads * d)
    rows["q_proj"] = config.num_attention_heads * d
    for _, layer in layers_of(model):
        for name, parts in family_of(model).joined.items():
            joined = Joined(layer.get_submodule(name), {part: rows[part] for part in parts})
            layer.set_submodule(name, joined)
            refuse_to_save(model, APART)
    return model


class Joined(nn.Module):
    """Linears that read the same, each with its name and ``rows``, for the one ``linear`` that a checkpoint has."""

    def __init__(self, linear: nn.Linear, rows: dict[str, int]):
        super().__init__()
        biases = [None] * len(rows) if linear.bias is None else linear.bias.data.split([*rows.values()])
        for name, weight, bias in zip(rows, linear.weight.data.split([*rows.values()]), biases, strict=True):
            part = nn.Linear(linear.in_features, len(weight), bias is not None, device="meta")
            part.weight = nn.Parameter(weight.clone(), requires_grad=False)
            if bias is not None:
                part.bias = nn.Parameter(bias.clone(), requires_grad=False)
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], -1)


def rejoined(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by ``<linear>.<what>`` as a checkpoint has them: those of a `Joined`'s parts one above the other."""
    tensors = dict(tensors)
    for at, joined in model.named_modules():
        if isinstance(joined, Joined):
            parts = [f"{at}.{name}." for name, _ in joined.named_children()]
            for what in [name.removeprefix(parts[0]) for name in tensors if name.startswith(parts[0])]:
                tensors[f"{at}.{what}"] = torch.cat([tensors.pop(f"{part}{what}") for part in parts])
    return tensors


def head_dim_of(model: nn.Module) -> int:
    return head_dim_in(model.config)


def head_dim_in(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def by_layer(config: PreTrainedConfig) -> dict[str, list]:
    """What a config says of every layer apart, such as its kind of attention."""
    return {name: v for name, v in vars(config).items() if isinstance(v, list) and len(v) == config.num_hidden_layers}


def rotated_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """How large each rotation is."""
    return {"R1": config.hidden_size, "R2, R3": head_dim_in(config), "R4": config.intermediate_size}
