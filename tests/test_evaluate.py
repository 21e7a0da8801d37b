import copy
import json
import math

import pytest
import torch

from jqlib.model.data import Windows
from jqlib.model.evaluate import Perplexity, Reference, evaluate_perplexity, evaluate_windows, last_hidden, read_window

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
    first = evaluate_perplexity(model, tiny_tokenizer, dataset=text_file, seqlen=100, max_windows=2, windows="first")
    assert first.nll == ppl.nll[:2]
    spread = evaluate_perplexity(model, tiny_tokenizer, dataset=text_file, seqlen=100, max_windows=2)
    assert spread.nll == [ppl.nll[3], ppl.nll[9]]  # of 12


def test_with_bos_it_equals_a_loop_that_puts_one_first(tiny_model, tiny_tokenizer, text_file):
    tokenizer, model = copy.deepcopy(tiny_tokenizer), tiny_model()
    tokenizer.bos_token = "$"
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = torch.nn.functional.pad(ids[: len(ids) // 100 * 100].view(-1, 1, 100), (1, 0), value=ord("$"))
    losses = [model(window, labels=window).loss.item() for window in windows]
    found = evaluate_perplexity(model, tokenizer, dataset=text_file, seqlen=100, bos=True)
    assert found.nll == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("seqlen", [2, 256, 257, 258, 600])
def test_windows_longer_than_a_block_of_rows(tiny_model, tokens, seqlen):
    model, window = tiny_model(), tokens(1, seqlen)
    with torch.no_grad():
        expected = model(window, labels=window).loss.item()
    nll, kl, top1 = read_window(model, window[0])
    assert nll == pytest.approx(expected, rel=1e-5)
    assert math.isnan(kl)
    assert math.isnan(top1)


@pytest.mark.parametrize("seqlen", [2, 257, 600])
def test_fidelity_is_the_textbooks(tiny_model, tokens, seqlen):
    fp, other, ids = tiny_model(), tiny_model(seed=1), tokens(2, seqlen)
    reference = Reference(last_hidden(fp, ids), fp.get_output_embeddings().weight)
    found = evaluate_windows(other, Windows(ids, [0, 1]), reference=reference)
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (fp, other))
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean(-1).tolist(), rel=1e-5)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean(-1).tolist())
    assert found.nll == evaluate_windows(other, Windows(ids, [0, 1])).nll


def test_fp_is_faithful_to_itself(tiny_model, tokens):
    fp, ids = tiny_model(), tokens(2, 50)
    reference = Reference(last_hidden(fp, ids), fp.get_output_embeddings().weight)
    row = evaluate_windows(fp, Windows(ids, [0, 1]), reference=reference).row()
    assert row["kl"] == pytest.approx(0, abs=1e-7)
    assert (row["top1"], row["top1_low"], row["top1_high"]) == (1, 1, 1)


@pytest.mark.parametrize("nll", [[1.7] * 5, [1.0, 2.0, 3.0], [0.1 * i for i in range(30)]])
def test_interval_contains_the_value(nll):
    ppl = Perplexity(nll)
    if len(set(nll)) == 1:
        assert (ppl.low, ppl.high) == pytest.approx((ppl, ppl))
    else:
        assert ppl.low < ppl < ppl.high


def test_windows_of_one_article_count_as_one():
    nll = [1.0, 1.1, 2.0, 2.1, 3.0, 3.1]
    assert Perplexity(nll, [0, 0, 1, 1, 2, 2]).high > Perplexity(nll).high


@pytest.mark.parametrize("ppl", [Perplexity([2.0]), Perplexity([2.0, 2.0], [5, 5])])
def test_one_article_gives_no_interval_and_says_so(ppl):
    assert math.isnan(ppl.low)
    assert math.isnan(ppl.high)
    assert repr(ppl) == "7.39 [no interval from one article]"
    ppl.kl, ppl.top1 = ppl.nll, ppl.nll
    assert json.loads(json.dumps(ppl.row(), allow_nan=False))["ppl_low"] is None


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
    assert again.articles == [0, 1]


def test_a_model_beyond_repair_is_infinite():
    """exp(nll) overflows beyond 709 nats: a row of a table, not a crash."""
    assert Perplexity([800.0, 900.0]) == math.inf


@pytest.mark.parametrize(("arguments", "message"), [
    ({"seqlen": 1}, "at least 1 window and 2 tokens"),
    ({"seqlen": 10_000}, "1,260 tokens: 0 windows of 10000, but 1 were asked for"),
    ({"seqlen": 100, "max_windows": 13}, "12 windows of 100, but 13"),
    ({"seqlen": 100, "max_windows": 0}, "at least 1 window"),
    ({"seqlen": 100, "max_windows": -1}, "at least 1 window"),
    ({"seqlen": 100, "windows": "last"}, "windows='last' is unknown; there are spread, first"),
])  # fmt: skip
def test_bad_windows(tiny_model, tiny_tokenizer, text_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(tiny_model(), tiny_tokenizer, dataset=text_file, **arguments)
