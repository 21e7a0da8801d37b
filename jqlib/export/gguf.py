"""GGUF for llama.cpp: weights as Q4_0, whose blocks of 32 with a float16 scale hold our codes and scales exactly.

Embeddings, head and weights that are not rounded are float16, norms and biases float32. Rows of queries and keys come
in the order that llama.cpp's RoPE wants, in some of its architectures.
"""

from pathlib import Path

import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from torch import Tensor, nn
from tqdm import tqdm

from jqlib import pipeline
from jqlib.config import Config
from jqlib.export.can import ARCHITECTURES, BLOCK
from jqlib.export.gguf_tokenizer import add_tokenizer
from jqlib.export.hf import checkpoint_of
from jqlib.model.families import head_dim_of, rejoined, sites_of
from jqlib.quant.packed import packed_codes, rounded_linears, unpack
from jqlib.recipes import Recipe
from jqlib.transform.grids import spread


def write(config: Config, recipe: Recipe, tokenizer, to: Path) -> None:
    """``model.gguf``, and the tokenizer as Hugging Face has it beside it."""
    model = pipeline.quantised(config, recipe, config.w_bits, config.a_bits)
    architecture = ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(to / "model.gguf", architecture.name)
    _add_shape(writer, model)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(kind, model.config.num_hidden_layers)
    orders = _orders(model) if architecture.paired else {}
    plain = {name: t[orders.get(name.rpartition(".")[0], slice(None))] for name, t in checkpoint_of(model).items()}
    for name, tensor in rejoined(model, plain).items():
        dtype = torch.float32 if tensor.ndim == 1 else torch.float16
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.to(dtype).cpu().numpy())
    coded = {
        f"{name}.weight": q4_0(linear)[orders.get(name, slice(None))]
        for name, linear in tqdm(rounded_linears(model).items(), "writing GGUF", unit="linear")
    }
    for name, blocks in rejoined(model, coded).items():
        to_name = names.get_name(name, (".weight",))
        writer.add_tensor(to_name, blocks.numpy(), raw_dtype=GGMLQuantizationType.Q4_0)
    if (factors := _rope_factors(model)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer.save_pretrained(to)


def q4_0(linear: nn.Linear) -> Tensor:
    """A rounded weight as blocks of 32: its scale, then 16 bytes of which low halves come first: (out, bytes)."""
    grid = linear.grid
    codes = unpack(packed_codes(linear), grid.bits, linear.in_features)
    scale = spread(grid.scale, grid.groupsize, codes)[:, ::BLOCK].contiguous().view(torch.uint8).unflatten(1, (-1, 2))
    halves = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2))
    blocks = torch.cat([scale, halves[:, :, 0] | halves[:, :, 1] << 4], -1)
    return blocks.flatten(1).cpu()


def _orders(model: nn.Module) -> dict[str, Tensor]:
    """The order of output rows, of the linears whose outputs RoPE turns: all readers of qkv but the values'."""
    d, orders = head_dim_of(model), {}
    values = {place.source for place in sites_of(model, "o").values()}
    for place in sites_of(model, "qkv").values():
        for name, linear in place.linears.items():
            if linear not in values:
                orders[name] = torch.arange(linear.out_features).view(-1, 2, d // 2).mT.flatten()
    return orders


def _rope_factors(model: nn.Module) -> Tensor | None:
    """What a scaled RoPE's frequencies are divided by; None if it is not scaled."""
    rope = model.get_submodule("model.rotary_emb")
    exponents = torch.arange(0, 2 * len(rope.inv_freq), 2) / (2 * len(rope.inv_freq))
    factors = _theta(model) ** -exponents / rope.inv_freq.cpu().float()
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5) else factors


def _theta(model: nn.Module) -> float:
    return model.config.rope_parameters["rope_theta"]


def _add_shape(writer: GGUFWriter, model: nn.Module) -> None:
    shape, d = model.config, head_dim_of(model)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_rope_dimension_count(d)
    writer.add_rope_freq_base(_theta(model))
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0 if rounded_linears(model) else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(2)
