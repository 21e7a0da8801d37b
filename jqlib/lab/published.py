"""What others publish for models that we have presets for, to hold a run against: on WikiText-2's whole test text."""

from collections.abc import Sequence
from typing import NamedTuple

from jqlib.config import Config
from jqlib.lab.compare import Row
from jqlib.transform.grids import OFF

NEAR = 0.02  # of FP's perplexity: further off is another protocol, another model, or a fault


class Published(NamedTuple):
    """Perplexities at windows of 2048 tokens: FP's, and the span of those at W4A4 that rotate (RTN and GPTQ)."""

    bos: bool
    fp: float
    w4a4: tuple[float, float]
    sources: str


PUBLISHED = {
    "meta-llama/Llama-3.2-1B": [
        Published(False, 9.75, (11.97, 11.98), "FlatQuant, KV4"),
        Published(True, 8.94, (11.52, 18.00), "Brevitas: SpinQuant with Qronos, QuaRot with RTN; W4 per channel"),
    ],
    "meta-llama/Llama-3.2-3B": [Published(False, 7.81, (9.06, 9.99), "ReSpinQuant, SpinQuant, FlatQuant, QuaRot")],
    "meta-llama/Meta-Llama-3-8B": [
        Published(False, 6.14, (6.90, 10.60), "FlatQuant and InfoQuant to QuaRot with RTN, KV4 and KV16")
    ],
}


def beside(config: Config, protocol: dict, rows: Sequence[Row]) -> list[str]:
    """In words: FP's perplexity and the W4A4 rows beside what is published, and whether they are outside of it.

    Empty for a model of which nothing is known here.
    """
    known = PUBLISHED.get(config.model, [])
    asked = {"dataset": "wikitext2", "split": "test", "seqlen": 2048, "drawn": "the whole text"}
    if known and any(protocol[name] != value for name, value in asked.items()):
        wanted = ", ".join(f"{name} {value}" for name, value in asked.items())
        return [f"published figures are of another protocol than this run's ({wanted}): not comparable"]
    lines = []
    for about in (p for p in known if p.bos == config.bos):
        fp = next(row for row in rows if row["w_bits"] == row["a_bits"] == OFF)["ppl"]
        off = abs(fp / about.fp - 1)
        verdict = "as published" if off <= NEAR else f"{off:.1%} OFF: another model, tokenizer or protocol?"
        lines.append(f"FP {fp:.2f}, published {about.fp} ({'with' if about.bos else 'no'} BOS): {verdict}")
        low, high = about.w4a4
        for row in rows:
            if (row["w_bits"], row["a_bits"]) == (4, 4) and row["method"] != "rtn":
                where = "below" if row["ppl"] < low else "above" if row["ppl"] > high else "within"
                lines.append(f"{row['label']}: {row['ppl']:.2f}, {where} the {low} to {high} of {about.sources}")
    return lines
