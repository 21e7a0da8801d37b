"""Sweeps with real runs: notebook 05 on a tiny Llama, on this machine and on a Dask scheduler started apart."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import yaml

from jqlib.__main__ import main
from jqlib.lab.sweep import _connect, plan, read_values

GRID = ["-p", "w_bits=3,4", "-p", "seed=0,1,2", "--only", "05"]
SIX = [f"tiny,w_bits={bits},seed={seed}" for bits in (3, 4) for seed in (0, 1, 2)]
FAILS, DIES = SIX[1], SIX[3]


@pytest.fixture
def run_file(tmp_path, tiny_model, tiny_tokenizer):
    """A run file of a model that any notebook finishes in seconds."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 50)
    settings = {"model": str(tmp_path / "tiny"), "profile": "quick", "nsamples": 2, "seqlen": 64, "eval_seqlen": 64,
                "max_tokens": 64, "eval_windows": 2, "refine_steps": 1, "calib_dataset": str(text),
                "eval_dataset": str(text)}  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def state(folder):
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def break_one_and_kill_one(out, victim):
    """One run finds a file where its artifacts' folder should be; of another, ``victim(its process)`` gets a KILL."""
    (out / FAILS / "tiny").mkdir(parents=True)
    (out / FAILS / "tiny" / "artifacts").touch()

    def kill():
        while state(out / DIES).get("state") != "running":
            time.sleep(0.05)
        victim(psutil.Process(state(out / DIES)["pid"])).kill()

    threading.Thread(target=kill, daemon=True).start()


def kernel_of(process):
    while not process.children():
        time.sleep(0.05)
    return process.children()[0]


def results(out):
    files = {name: out / name / "tiny" / "results" / "05_w4a4_eval.json" for name in SIX}
    return {name: file.read_bytes() for name, file in files.items() if file.exists()}


def check_that_the_others_are_whole(out, captured, error_of_the_killed):
    ends = {FAILS: "failed", DIES: "killed"}
    assert {name: state(out / name)["state"] for name in SIX} == {name: ends.get(name, "finished") for name in SIX}
    assert "\n4 finished, 1 failed, 1 killed\n" in captured.out.replace("1 killed, 1 failed", "1 failed, 1 killed")
    for name in SIX:
        lines = [line.split()[1] for line in captured.out.splitlines() if name in line]
        assert lines == ["queued", "started", ends.get(name, "finished")]
    assert f"failed: {FAILS}: error: 05_w4a4_eval: FileExistsError: " in captured.err
    assert f"killed: {DIES}: {error_of_the_killed}\n  log: {out / DIES / 'run.log'}\n" in captured.err
    assert sorted(results(out)) == sorted(set(SIX) - ends.keys())
    for name, content in results(out).items():
        saved = json.loads(content)
        assert f"tiny,w_bits={saved['config']['w_bits']},seed={saved['config']['seed']}" == name
        assert all(row["ppl_low"] <= row["ppl"] <= row["ppl_high"] for row in saved["rows"])


def test_six_runs_one_fails_one_is_killed(run_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sweep", str(run_file), *GRID, "--output_dir", str(out)]
    break_one_and_kill_one(out, lambda process: process)
    assert main(command) == 1
    check_that_the_others_are_whole(out, capsys.readouterr(), "killed by signal 9")

    whole = results(out)
    assert main(command) == 1  # does the killed one, and names the failed one again
    captured = capsys.readouterr()
    assert captured.out.count("finished before") == 4
    assert f"skipped  {FAILS} failed before: --retry runs it" in captured.out
    assert captured.out.count(" started ") == captured.out.count(f" started  {DIES}\n") == 1
    assert f"failed: {FAILS}: error: 05_w4a4_eval: FileExistsError: " in captured.err
    assert whole.items() <= results(out).items()

    (out / FAILS / "tiny" / "artifacts").unlink()
    assert main([*command, "--retry"]) == 0
    assert capsys.readouterr().out.count(" started ") == 1
    assert whole.items() <= results(out).items()
    assert sorted(results(out)) == SIX

    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 finished"
    assert main(["report", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in SIX)
    page = (out / "report.html").read_text()
    assert all(page.count(f"<h2>{name}/tiny</h2>\n<img ") == 1 for name in SIX)


@pytest.fixture
def scheduler(tmp_path):
    """The address of a Dask scheduler that has two workers of one thread, each a process started by itself."""
    file = tmp_path / "scheduler.json"
    about = ["--no-dashboard", "--scheduler-file", str(file)]
    commands = [["dask_scheduler", "--host", "127.0.0.1", "--port", "0"]]
    commands += [["dask_worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path / "dask")]] * 2
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen([sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:], *about], env=environment,
                         stderr=subprocess.DEVNULL)
        for words in commands
    ]  # fmt: skip
    from distributed import Client

    while not file.exists():
        time.sleep(0.05)
    address = json.loads(file.read_text())["address"]
    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    yield address
    for process in processes:
        process.kill()
        process.wait()


def test_the_same_sweep_on_a_scheduler(run_file, tmp_path, capsys, scheduler):
    out = tmp_path / "out"
    break_one_and_kill_one(out, kernel_of)
    assert main(["sweep", str(run_file), *GRID, "--output_dir", str(out), "--scheduler", scheduler]) == 1
    error = "error: 05_w4a4_eval: its kernel died: it was killed, or memory ran out"
    check_that_the_others_are_whole(out, capsys.readouterr(), error)
    assert len({state(out / name)["worker"] for name in SIX}) == 2


def test_a_killed_worker_is_named_and_nothing_of_its_run_goes_on(run_file, tmp_path, capsys, scheduler):
    """As by a machine short of memory: the scheduler gives the run to the other worker."""
    folder, found = tmp_path / "out" / "tiny", []

    def kill():
        while state(folder).get("state") != "running":
            time.sleep(0.05)
        found.append(psutil.Process(state(folder)["pid"]))
        found[0].parent().kill()

    threading.Thread(target=kill, daemon=True).start()
    words = ["sweep", str(run_file), "--only", "05", "--output_dir", str(tmp_path / "out"), "--scheduler", scheduler]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert (
        f"killed: tiny: its Dask worker, {state(folder)['worker']} on {platform.node()}, was killed: did memory" in told
    )
    assert state(folder)["state"] == "killed"
    psutil.wait_procs(found, timeout=10)
    assert not found[0].is_running()


def test_ctrl_c_drops_the_queue_and_ends_what_runs(run_file, tmp_path):
    out = tmp_path / "out"
    words = ["sweep", str(run_file), "-p", "seed=0,1", "--only", "05", "--workers", "1", "--output_dir", str(out)]
    code = f"""import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from jqlib.__main__ import main
sys.exit(main({words}))"""
    sweep = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    first = out / "tiny,seed=0"
    while state(first).get("state") != "running":
        time.sleep(0.05)
    runner = psutil.Process(state(first)["pid"])
    kernel = kernel_of(runner)
    sweep.send_signal(signal.SIGINT)
    text, _ = sweep.communicate()
    assert sweep.returncode == 130
    assert text.endswith("stopping: the queue is dropped, running ones are ended\n2 not done\n")
    assert state(first)["state"] == "killed"
    assert not (out / "tiny,seed=1").exists()
    assert not runner.is_running()
    psutil.wait_procs([kernel])


def test_a_run_at_work_is_not_started_twice(run_file, tmp_path, capsys):
    """The sweep was killed, its run was not: here this very process stands in for the run."""
    parameters = plan({run_file: yaml.safe_load(run_file.read_text())}, [], tmp_path / "out")["tiny"]
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    me = psutil.Process()
    at_work = {"parameters": parameters, "only": "05", "state": "running", "host": platform.node(), "pid": me.pid,
               "born": me.create_time()}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(at_work))
    assert main(["sweep", str(run_file), "--only", "05", "--output_dir", str(tmp_path / "out")]) == 1
    assert f"busy: tiny: process {me.pid} of another sweep is at it" in capsys.readouterr().err
    assert state(folder) == at_work


def test_two_sweeps_at_once_take_other_ports():
    """Dask's own is always the same, and it warns where somebody has it."""
    with _connect(None, 1) as one, _connect(None, 1) as other:
        assert [client.submit(int, 1).result() for client in (one, other)] == [1, 1]


def test_values_are_read_as_their_parameter_is():
    assert read_values(["seed=0,2", "use_smooth=True,false", "eval_windows=0,3", "r1_lr=1e-3", "model=a/b"]) == {
        "model": ["a/b"], "eval_windows": [0, 3], "r1_lr": [0.001], "use_smooth": [True, False], "seed": [0, 2],
    }  # fmt: skip


BAD = [
    (["-p", "seed"], "-p seed: expected name=value or name=value,value"),
    (["-p", "seed=0,"], "-p seed=: expected int"),
    (["-p", "seeds=0"], "-p seeds=0: unknown parameter 'seeds'; there are model, "),
    (["-p", "output_dir=x"], "-p output_dir=x: unknown parameter 'output_dir'; there are model, "),
    (["-p", "w_bits=4,four"], "-p w_bits=four: expected int"),
    (["-p", "use_smooth=maybe"], "-p use_smooth=maybe: expected bool"),
    (["-p", "seed=0", "-p", "seed=1"], "-p seed=1: seed was given before; list all its values once: seed=value,value"),
    (["-p", "seed=0,0"], "-p seed=0,0: a value is listed twice"),
    (["-p", "w_bits=4,1"], "tiny,w_bits=1: w_bits=1: bits are whole numbers from 2 to 16, and 16 means not quantised"),
    (["-p", "solver=mm,newton"], "tiny,solver=newton: solver='newton' is unknown; there are mm, "),
    (["-p", "eval_windows=2,999"], "tiny,eval_windows=999: the test text of "),
    (["-p", "model=./nowhere"], "tiny,model=nowhere: model path ./nowhere does not exist"),
    (["--only", "07"], "--only 07: there is no notebook 07; there are 01 to 06"),
    (["nope.yaml"], "run file nope.yaml does not exist"),
    (["tiny.yaml"], "two runs would be called tiny: rename a run file or a value"),
    (["own.yaml"], "own.yaml sets output_dir, but a sweep gives each run a folder: use --output_dir"),
    (["odd.yaml"], "odd: unknown parameter 'sed'; there are model, "),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_refused_before_anything_runs(words, message, run_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("output_dir: here\n")
    (tmp_path / "odd.yaml").write_text("sed: 1\n")
    assert main(["sweep", str(run_file), *words, "--output_dir", "out"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "argument --workers: expected a number of runs, 1 or more, got '0'"),
        (["--workers", "1", "--scheduler", "tcp://a:1"], "argument --scheduler: not allowed with argument --workers"),
    ],
)
def test_refused_words(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "a.yaml", *words])
    assert message in capsys.readouterr().err


def test_a_scheduler_that_is_none_is_named(run_file, tmp_path, capsys):
    """And the device is its workers' affair."""
    words = ["-p", "device=cuda:99", "--scheduler", "here:1:2", "--output_dir", str(tmp_path / "out")]
    assert main(["sweep", str(run_file), *words]) == 2
    assert capsys.readouterr().err.startswith("error: --scheduler here:1:2: ")
    assert not (tmp_path / "out").exists()


def test_without_dask_the_error_says_what_to_install(run_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["sweep", str(run_file)]) == 2
    assert "pip install -c constraints.txt -e '.[sweep]'" in capsys.readouterr().err
