"""A run beside what is published: within, outside, or not comparable."""

from jqlib.config import PRESETS, make_config
from jqlib.lab.published import PUBLISHED, beside

MODEL = "meta-llama/Llama-3.2-1B"
PROTOCOL = {"dataset": "wikitext2", "split": "test", "seqlen": 2048, "drawn": "the whole text"}


def row(ppl: float, bits: int = 4, method: str = "jointquant-best") -> dict:
    return {"ppl": ppl, "w_bits": bits, "a_bits": bits, "method": method, "label": method}


def test_every_published_model_has_a_preset():
    assert PUBLISHED.keys() <= PRESETS.keys()


def test_it_says_what_is_within_and_what_is_outside():
    rows = [row(9.76, 16, "fp"), row(1e4, method="rtn"), row(11.5), row(12.5, method="quarot-best")]
    found = beside(make_config({"model": MODEL}), PROTOCOL, rows)
    assert found[0] == "FP 9.76, published 9.75 (no BOS): as published"
    assert found[1].startswith("jointquant-best: 11.50, below the 11.97 to 11.98 of FlatQuant")
    assert "above" in found[2]
    assert len(found) == 3


def test_a_wrong_fp_is_said_loudly():
    found = beside(make_config({"model": MODEL, "bos": True}), PROTOCOL, [row(9.75, 16, "fp")])
    assert found == ["FP 9.75, published 8.94 (with BOS): 9.1% OFF: another model, tokenizer or protocol?"]


def test_other_protocols_are_not_compared():
    found = beside(make_config({"model": MODEL}), PROTOCOL | {"seqlen": 512}, [row(9.75, 16, "fp")])
    assert found == ["published figures are of another protocol than this run's (dataset wikitext2, split test, seqlen "
                     "2048, drawn the whole text): not comparable"]  # fmt: skip
    assert beside(make_config({"model": "smollm2-135m"}), PROTOCOL, []) == []
