"""Tiny Llamas by seed, the embedded model once a session."""

import copy
import os
import sys

os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jqlib import get_model, get_tokenizer

VOCABULARY = 128


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def tiny_model():
    """``tiny_model(seed=0, biases=False, layers=2, dtype=torch.float32)``: a Llama with GQA and random gammas."""
    return make_tiny_model


def make_tiny_model(seed: int = 0, biases: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32):
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_bias=biases,
        mlp_bias=biases,
        bos_token_id=None,
        eos_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise * 0.3).exp() if "norm" in name else noise * (0.5 if "bias" in name else 0.2)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def tokens():
    """``tokens(windows, seqlen, seed)``: random token windows of the tiny model."""

    def draw(windows: int = 2, seqlen: int = 24, seed: int = 0) -> torch.Tensor:
        return torch.randint(VOCABULARY, (windows, seqlen), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token a character, ids below the tiny model's vocabulary."""
    return make_tiny_tokenizer()


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(VOCABULARY)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Bytes of printable text and one merge, as a byte-level BPE; ids below the tiny model's vocabulary."""
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ", "th", "<|end|>"]
    bpe = models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[("t", "h")])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="session")
def embedded_model():
    return get_model("smollm2-135m")


@pytest.fixture
def smollm(embedded_model):
    """A copy of the embedded model: rotating and quantising act in place."""
    return copy.deepcopy(embedded_model)


@pytest.fixture(scope="session")
def tokenizer():
    return get_tokenizer("smollm2-135m")


@pytest.fixture
def double_norms(monkeypatch):
    """transformers computes an RMSNorm in float32 whatever the model's dtype: here in the input's, to see 1e-9."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", forward)


@pytest.fixture
def orthogonal():
    """``orthogonal(n, seed, dtype, batch)``: a random rotation, made apart from jqlib's."""

    def draw(n: int, seed: int = 0, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))[0].to(dtype)

    return draw
