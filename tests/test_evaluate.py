import copy
import json
import math

import pytest
import torch

from jqlib.evaluate import Perplexity, evaluate_perplexity, paired_interval, window_nll

TEXT = "The quick brown fox jumps over the lazy dog; 1234567890 times. " * 20


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equals_a_plain_hugging_face_loop(tiny_model, tiny_tokenizer, text_file, dtype, tolerance):
    model = tiny_model(dtype=dtype)
    ids = tiny_tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 100 * 100].view(-1, 1, 100)
    with torch.no_grad():
        losses = [model(window, labels=window).loss.item() for window in windows]
    ppl = evaluate_perplexity(model, tiny_tokenizer, "cpu", dataset=text_file, seqlen=100)
    assert ppl.nll == pytest.approx(losses, rel=tolerance)
    assert ppl == pytest.approx(math.exp(sum(losses) / len(losses)), rel=tolerance)
    first = evaluate_perplexity(model, tiny_tokenizer, dataset=text_file, seqlen=100, max_windows=2)
    assert first.nll == ppl.nll[:2]


@pytest.mark.parametrize("seqlen", [2, 256, 257, 258, 600])
def test_windows_longer_than_a_block_of_rows(tiny_model, tokens, seqlen):
    model, window = tiny_model(), tokens(1, seqlen)
    with torch.no_grad():
        expected = model(window, labels=window).loss.item()
    assert window_nll(model, window[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("nll", [[2.0], [3.1], [1.7] * 5, [1.0, 2.0, 3.0], [0.1 * i for i in range(30)]])
def test_interval_contains_the_value(nll):
    ppl = Perplexity(nll)
    assert ppl.low <= ppl <= ppl.high
    if len(set(nll)) == 1:
        assert ppl.low == pytest.approx(ppl)
        assert ppl.high == pytest.approx(ppl)
    else:
        assert ppl.low < ppl < ppl.high


def test_interval_has_the_width_of_the_normal_one():
    nll = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    ppl = Perplexity(nll.tolist())
    half = 1.96 * nll.std().item() / 20
    assert math.log(ppl.high) == pytest.approx(nll.mean().item() + half, abs=0.1 * half)
    assert math.log(ppl.low) == pytest.approx(nll.mean().item() - half, abs=0.1 * half)


def test_paired_interval():
    a = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    b = [x - 0.1 + 0.01 * math.sin(i) for i, x in enumerate(a)]
    value, low, high = paired_interval(a, b)
    assert value == pytest.approx(math.log(Perplexity(a) / Perplexity(b)), rel=1e-4)
    assert 0.09 < low < value < high < 0.11  # though a and b themselves spread over a whole nat
    assert paired_interval(b, a) == pytest.approx((-value, -high, -low), abs=1e-4)
    assert paired_interval(a, a) == (0, 0, 0)


def test_paired_interval_of_different_windows():
    with pytest.raises(ValueError, match="same windows"):
        paired_interval([1.0, 2.0], [1.0])


def test_behaves_as_a_float():
    ppl = Perplexity([1.0, 3.0])
    assert isinstance(ppl, float)
    assert ppl == pytest.approx(math.exp(2))
    assert f"{ppl:.2f}" == "7.39"
    assert json.loads(json.dumps(ppl)) == float(ppl)
    assert repr(ppl) == f"7.39 [{ppl.low:.2f}, {ppl.high:.2f}]"
    assert sorted([ppl, 1.0, 9.0]) == [1.0, ppl, 9.0]
    assert round(ppl / 2, 2) == 3.69
    assert math.isnan(Perplexity([math.nan, 1.0]))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_can_be_copied(duplicate):
    ppl = Perplexity([1.0, 3.0])
    again = duplicate(ppl)
    assert (again, again.nll, again.low, again.high) == (ppl, ppl.nll, ppl.low, ppl.high)


def test_a_model_beyond_repair_is_infinite():
    """exp(nll) overflows beyond 709 nats: a row of a table, not a crash."""
    assert Perplexity([800.0, 900.0]) == math.inf


@pytest.mark.parametrize(("arguments", "message"), [
    ({"seqlen": 1}, "at least 1 window and 2 tokens"),
    ({"seqlen": 10_000}, "1,260 tokens: 0 windows of 10000, but 1 were asked for"),
    ({"seqlen": 100, "max_windows": 13}, "12 windows of 100, but 13"),
    ({"seqlen": 100, "max_windows": 0}, "at least 1 window"),
    ({"seqlen": 100, "max_windows": -1}, "at least 1 window"),
])  # fmt: skip
def test_bad_windows(tiny_model, tiny_tokenizer, text_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(tiny_model(), tiny_tokenizer, dataset=text_file, **arguments)
