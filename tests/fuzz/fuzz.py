"""By `make fuzz`: run files, flags, GGUF headers and results files as nobody should write them.

Each is read rightly or refused as `python -m jqlib` refuses: an error of a kind that ends in one sentence, never a
traceback, and what is accepted is what is written. EXAMPLES of each kind, the same ones each time.
"""

import json
import math
import os
import re
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loading import gguf  # noqa: F401  a fixture

from jqlib.__main__ import main
from jqlib.config import CHOICES, KINDS, Config, make_config
from jqlib.lab import repeat
from jqlib.lab.report import report
from jqlib.lab.run import read_run_file
from jqlib.model.load import get_model, get_tokenizer, load_config
from jqlib.store import save_results, write

EXAMPLES = int(os.environ.get("EXAMPLES", "300"))
SAID = (ValueError, OSError, ModuleNotFoundError, ArithmeticError)  # those that `main` says in one sentence
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
tried = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=HEALTH, derandomize=True)
outcomes, numbers = Counter(), count()


@pytest.fixture(autouse=True, scope="module")
def counts(request):
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("".join(f"\n{kind}: {n} {outcome}" for (kind, outcome), n in sorted(outcomes.items())))


def outcome_of(kind: str, action):
    """What it gives, None if it refuses; any other error is one that a user would see as a traceback."""
    try:
        found = action()
    except SAID as error:
        said = str(error)
        outcomes[kind, "refused"] += 1
        assert said.strip()
        return None
    outcomes[kind, "accepted"] += 1
    return found


ODD = ["", "null", "~", "0x1F", "010", "0b11", "1:30", "1_000", "1_0.5", "1:30.5", "1.e+3", ".inf", "-.inf", ".nan",
       "2001-99-99", "2001-12-14", "!!int 4", "!!str 4", "!x 4", "!!python/name:os.system", "&a 4", "*a", "[4]",
       "{a: 4}", "'4'", '"4"', "|", ">", "4 # bits", "9" * 5000, "[" * 3000]  # fmt: skip
FITTING = {int: ["4", "2", "64", "+4", "4.0", "4e0", "1_0"], float: ["0.5", ".5", "5e-1", "1", "0:0.5", "0_0.5"],
           bool: ["true", "False", "yes", "off", "1", "y"],
           str: ["smollm2-135m", "a b", "no", "1.5", "null"]}  # fmt: skip
scalars = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=12), st.sampled_from(ODD))


@st.composite
def settings_(draw):
    """A parameter and the text of a value for it, more often than not one that could be meant."""
    name = draw(st.sampled_from(sorted(KINDS)))
    fitting = st.sampled_from(list(CHOICES.get(name, FITTING[KINDS[name]])))
    return name, draw(st.one_of(fitting, fitting, fitting, scalars))


meant = st.lists(settings_().map(": ".join), min_size=1, max_size=2).map("\n".join)
odd = st.tuples(st.text(max_size=12), st.sampled_from([":", " : ", "? ", ":\t"]), scalars).map("".join)
run_files = st.one_of(meant, meant, meant, meant, odd, st.text(), st.text(alphabet="-:?[]{}#&*!|>'\"%@` \n\tab1"))


@tried
@given(text=run_files, mark=st.sampled_from(["", "\ufeff"]))
def test_run_files(tmp_path, text, mark):
    path = tmp_path / "run.yaml"
    path.write_bytes((mark + text).encode("utf-8", "surrogatepass"))
    if (config := outcome_of("run files", lambda: make_config(read_run_file(path)))) is None:
        return
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for name, node in ((name.value, node) for name, node in root.value):
        value = getattr(config, name)
        if not node.tag.endswith(":null"):  # "not given"
            assert written(node.value, KINDS[name]) == value, f"{name}: {node.value} was read as {value!r}"


def written(text: str, kind: type):
    """What a person reads in a plain value; None where persons would differ."""
    if kind is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(text.lower())
    if kind is int:
        return int(text) if re.fullmatch(r"-?(0|[1-9]\d*)", text) else None
    if kind is float:
        return float(text) if re.fullmatch(r"[-+.\deE]+", text) else None
    return text


@tried
@given(given_flags=st.lists(settings_(), max_size=3))
def test_flags(capsys, monkeypatch, given_flags):
    """As far as a Config: what a run then does with it is its own tests' affair."""
    seen = []
    monkeypatch.setattr("jqlib.__main__.run", lambda parameters, only: seen.append(make_config(parameters)) or 0)
    words = [word for name, text in given_flags for word in (f"--{name}", text)]
    try:
        code = main(["run", *words])
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr().err
    outcomes["flags", "refused" if code else "accepted"] += 1
    assert code in (0, 2)
    if code:
        assert "error: " in told
    for name, text in dict(given_flags).items() if not code else ():
        value, kind = getattr(seen[0], name), KINDS[name]
        assert value == (text.lower() == "true" if kind is bool else kind(text))
        assert value is not None
        assert kind is not float or math.isfinite(value)


NUMBERS = b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x7f"  # such as a count or a length, made huge or nothing
spoils = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 7)), st.tuples(st.just("put"), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("take"), st.integers(1, 16)), st.tuples(st.just("number"), st.sampled_from(NUMBERS)),
    st.tuples(st.just("cut"), st.none()),
)  # fmt: skip


def spoiled_bytes(data: bytes, at: int, how: str, what) -> bytes:
    """Bytes flipped, put in, taken out or written over, or all gone after a place."""
    at = at % len(data)
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (1 << what)]) + data[at + 1 :]
    if how == "put":
        return data[:at] + what + data[at:]
    if how == "take":
        return data[:at] + data[at + what :]
    return data[:at] + (what + data[at + len(what) :] if how == "number" else b"")


@tried
@given(at=st.integers(0, 2**16), spoil=spoils, load=st.sampled_from([load_config, get_tokenizer, get_model]))
def test_gguf_headers(whole_gguf, tmp_path, at, spoil, load):
    whole, header = whole_gguf
    content = whole.read_bytes()
    path = tmp_path / f"{next(numbers)}.gguf"  # what was read of a file is kept by its path and time
    path.write_bytes(spoiled_bytes(content[:header], at, *spoil) + content[header:])
    outcome_of(f"GGUF headers, {load.__name__}", lambda: load(str(path)))
    path.unlink()


@pytest.fixture
def whole_gguf(gguf):  # noqa: F811
    """A small file, and how long all is that stands before its weights."""
    from gguf import GGUFReader

    path = Path(gguf({"llama.rope.freq_base": 5e5}))
    return path, GGUFReader(path).data_offset


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)  # fmt: skip
ROW = {"method": "rtn", "weights": "rtn", "w_bits": 4, "ppl": 9.5, "ppl_low": 9.0, "ppl_high": None, "kl": 0.25,
       "nll": [1.0, 2.0], "articles": [0, 1], "seconds": 3}  # fmt: skip


def spoiled(result, draw):
    """A result with one place, at any depth, changed to anything or gone."""
    if isinstance(result, dict | list) and result and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(result) if isinstance(result, dict) else range(len(result))))
        if draw(st.integers(0, 5)):
            result[key] = spoiled(result[key], draw)
        else:
            del result[key]
        return result
    return draw(values)


@pytest.fixture
def saved(tmp_path):
    """A results file, and what is in it."""
    config = make_config({"model": "smollm2-135m", "profile": "quick", "output_dir": str(tmp_path)})
    path = save_results(config, "05_w4a4_eval", {"rows": [dict(ROW), dict(ROW)]})
    return path, path.read_text()


@pytest.mark.parametrize("reader", ["repeat", "report"])
@tried
@given(data=st.data(), raw=st.booleans(), at=st.integers(0, 2**16), spoil=spoils)
def test_results_files(saved, tmp_path, monkeypatch, reader, data, raw, at, spoil):
    path, text = saved
    again = json.loads(text)
    if not raw and data.draw(st.booleans()):
        del again["sha256"]  # as results were before they had one
    path.write_bytes(
        spoiled_bytes(text.encode(), at, *spoil) if raw else json.dumps(spoiled(again, data.draw)).encode()
    )

    def run(parameters, only):
        """In place of half a minute's work: the result as it was."""
        assert only == "05"
        write(make_config(parameters).folder / "results" / path.name, lambda to: to.write_text(text))
        return 0

    monkeypatch.setattr(repeat, "run", run)
    if reader == "repeat":
        found = outcome_of("results, repeat", lambda: repeat.repeat(path))
        assert found is None or isinstance(found[0], bool)
    else:
        found = outcome_of("results, report", lambda: report(tmp_path))
    if raw and found is not None:  # a change that decides nothing, such as a space for a space
        assert json.loads(path.read_text()) | {"sha256": None} == json.loads(text) | {"sha256": None}


def test_all_choices_are_words():
    """The strategies above count on it."""
    assert {type(value) for values in CHOICES.values() for value in values} == {str}
    assert Config.model
