import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jqlib.model.embedded import corpus_articles

SCRIPT = Path(__file__).with_name("llama_1b_shape.py")


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """Random bfloat16 weights in Llama-3.2-1B's shape, but two layers: 0.8 GB on disk."""
    folder = tmp_path / "llama-3.2-1b"
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.02, generator=generator)
    model.tie_weights()
    model.save_pretrained(folder)
    del model
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(corpus_articles("test")[0][:20_000], encoding="utf-8")
    yield folder, tmp_path / "text.txt"
    shutil.rmtree(folder)


def test_runs_in_eight_gigabytes(checkpoint):
    run = subprocess.run([sys.executable, SCRIPT, *map(str, checkpoint)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout)
    before, rotated, quantized = result["nll"]
    assert rotated == pytest.approx(before, rel=1e-4)
    assert math.isfinite(quantized)
    assert quantized != rotated
    assert result["R1"] == [2048, 2048]
    assert result["R2"] == [[8, 64, 64]] * 2
    assert result["orthogonality"] <= 1e-5
    assert result["peak_bytes"] < 8e9
    assert result["peak_bytes"] <= 8 * 2**30
    print(f"peak memory {result['peak_bytes'] / 2**30:.2f} GiB")
