"""Artifacts: made once, also by processes together; made anew where they must be; damage is said."""

import json
import multiprocessing
import os
import resource

import pytest
import torch

from jqlib import store
from jqlib.config import get_smollm2_135m_config
from jqlib.inputs import artifact_of
from jqlib.store import Artifact


@pytest.fixture
def thing(tmp_path):
    """``thing(calls, settings, code, ...)``: an artifact that notes in ``calls`` that it is made."""

    def make_one(calls: list, settings: dict | None = None, code: str = "code", **more) -> Artifact:
        def make(*inputs):
            calls.append(inputs)
            return {"x": torch.arange(3.0)}, {"note": "made"}

        return Artifact(tmp_path, "thing", settings or {"a": 1}, code, make, **more)

    return make_one


def test_an_artifact_is_made_once_and_reuse_is_said(thing, capsys):
    calls = []
    first, again = thing(calls).get(), thing(calls).get()
    assert len(calls) == 1
    assert torch.equal(first[0]["x"], again[0]["x"])
    assert (first[1]["reused"], again[1]["reused"], again[1]["note"]) == (False, True, "made")
    assert "reusing thing" in capsys.readouterr().out


def test_what_it_depends_on_makes_it_anew(thing):
    calls = []
    for settings, code in (({"a": 1}, "code"), ({"a": 2}, "code"), ({"a": 1}, "other code"), ({"a": 1}, "code")):
        thing(calls, settings, code).get()
    assert len(calls) == 3


def test_what_its_inputs_depend_on_makes_it_anew(thing):
    """However far back."""

    def last(**first) -> Artifact:
        return thing(calls, {"a": 3}, inputs=(thing(calls, {"a": 2}, inputs=(thing(calls, **first),)),))

    calls = []
    same, again, settings, code = last(), last(), last(settings={"a": 9}), last(code="other code")
    assert same.path == again.path
    assert len({artifact.path for artifact in (same, settings, code)}) == 3
    same.get()
    settings.get()
    assert len(calls) == 6
    assert [len(inputs) for inputs in calls] == [0, 1, 1, 0, 1, 1]
    assert torch.equal(calls[2][0][0]["x"], torch.arange(3.0))


def test_an_input_is_not_read_for_what_is_there(thing, capsys):
    calls = []
    thing(calls, {"a": 2}, inputs=(thing(calls),)).get()
    capsys.readouterr()
    thing(calls, {"a": 2}, inputs=(thing(calls),)).get()
    assert capsys.readouterr().out.count("reusing") == 1


def spoiled_step(config, names) -> Artifact:
    return artifact_of(spoiled_step, config, names, lambda s: ({}, {"sum": s.seed + s.nsamples}))


def test_a_step_cannot_read_a_setting_that_its_key_does_not_name(tmp_path):
    config = get_smollm2_135m_config(output_dir=str(tmp_path))
    assert spoiled_step(config, ("seed", "nsamples")).get()[1]["sum"] == config.nsamples
    with pytest.raises(AttributeError, match="nsamples"):
        spoiled_step(config, ("seed",)).get()


def cut(content: bytes) -> bytes:
    return content[:-5]


def flip(content: bytes) -> bytes:
    """One bit of the last number."""
    return content[:-1] + bytes([content[-1] ^ 1])


def lie(content: bytes) -> bytes:
    """Other values."""
    return content.replace(b"made", b"fake")


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, lie, empty])
def test_a_damaged_file_is_said_and_made_anew(thing, capsys, damage):
    calls = []
    thing(calls).get()
    path = thing(calls).path
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    tensors, values = thing(calls).get()
    assert f"{path.name} is damaged" in capsys.readouterr().out
    assert len(calls) == 2
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert (values["note"], values["reused"]) == ("made", False)
    assert thing(calls).get()[1]["reused"]


def test_tensors_of_any_kind_are_kept_as_they_are(tmp_path):
    """Empty, without dimensions, not contiguous, of half a byte's codes or bfloat16."""
    kept = {
        "empty": torch.zeros(0, 4), "number": torch.tensor(3), "turned": torch.arange(6.0).view(2, 3).T,
        "codes": torch.arange(5, dtype=torch.uint8), "half": torch.ones(3, dtype=torch.bfloat16),
    }  # fmt: skip
    for reused in (False, True):
        found, values = Artifact(tmp_path, "thing", {}, "code", lambda: (kept, {})).get()
        assert values["reused"] == reused
        assert found.keys() == kept.keys()
        for name, tensor in kept.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_an_artifact_may_have_no_tensors(tmp_path):
    made, kept = (Artifact(tmp_path, "row", {}, "code", lambda: ({}, {"ppl": 12.5, "nll": [1.0]})).get() for _ in "ab")
    assert made[0] == kept[0] == {}
    assert (kept[1]["ppl"], kept[1]["nll"], kept[1]["reused"]) == (12.5, [1.0], True)


KEYS = 10


def make_all(folder, barrier, number: int) -> None:
    """What one of the processes does: each key at the same moment as the other."""
    found = []
    for key in range(KEYS):

        def make(key=key):
            with (folder / "made.txt").open("a") as file:
                file.write(f"{key}\n")
            return {"x": torch.full((1000,), os.getpid())}, {"by": os.getpid()}

        barrier.wait()
        found.append(Artifact(folder, "thing", {"key": key}, "code", make).get())
    torch.save(found, folder / f"{number}.pt")


def test_of_two_processes_one_makes_and_both_have_the_same(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    processes = [spawn.Process(target=make_all, args=(tmp_path, barrier, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted((tmp_path / "made.txt").read_text().split(), key=int) == [str(key) for key in range(KEYS)]
    for (x, values), (y, others) in zip(*(torch.load(tmp_path / f"{n}.pt") for n in range(2)), strict=True):
        assert torch.equal(x["x"], y["x"])
        assert values["reused"] != others["reused"]
        assert values | {"reused": None} == others | {"reused": None}
    assert len(list((tmp_path / "artifacts").glob("*.safetensors"))) == KEYS


@pytest.fixture
def training(tmp_path):
    """``training(seed)``: an artifact that keeps its state twice, and is interrupted unless it resumes."""
    states = []

    def of(seed: int):
        def make(resume, keep):
            states.append(resume and resume["step"].item())
            if resume is None:
                keep({"step": torch.tensor(3)})
                keep({"step": torch.tensor(4)})
                raise KeyboardInterrupt
            return {"x": resume["step"]}, {}

        return Artifact(tmp_path, "training", {"seed": seed}, "code", make, resumable=True)

    return of, states


def test_an_interrupted_making_resumes_where_it_was(training, tmp_path, capsys):
    of, states = training
    for seed in (0, 1):  # each by what it depends on
        with pytest.raises(KeyboardInterrupt):
            of(seed).get()
    assert states == [None, None]
    assert of(0).get()[0]["x"] == 4
    assert states == [None, None, 4]
    assert "resuming from unfinished-training" in capsys.readouterr().out
    unfinished = list((tmp_path / "artifacts").glob("unfinished*"))
    assert [path.name for path in unfinished] == [f"unfinished-{of(1).path.name}"]


def test_a_damaged_state_is_said_and_left(training, tmp_path, capsys):
    of, states = training
    with pytest.raises(KeyboardInterrupt):
        of(0).get()
    next((tmp_path / "artifacts").glob("unfinished*")).write_bytes(b"cut off")
    with pytest.raises(KeyboardInterrupt):
        of(0).get()
    assert states == [None, None]
    assert "is damaged" in capsys.readouterr().out


def test_files_are_as_open_as_their_folder(thing, tmp_path):
    for mode in (0o755, 0o775, 0o700):
        (tmp_path / "artifacts").mkdir(exist_ok=True)
        (tmp_path / "artifacts").chmod(mode)
        path = thing([], {"mode": mode}).path
        thing([], {"mode": mode}).get()
        assert path.stat().st_mode & 0o777 == mode & 0o666


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    store.write_json(path, {"a": 1})

    def fail(to):
        to.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_and_leaves_what_was_there(thing, tmp_path):
    """No file may grow beyond a kilobyte: what a full disk does, for this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = thing([]).get()[0]
    large = Artifact(tmp_path, "large", {}, "code", lambda: ({"x": torch.zeros(1000)}, {}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"large-\w+\.safetensors can't be written: .*Is the disk full\?"):
            large.get()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    there = {path.name for path in (tmp_path / "artifacts").iterdir() if path.suffix != ".lock"}
    assert there == {thing([]).path.name}
    assert torch.equal(thing([]).get()[0]["x"], kept["x"])
    assert torch.equal(large.get()[0]["x"], torch.zeros(1000))


def test_results_of_other_settings_are_not_replaced_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JOINTQUANT_OUTPUT", raising=False)
    for seed in (7, 7, 8):
        said = capsys.readouterr().out
        store.save_results(get_smollm2_135m_config(output_dir=str(tmp_path), seed=seed), "02_joint_r1", {})
    assert said == ""
    assert capsys.readouterr().out == "replaces results made with seed=7; another --output_dir keeps both\n"


def test_results_carry_where_they_came_from(tmp_path, monkeypatch):
    monkeypatch.delenv("JOINTQUANT_OUTPUT", raising=False)
    config = get_smollm2_135m_config(output_dir=str(tmp_path), seed=7)
    content = json.loads(store.save_results(config, "05_w4a4_eval", {"rows": []}).read_text())
    assert content["seed"] == 7
    assert content["config"]["profile"] == "quick"
    assert content["versions"]["torch"] == torch.__version__
    assert content["git_commit"] is None or len(content["git_commit"].removesuffix("+changes")) == 40
