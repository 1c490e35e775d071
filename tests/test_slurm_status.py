"""Watching, cancelling and retrying a grid: from synthetic run folders, with a squeue that says what it is told."""

import fcntl
import io
import json
import os
import pty
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
import types
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import ledger as benchmark
from runfolder.errors import UserError
from runfolder.folder import RunFolder
from runfolder.process import this_process
from runfolder.states import State
from runfolder.tickets import issue
from slurm import ledger, overview, status, tail
from tests.holding import held_elsewhere

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm" / "status.py"
PROGRESS = {
    "step": 25,
    "steps": 100,
    "epoch": 2.5,
    "epochs": 10.0,
    "primary_metric": "test/top1",
    "value": 61.25,
    "images_per_second": 812.4,
    "seconds_left": 3700,
    "host": "node03",
}
RESULT = {
    "primary_metric": "test/top1",
    "metrics": {"test/top1": 93.5},
    "steps": 100,
    "epochs": 10,
    "seconds": 200.0,
    "attempts": 3,
}
OOM = {
    "kind": "out-of-memory",
    "reason": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB",
    "host": "node03",
    "when": "2025-01-02 03:04:05",
    "traceback": ["Traceback (most recent call last):", '  File "a.py"', "    b()", "OutOfMemoryError: CUDA"],
}


# -- folders and a queue ----------------------------------------------------------------


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def make(runs, name, state="missing", progress=None, claim=None, failure=None, result=None, experiment="demo"):
    """A run folder in a state that needs neither a process nor a queue."""
    folder = runs / experiment / name
    write(folder / "config.yaml", f"experiment: {experiment}\n")
    if state == "running":  # by a process on a machine that cannot be seen from here
        said = {"host": "elsewhere", "pid": 7, "beats_every": 1e6, "since": "2025-01-01 00:00:00"}
        issue(folder / "lease", 1, said)
    if state == "queued":
        claim = claim or this_process() | {"submission": "sub", "made": time.time()}
    if state in ("resumable", "failed", "running", "cancelled"):
        progress = PROGRESS if progress is None else progress
        write(folder / "checkpoints" / "step-00000020-abc.pt", "")
    if state == "finished":
        write(folder / "result.json", RESULT if result is None else result)
    if state == "failed":
        write(folder / "failure.json", failure or OOM)
    if state == "cancelled":
        write(folder / "cancelled", {"by": "me", "at": "2025-01-01 00:00:00"})
    if progress is not None:
        write(folder / "progress.json", progress)
    if claim is not None:
        issue(folder / "claims", 1, claim)
    return folder


def submitted(index, job_name="sub.0", **more):
    said = {"submission": "sub", "made": 0.0, "submitted": True, "scheduler": "slurm", "job": f"77_{index}"}
    return said | {"job_name": job_name, "index": index} | more


class Slurm:
    """A squeue and a scancel that note how they are called."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.tell([])
        self._command("squeue", 'cat "${0%/*}/queue"')
        self._command("scancel", 'exit "$(cat "${0%/*}/scancel.code" 2>/dev/null || echo 0)"')

    def _command(self, name, line):
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "$*" >> "${{0%/*}}/{name}.calls"\n{line}\n')
        path.chmod(0o755)

    def tell(self, tasks, used="0:05"):
        """Each task: job, state, reason, nodes, name."""
        rows = ["\x1f".join((*task[:4], "0", used, task[4], "\x1e\n")) for task in tasks]
        (self.folder / "queue").write_text("".join(rows))

    def calls(self, name):
        path = self.folder / f"{name}.calls"
        return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    commands = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{commands.folder}:{os.environ['PATH']}")
    return commands


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def ctrl_c(*_):
    """A signal would be ignored where the tests run in the background."""
    raise KeyboardInterrupt


class Clock:
    """Time for ``status.py`` that passes only while it sleeps."""

    def __init__(self, monkeypatch, during=lambda clock: None):
        self.now, self.naps, self.during = 0.0, [], during
        monkeypatch.setattr(status, "time", self)

    def sleep(self, seconds):
        self.now += seconds
        self.naps.append(seconds)
        self.during(self)

    def monotonic(self):
        return self.now

    strftime = staticmethod(time.strftime)


@pytest.fixture
def call(capsys):
    def call(*arguments):
        code = status.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def rows(text):
    """{name: words of its row} of all tables."""
    tables = [block.splitlines()[1:] for block in text.split("\n\n") if re.match("run +state", block)]
    lines = [line.split() for table in tables for line in table]
    return {words[0]: words[1:] for words in lines if words[1] in list(State)}


def claims_of(folder):
    return sorted(path.name for path in (folder / "claims").glob("*"))


# -- list -------------------------------------------------------------------------------


def test_every_state_is_seen_in_text_and_json_alike(runs, slurm, call):
    """Also of a process of this machine and of a job in the queue; the counts are those of what was made."""
    slurm.tell([("77_4", "PENDING", "Priority", "", "sub.0"), ("77_5", "RUNNING", "None", "node07", "sub.0")])
    made = {f"{state}-{k}": state for state in State for k in range(2)}
    for name, state in made.items():
        make(runs, name, state)
    made |= {"in-slurm": "queued", "starting": "queued", "no-job": "missing", "given-back": "missing"}
    make(runs, "in-slurm", claim=submitted(4))
    make(runs, "starting", claim=submitted(5))
    make(runs, "no-job", claim=submitted(6))
    make(runs, "given-back", claim=submitted(4, released="cancelled"))
    held = make(runs, "held-here")
    made["held-here"] = "running"
    with held_elsewhere(held):
        code, text, _ = call()
        json_code, said, _ = call("--json")
    assert code == json_code == 75
    said = json.loads(said)
    assert {run["run"]: run["state"] for run in said["runs"]} == made
    assert {name: words[0] for name, words in rows(text).items()} == made
    counts = Counter(made.values())
    assert said["counts"] == said["experiments"]["demo"]["counts"] == dict(counts)
    head = text.splitlines()[0]
    assert head == f"demo: {len(made)} runs: " + ", ".join(f"{counts[state]} {state}" for state in State)
    assert len(slurm.calls("squeue")) == 2, "one for each list"
    assert "(Priority)" in rows(text)["in-slurm"]
    assert rows(text)["starting"][-3:] == ["77_5", "node07", "(starting)"]
    assert rows(text)["queued-0"][-2:] == ["(being", "submitted)"]


def test_a_job_without_a_word_is_starting_for_ten_minutes_and_then_hangs(runs, slurm, call):
    """The job's time counts as well: a log may be from before it was requeued."""
    folder = make(runs, "run", claim=submitted(5))
    log = runs / "demo" / "slurm" / "sub" / "jobs" / "77_5_0_log.out"
    write(log, "")
    write(folder / "output.txt", "")
    hanging = f"hanging? no sign of life for 25 min, see {log.relative_to(runs.parent)}"
    ages = {"never": 10**9, "old": 25 * 60, "new": 60}
    for used, printed, out, reason in [
        ("0:05", "old", "never", "starting"),
        ("3:25:00", "new", "never", "starting"),
        ("3:25:00", "never", "new", "starting"),
        ("3:25:00", "old", "never", hanging),
        ("3:25:00", "never", "old", hanging),
        ("25:00", "never", "never", hanging),
    ]:
        for path, age in ((log, ages[printed]), (folder / "output.txt", ages[out])):
            os.utime(path, (time.time() - age,) * 2)
        slurm.tell([("77_5", "RUNNING", "None", "node07", "sub.0")], used)
        assert json.loads(call("--json")[1])["runs"][0]["reason"] == reason
        assert f"node07 ({reason})" in call()[1]
        assert f"queued ({reason})" in call("show", "run")[1]
    log.unlink()
    assert f"25 min, see {log.parent.relative_to(runs.parent)})" in call()[1]


def test_a_row_says_what_the_files_say(runs, slurm, call):
    slurm.tell([("77_3", "RUNNING", "None", "node07", "sub.0")])
    make(runs, "now", "running", claim=submitted(3))
    make(runs, "done", "finished")
    make(runs, "broken", "failed")
    make(runs, "new")
    for k in (1, 2):
        write(runs / "demo" / "now" / "attempts" / f"0000000{k}.json", {})
    found = rows(call()[1])
    assert list(found) == ["now", "broken", "new", "done"], "what is not finished comes first"
    assert found["now"] == ["running", "25", "%", "2.5/10", "61.25", "812", "1h01m", "2", "77_3", "node07"]
    assert found["done"] == ["finished", "100", "%", "10/10", "93.50", "-", "-", "3", "-", "-"]
    assert found["broken"] == ["failed", "25", "%", "2.5/10", "61.25", "-", "-", "-", "-", "node03", "(out-of-memory)"]
    assert found["new"] == ["missing", "-", "-", "-", "-", "-", "-", "-", "-"]
    by_name = {run["run"]: run for run in json.loads(call("--json")[1])["runs"]}
    for key in ("step", "steps", "epoch", "epochs", "value", "images_per_second", "seconds_left"):
        assert by_name["now"][key] == PROGRESS[key]
    assert by_name["broken"]["failure"] == OOM
    assert by_name["broken"]["seconds_left"] is by_name["broken"]["images_per_second"] is None
    assert (by_name["done"]["step"], by_name["done"]["seconds"], by_name["done"]["attempts"]) == (100, 200.0, 3)


CODES = {
    ("finished",): 0,
    ("finished", "finished"): 0,
    ("finished", "failed"): 1,
    ("finished", "cancelled"): 1,
    ("resumable",): 1,
    ("missing",): 1,
    ("finished", "running"): 75,
    ("failed", "queued"): 75,
    ("missing", "running", "queued"): 75,
}


@pytest.mark.parametrize("states", CODES, ids="+".join)
def test_exit_codes(runs, slurm, call, states):
    for k, state in enumerate(states):
        make(runs, f"run-{k}", state)
    assert call()[0] == call("--json")[0] == CODES[states]
    assert call("run-0")[0] == CODES.get((states[0],), 1)
    assert call("--state", "failed")[0] == (1 if "failed" in states else 0)
    if CODES[states] != 75:
        assert call("watch")[0] == CODES[states]


def test_an_answer_of_slurm_that_does_not_come_leaves_claims_as_they_are(runs, slurm, call):
    (slurm.folder / "squeue").write_text("#!/bin/sh\nexit 1\n")
    make(runs, "waits", claim=submitted(4))
    code, text, _ = call()
    assert code == 75
    assert "(Slurm does not answer)" in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--runs", "nowhere"], "expected a folder of runs, got nowhere; give --runs DIR."),
        (["--runs", "empty"], "expected runs in empty, got none; python experiments/NAME.py --submit"),
        (["--experiment", "demi"], "got demi; nearest: demo."),
        (["--stat", "failed"], "unknown flag --stat; nearest: --state"),
        (["--state", "broken"], "expected --state to be some of finished, running,"),
        (["--state", ""], "expected --state to be some of"),
        (["show", "resnet-s3-aaaaaaa1"], "got resnet-s3-aaaaaaa1; nearest: resnet-s1-aaaaaaa1"),
        (["vit"], "got vit; nearest: "),
        (
            ["show", "resnet"],
            "got resnet, which 2 have in their names; give more of it: resnet-s1-aaaaaaa1, resnet-s2-",
        ),
        (["show"], "the following arguments are required: RUN"),
        (["watch", "--every", "0"], "expected --every to be seconds above 0, got 0."),
        (["logs", "s1", "-n", "-3"], "expected -n to be a number of lines, got -3."),
        (["logs", "s1", "-n", "x"], "invalid int value"),
        (["cancel"], "expected runs to cancel, got none; name them, or give --state S,S or --all."),
        (["cancel", "s1", "--all"], "expected runs or --all, got both"),
        (["cancel", "resnet"], "which 2 have in their names"),
        (["retry", "s1", "--all"], "expected runs or --all, got both"),
        (["retry", "s1"], "got resnet-s1-aaaaaaa1; python experiments/demo.py --submit takes what"),
    ],
)
def test_bad_input_is_one_sentence(runs, slurm, call, arguments, error):
    (runs.parent / "empty").mkdir()
    folders = [make(runs, "resnet-s1-aaaaaaa1"), make(runs, "resnet-s2-aaaaaaa2", "failed")]
    before = [sorted(folder.rglob("*")) for folder in folders]
    code, text, said = call(*arguments)
    assert (code, text) == (2, "")
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert error in said
    assert [sorted(folder.rglob("*")) for folder in folders] == before


HALF = '{"step": 25, "ste'
WRONG = {"step": "a", "steps": [1], "epoch": {}, "epochs": None, "value": "x", "seconds_left": "1"}
DAMAGE = [
    ("running", "progress.json", HALF, "?"),
    ("running", "progress.json", "[1, 2]", "?"),
    ("running", "progress.json", WRONG, "?"),
    ("running", "progress.json", PROGRESS | {"step": float("nan"), "images_per_second": True}, "?"),
    ("running", "progress.json", '{"step": 1' + "0" * 500 + "}", "?"),
    ("running", "progress.json", PROGRESS | {"images_per_second": True}, "-"),
    ("running", "progress.json", {key: value for key, value in PROGRESS.items() if key != "value"} | {"host": 3}, "-"),
    ("running", "progress.json", PROGRESS | {"value": None, "seconds_left": "soon"}, "-"),
    ("running", "lease/00000001.json", HALF, "61.25"),
    ("running", "attempts/00000001.json", HALF, "61.25"),
    ("finished", "result.json", HALF, "?"),
    ("finished", "result.json", "\udcff\x00", "?"),
    ("finished", "result.json", {"metrics": [1]}, "?"),
    ("failed", "failure.json", HALF, "(?)"),
    ("failed", "failure.json", {"kind": {"a": 1}, "reason": 5, "traceback": "text", "host": ["x"]}, "failed"),
    ("failed", "failure.json", {"kind": "new kind", "reason": "a\x1b[31mb\nc", "traceback": [1, None]}, "failed"),
    ("queued", "claims/00000002.json", HALF, "missing"),
    ("queued", "claims/00000002.json", {"submission": [1], "made": "now"}, "missing"),
    ("queued", "claims/00000002.json", {"submitted": True, "scheduler": "local"}, "missing"),
    ("missing", "lease/00000001.json", {"beats_every": "soon", "pid": "many", "restart": []}, "running"),
    ("cancelled", "cancelled", HALF, "cancelled"),
]


@pytest.mark.parametrize(("state", "name", "content", "shown"), DAMAGE, ids=str)
def test_a_damaged_file_hides_no_other_run(runs, slurm, call, state, name, content, shown):
    make(runs, "good", "finished")
    path = make(runs, "hurt", state) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode(errors="surrogateescape"))
    code, text, said = call()
    assert code in (1, 75)
    assert said == ""
    assert rows(text)["good"][0] == "finished"
    assert shown in rows(text)["hurt"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert {run["run"] for run in json.loads(call("--json")[1])["runs"]} == {"good", "hurt"}
    assert call("show", "hurt")[0] in (1, 75)
    if name == "result.json":
        assert (
            "1 finished with a result that cannot be read; move it elsewhere, then retry: runs/demo/hurt/result.json"
            in text
        )


def test_a_folder_that_cannot_be_read_is_a_failure_of_its_own(runs, slurm, call):
    """Root may read what others may not, but nobody gets to the end of a circle of links."""
    make(runs, "good", "finished")
    (make(runs, "circle") / "lease").symlink_to("lease")
    (runs / "demo" / "closed").mkdir()
    (runs / "demo" / "closed" / "config.yaml").symlink_to("config.yaml")
    for name in ("lease", "progress.json", "output.txt", "claims", "attempts"):
        (runs / "demo" / "closed" / name).symlink_to(name)
    code, text, _ = call()
    assert code == 1
    assert {name: words[0] for name, words in rows(text).items()} == {
        "good": "finished",
        "circle": "failed",
        "closed": "failed",
    }
    assert "2 x unreadable: expected the folder of a run, got what cannot be read (OSError: " in text
    assert call("show", "closed")[0] == 1


def test_what_is_no_run_is_no_row(runs, slurm, call):
    make(runs, "run", "finished")
    (runs / "demo" / "slurm" / "sub").mkdir(parents=True)
    write(runs / "demo" / "slurm" / "config.yaml", "")
    (runs / "demo" / "other").mkdir()
    write(runs / "demo" / "file", "")
    write(runs / ".snapshot" / "run" / "config.yaml", "")
    code, text, _ = call()
    assert (code, list(rows(text))) == (0, ["run"])


def test_several_experiments_have_tables_of_their_own(runs, slurm, call):
    make(runs, "a", "finished", experiment="one")
    make(runs, "b", "failed", experiment="two")
    text = call()[1]
    assert text.startswith("one: 1 run: 1 finished\n")
    assert text.index("\na ") < text.index("two: 1 run") < text.index("\nb ")
    assert call("--experiment", "one")[0] == 0
    assert "\nb " not in call("--experiment", "one")[1]


def test_finished_runs_are_only_counted_where_there_are_many(runs, slurm, call):
    for k in range(40):
        make(runs, f"run-s{k}", "finished" if k else "missing")
    text = call()[1]
    assert list(rows(text)) == ["run-s0"]
    assert "40 runs: 39 finished, 1 missing" in text
    assert re.search("^run +state$", text, re.MULTILINE), "columns that say nothing are left out"
    every = list(rows(call("--all")[1]))
    assert every == ["run-s0", *(f"run-s{k}" for k in range(1, 40))], "in the order of the seeds"
    assert set(rows(call("s1")[1])) == {f"run-s{k}" for k in (1, *range(10, 20))}
    for k in range(25):
        make(runs, f"new-{k}")
    text = call()[1]
    assert len(rows(text)) == 10
    assert "and 16 missing; --all lists them" in text


def test_words_choose_runs(runs, slurm, call):
    make(runs, "vit-s1", "finished")
    make(runs, "vit-s10", "failed")
    folder = make(runs, "resnet-s1", "missing")
    assert set(rows(call("vit")[1])) == {"vit-s1", "vit-s10"}
    assert set(rows(call("resnet", "s10")[1])) == {"resnet-s1", "vit-s10"}
    assert set(rows(call("*-s1")[1])) == {"vit-s1", "resnet-s1"}
    assert set(rows(call("runs/demo/vit")[1])) == {"vit-s1", "vit-s10"}
    assert set(rows(call(folder)[1])) == set(rows(call(f"{folder}/")[1])) == {"resnet-s1"}
    assert call("vit-s1", "--state", "finished")[0] == 0
    assert "run         vit-s1\n" in call("show", "vit-s1")[1], "a whole name is meant before a part of one"
    assert "run         vit-s10\n" in call("show", "s10")[1]
    assert rows(call("--state", "missing,failed")[1]).keys() == {"vit-s10", "resnet-s1"}
    assert call("--runs", runs, "list", "vit-s1")[0] == 0
    os.chdir(folder)
    assert "run         resnet-s1\n" in call("show", ".")[1]


NAMES = [f"cifar10-{net}-sgd-200ep-{m}-s{s}-{s * 7 + k:08x}" for s in range(9) for k, (net, m) in enumerate(
    [("resnet18", "tract0.1"), ("resnet18", "vanilla"), ("vit", "tract0.05")])]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_rows_fit_the_terminal_and_names_stay_different(runs, slurm, call, monkeypatch, width):
    """A shortened name can be typed as it is shown."""
    monkeypatch.setenv("COLUMNS", str(width))
    for name in NAMES:
        make(runs, name, "failed", failure=OOM | {"reason": "x" * 300})
    text = call("--state", "failed")[1]
    assert all(len(line) <= width for line in text.splitlines() if "python " not in line), "commands stay whole"
    lines = text.split("\n\n")[1].splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert len(set(names)) == len(NAMES) == len(names)
    found = [re.search("^run +(.*)", call("show", name)[1], re.MULTILINE)[1] for name in names[::5]]
    assert found == sorted(NAMES, key=lambda name: (name.split("-")[1], name))[::5] or len(set(found)) == len(found)


ALIKE = [f"{letter}-{'x' * 40}" for letter in "ab"]  # at their ends
TWINS = ["net-s1-01234567", "net-s1-12345678", "net-s2-12345679", "vit-s1-01234567"]  # but for their hashes


def test_shortened_names_fit_or_are_whole():
    for room in range(1, 60):
        for chosen in (NAMES, NAMES[:1], NAMES[:2], ["a", "ab", "abc"], ALIKE, TWINS):
            short = overview.shortened(chosen, room)
            assert len(set(short)) == len(chosen)
            assert short == chosen or max(map(len, short)) <= max(room, 10)
            assert all(cut.strip("…") in name for name, cut in zip(chosen, short, strict=True))
    assert overview.shortened(NAMES, max(map(len, NAMES))) == NAMES
    pair = ["a-b-s1-01234567", "a-b-s2-12345678"]
    assert overview.shortened(pair, 13) == ["…s1-01234567", "…s2-12345678"]
    assert overview.shortened(pair, 10) == ["…s1-…", "…s2-…"]


# -- time left --------------------------------------------------------------------------


def run_of(state, step=None, steps=None, seconds=None, seconds_left=None):
    return {"state": state, "step": step, "steps": steps, "seconds": seconds, "seconds_left": seconds_left}


def test_time_left_by_hand():
    """Two of 100 steps run; the rest at their pace (2 s a step), two at a time."""
    running = [run_of("running", 50, 100, seconds_left=100), run_of("running", 90, 100, seconds_left=20)]
    queued = [run_of("queued"), run_of("queued", 40, 100)]
    ended = [run_of("failed", 10, 100), run_of("missing"), run_of("finished", 100, 100, seconds=200.0)]
    assert overview.seconds_left(running + queued + ended) == (100 + 20 + 200 + 120) / 2
    assert overview.seconds_left(running) == 100, "the longest run takes its time"
    assert overview.seconds_left(queued + ended) is None, "nothing runs"
    assert overview.seconds_left([run_of("running")]) is None, "nothing is known"


# -- failures ---------------------------------------------------------------------------


def test_failures_are_grouped_and_the_commands_shown_work(runs, slurm, call):
    for k in range(5):
        failure = OOM | {"reason": f"tried {k} GiB at 0x{k}f", "host": f"n{k // 4}"}
        make(runs, f"oom-{k}", "failed", claim=old(), failure=failure)
    make(runs, "nan-0", "failed", failure={"kind": "non-finite", "reason": "train/loss is not finite"})
    make(runs, "nan-1", "failed", failure={"kind": "non-finite", "reason": "layer conv1 is not finite"})
    make(runs, "lost", "resumable", claim=submitted(1))
    make(runs, "stopped", "cancelled", claim=submitted(2))
    make(runs, "new")
    text = call("--runs", runs)[1]
    assert "7 failed runs:\n  5 x out-of-memory on n0 (4), n1 (1): tried 0 GiB at 0x0f\n" in text
    report = text[text.index("7 failed runs") :]
    assert [line for line in report.splitlines() if "|" in line] == [
        f"      | {line}" for line in OOM["traceback"][-3:]
    ]
    assert report.count("1 x non-finite: ") == 2
    commands = [shlex.split(part) for part in re.findall(r"python (slurm/status.py .*|/.*/slurm/status.py .*)", report)]
    assert [words[1] for words in commands] == ["show", "show", "show", "retry", "retry", "retry"]
    assert {Path(words[0]).resolve() for words in commands} == {SCRIPT}
    for words in commands[:3]:
        assert call(*words[1:])[1].startswith("run         ")
    states = [words[words.index("--state") + 1] for words in commands[3:]]
    assert states == ["failed", "resumable", "cancelled"]
    assert all(str(runs) in words for words in commands)
    assert report.endswith("\n1 run never submitted: python experiments/demo.py --submit (or --local)\n")


def test_at_most_ten_kinds_of_failure_are_shown(runs, slurm, call):
    for k in range(26):
        for copy in range(1 + (k == 25)):
            make(
                runs,
                f"{'abcdefghijklmnopqrstuvwxyz'[k]}{copy}",
                "failed",
                failure={"kind": "code", "reason": chr(97 + k)},
            )
    report = call()[1].split("27 failed runs:\n")[1]
    assert report.startswith("  2 x code: z\n")
    assert len(re.findall(r"^  \d+ x code: ", report, re.MULTILINE)) == 10
    assert "  16 more for 16 other reasons" in report


# -- speed and weight -------------------------------------------------------------------

MEASURE = """
import collections, json, os, runpy, sys
root, script, *arguments = sys.argv[1:]
counts = collections.Counter()
def note(event, values):
    if event in ("open", "os.listdir", "os.scandir") and str(values[0]).startswith(root):
        counts["opened"] += 1
    counts["started"] += event == "subprocess.Popen"
sys.addaudithook(note)
sys.argv = [script, *arguments]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    said = {"code": end.code, "modules": sorted(sys.modules), **counts}
    print(json.dumps(said), file=sys.stderr)
"""


def test_a_thousand_runs_need_one_look_at_each_file_one_squeue_and_no_torch(tmp_path):
    """From any folder, also one with modules of the same names as the standard library's."""
    made = benchmark.make_grid(tmp_path / "grid", 1000)
    write(tmp_path / "queue.py", "raise RuntimeError('not me')")
    environment = os.environ | {"PATH": f"{tmp_path / 'grid' / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "grid"), str(SCRIPT), "--json", "--runs"]
    done = subprocess.run(
        [*command, str(tmp_path / "grid" / "runs")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    measured, said = json.loads(done.stderr), json.loads(done.stdout)
    assert measured["code"] == 75
    assert {run["folder"]: run["state"] for run in said["runs"]} == {str(folder): s for folder, s in made.items()}
    assert said["counts"] == dict(Counter(made.values()))
    assert len((tmp_path / "grid" / "bin" / "calls").read_text().split("\n")[:-1]) == measured["started"] == 1
    assert measured["opened"] <= 8 * len(made) + 20
    own = {name.partition(".")[0] for name in measured["modules"]} - sys.stdlib_module_names
    started = {"__main__", "_distutils_hack", "sitecustomize", "usercustomize"}
    assert own <= started | {"runfolder", "slurm"}
    assert "experiments.config" not in measured["modules"]


def test_a_list_asks_the_queue_only_where_that_can_matter(runs, slurm, call):
    make(runs, "done", "finished", claim=submitted(1))
    make(runs, "ended", "resumable", claim=submitted(2, released="failed"))
    make(runs, "here", "queued")
    assert call()[0] == 75
    assert slurm.calls("squeue") == []


def test_the_benchmark_lists_what_it_made(tmp_path, capsys, monkeypatch):
    assert benchmark.main(["--runs", "40", "--repeat", "1"]) == 0
    assert re.match(r"40 runs listed in \d+\.\d\d s \(median of 1, ", capsys.readouterr().out)


def test_a_reader_that_leaves_is_no_error(runs, slurm):
    make(runs, "one", "finished")
    process = subprocess.Popen([sys.executable, str(SCRIPT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.parametrize("verb", ["list", *status._VERBS])
def test_help_names_every_flag_and_the_exit_codes(capsys, verb):
    with pytest.raises(SystemExit) as end:
        status.main(["--help"] if verb == "list" else [verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "\n  75   something is still running or queued\n" in text
    for flag in status._parser(verb)._option_string_actions:
        assert flag in text


# -- watch ------------------------------------------------------------------------------


def test_watch_prints_each_change_and_ends_with_the_last_run(runs, slurm, call, monkeypatch):
    make(runs, "one", "finished")
    folder = make(runs, "two", "running")

    def train(clock):
        write(folder / "progress.json", PROGRESS | {"step": 30 + len(clock.naps)})
        if len(clock.naps) == 3:
            write(folder / "result.json", RESULT)

    clock = Clock(monkeypatch, train)
    read = Counter()
    judge = ledger.state_of
    monkeypatch.setattr(ledger, "state_of", lambda folder, *rest: read.update([folder.name]) or judge(folder, *rest))
    code, text, _ = call("watch", "--every", "7")
    assert code == 0
    assert clock.naps == [7.0] * 3
    assert re.findall("demo: 2 runs: (.*)", text) == ["1 finished, 1 running", "2 finished"]
    assert "\x1b" not in text
    assert read == {"one": 1, "two": 4}, "what has finished is read once"


def test_watch_ends_with_ctrl_c(runs, slurm, call, monkeypatch):
    make(runs, "two", "running")
    Clock(monkeypatch, ctrl_c)
    code, text, said = call("watch")
    assert (code, said) == (130, "")
    assert "demo: 1 run: 1 running" in text


def test_watch_redraws_a_terminal_in_place_and_leaves_it_as_it_was(runs, slurm):
    """Lines never wrap or scroll; the last listing stays on the first screen."""
    folders = [make(runs, f"a-run-with-a-long-name-{k}", "running") for k in range(30)]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "watch", "--every", "0.1"], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    with no_longer_than(process):
        seen = read_until(leader, "\x1b[J", 2)
        for folder in folders:
            write(folder / "result.json", RESULT)
        seen += read_until(leader, None)
        assert process.wait() == 0
    os.close(leader)
    on_screen, _, after = seen.partition("\x1b[?1049l")
    pictures = on_screen.partition("\x1b[?1049h")[2].split("\x1b[H")[1:]
    assert len(pictures) >= 3
    for picture in pictures:
        lines = picture.removesuffix("\x1b[J").split("\r\n")
        assert len(lines) <= 12
        assert all(len(line.removesuffix("\x1b[K")) <= 60 for line in lines)
        assert all(line.endswith("\x1b[K") for line in lines[:-1])
    assert "... and 25 more lines" in pictures[0]
    assert "30 runs: 30 finished" in after
    assert "\x1b" not in after


@contextmanager
def no_longer_than(process, seconds=60):
    """A process that should have ended or spoken long ago fails its test instead of stopping it."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def read_until(leader, mark, times=1):
    text = ""
    while mark is None or text.count(mark) < times:
        try:
            text += os.read(leader, 65536).decode()
        except OSError:  # the other end is closed
            break
    return text


# -- show -------------------------------------------------------------------------------


def test_show_says_everything(runs, slurm, call):
    slurm.tell([("77_3", "RUNNING", "None", "node07", "sub.0")])
    folder = make(runs, "vit-s1-01234567", "failed", claim=submitted(3, released="failed"))
    steps = [(0, 17, 10), (10, 33, 20), (20, None, None), (20, 28, 20)]
    for number, (began, reached, saved) in enumerate(steps, start=1):
        said = {"started": f"2025-01-0{number} 00:00:00", "from_step": began, "job": "80", "restart": number - 1}
        if reached is not None:
            said |= {"ended": "2025-01-09 00:00:00", "outcome": "killed", "reason": "killed by SIGKILL"}
            said |= {"reached_step": reached, "saved_step": saved}
        write(folder / "attempts" / f"{number:08d}.json", said | {"node": "node07"})
    write(folder / "output.txt", "".join(f"line {k}\n" for k in range(9)))
    write(runs / "demo" / "slurm" / "sub" / "jobs" / "77_3_0_log.out", "")
    write(runs / "demo" / "slurm" / "sub" / "jobs" / "77_30_0_log.out", "")
    code, text, _ = call("show", "vit")
    assert code == 1
    head, *table = [re.split("  +", line) for line in text.splitlines() if re.match(r"attempt |\d ", line)]
    columns = [tuple(row[head.index(name)] for name in ("from", "reached", "lost")) for row in table]
    assert columns == [("0", "17", "7"), ("10", "33", "13"), ("20", "-", "-"), ("20", "28", "8")]
    assert [row[head.index("job")] for row in table] == [f"80 (start {k})" for k in (1, 2, 3, 4)]
    assert "steps that had to be repeated: 28" in text
    assert " cut off " in text
    for line in [*OOM["traceback"], OOM["reason"], "line 4", "line 8", "2025-01-02 03:04:05"]:
        assert line in text
    assert "line 3" not in text
    assert "\n  runs/demo/vit-s1-01234567/output.txt\n  runs/demo/slurm/sub/jobs/77_3_0_log.out\n" in text
    assert "77_30" not in text
    assert "step 25 of 100, epoch 2.5 of 10.0, test/top1 61.25" in text
    assert re.search(r"^continue here: python \S*experiments/demo.py --resume runs/demo/vit-s1-01234567$", text, re.M)
    assert re.search(r"^submit again:  python \S*slurm/status.py retry vit-s1-01234567$", text, re.M)


def test_show_of_a_run_that_runs(runs, slurm, call):
    slurm.tell([("77_3", "RUNNING", "None", "node07", "sub.0")])
    folder = make(runs, "one", "running", claim=submitted(3))
    write(folder / "attempts" / "00000001.json", {"from_step": 0})
    code, text, _ = call("show", "one")
    assert code == 75
    assert "812 images/s, 1h01m left" in text
    assert "job         77_3, RUNNING node07" in text
    assert "trained by  process 7 on elsewhere since 2025-01-01 00:00:00" in text
    assert re.search(r"^1 +- +- +0 +25 +- +- +running", text, re.MULTILINE)
    assert call("show", make(runs, "two", "finished"))[0] == 0


# -- logs -------------------------------------------------------------------------------


def test_last_lines_are_those_of_the_whole_file(monkeypatch):
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice(["\n", "a", "ü", "\r", "b" * 50_000, "\n"]) for _ in range(draw.randrange(20)))
        whole, count = text.encode(), draw.randrange(6)
        file = io.BytesIO(whole)
        lines = [line + b"\n" for line in whole.split(b"\n")]
        lines[-1] = lines[-1][:-1]
        lines = [line for line in lines if line]
        assert tail.last_lines(file, count) == b"".join(lines[len(lines) - min(count, len(lines)) :])
        assert file.tell() == len(whole)


def test_logs_follow_a_file_that_comes_late_grows_is_cut_and_replaced(runs, slurm):
    """Each line once, until the run has finished."""
    folder = make(runs, "one", "queued")
    code = "import sys; from slurm import status; status._POLL = 0.02; status._SECONDS_BETWEEN_LOOKS = 0.05; "
    code += "status._SECONDS_BETWEEN_QUEUES = 1e9; sys.exit(status.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "logs", "one"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process, no_longer_than(process):
        assert process.stderr.readline() == b"one is queued and has said nothing yet\n"
        output = folder / "output.txt"
        expected = b""
        for step, content in enumerate(["first ü\n", "half a "]):
            with open(output, "ab") as file:
                file.write(content.encode())
            expected += content.encode()
            assert process.stdout.read(len(content.encode())) == content.encode(), step
        euro = "line €\n".encode()
        with open(output, "ab", buffering=0) as file:
            file.write(euro[:6])  # within a character
            assert process.stdout.read(5) == euro[:5]
            file.write(euro[6:])
        assert process.stdout.read(len(euro) - 5) == euro[5:]
        output.write_text("cut\n")
        assert process.stdout.read(4) == b"cut\n"
        write(folder / "beside", "another, longer than the one before\n")
        os.replace(folder / "beside", output)
        assert process.stdout.read(36) == b"another, longer than the one before\n"
        output.unlink()
        time.sleep(0.1)
        write(output, "last\n")
        write(folder / "result.json", RESULT)
        rest, said = process.communicate()
        assert (rest, said, process.returncode) == (b"last\n", b"one: finished\n", 0)


def test_logs_of_a_run_that_has_ended(runs, slurm, call):
    folder = make(runs, "one", "failed")
    assert call("logs", "one") == (1, "", f"one: failed: out-of-memory: {OOM['reason']}\n")
    write(folder / "log.txt", "".join(f"{k}\n" for k in range(100)))
    assert call("logs", "one")[:2] == (1, "".join(f"{k}\n" for k in range(50, 100)))
    write(folder / "output.txt", "a\nb\nc")
    assert call("logs", "one", "-n", "2")[:2] == (1, "b\nc")
    make(runs, "two", "running")
    assert call("logs", "two", "--no-follow")[0] == 75


def test_logs_end_with_what_was_said_last(runs, slurm, call, monkeypatch):
    """Written together with the result, between two looks."""
    folder = make(runs, "one", "running")
    write(folder / "output.txt", "first\n")

    def end(_):
        write(folder / "output.txt", "first\nlast\n")
        write(folder / "result.json", RESULT)

    Clock(monkeypatch, end)
    assert call("logs", "one") == (0, "first\nlast\n", "one: finished\n")


def test_following_a_queued_run_asks_the_queue_rarely(runs, slurm, call, monkeypatch):
    slurm.tell([("77_3", "PENDING", "Priority", "", "sub.0")])
    make(runs, "one", claim=submitted(3))
    Clock(monkeypatch, lambda clock: clock.now > 60 and slurm.tell([]))
    assert call("logs", "one")[0] == 1
    assert 4 <= len(slurm.calls("squeue")) <= 8


# -- cancel -----------------------------------------------------------------------------


def test_cancel_marks_runs_and_takes_only_idle_jobs_out_of_the_queue(runs, slurm, call):
    """Job 77_1 has one run, 77_2 two of which one is cancelled, 77_3 two that are."""
    tasks = [(f"77_{k}", "PENDING", "Priority", "", "sub.0") for k in (1, 2)]
    slurm.tell([*tasks, ("77_3", "RUNNING", "None", "n1", "sub.0"), ("78", "PENDING", "Priority", "", "sub.1")])
    alone = make(runs, "alone", claim=submitted(1))
    packed = [make(runs, f"packed-{k}", claim=submitted(2)) for k in range(2)]
    both = [make(runs, f"both-{k}", "running" if k else "missing", claim=submitted(3)) for k in range(2)]
    other = make(runs, "other", claim=submitted(0, job_name="sub.1"))
    done = make(runs, "done", "finished", claim=submitted(3))
    code, text, _ = call("cancel", "alone", "packed-0", "both-*", "done")
    assert code == 0
    assert slurm.calls("scancel") == ["--quiet 77_1 77_3"] or slurm.calls("scancel") == ["--quiet 77_3 77_1"]
    marked = {folder.name for folder in runs.glob("demo/*") if (folder / "cancelled").exists()}
    assert marked == {"alone", "packed-0", "both-0", "both-1"}
    assert set(json.loads((alone / "cancelled").read_text())) == {"by", "at"}
    assert "Cancelled 4 runs: 1 running, 3 queued." in text
    assert "Out of the queue: 2 jobs that" in text
    assert "Still in the queue: 1 job with other runs" in text
    states = {run["run"]: run["state"] for run in json.loads(call("--json")[1])["runs"]}
    assert states == dict.fromkeys(["alone", "packed-0", "both-0"], "cancelled") | {
        "packed-1": "queued",
        "both-1": "running",
        "other": "queued",
        "done": "finished",
    }
    assert "(is being cancelled)" in call("both-1")[1]
    assert call("cancel", "packed-1", "--yes")[0] == 0
    assert slurm.calls("scancel")[-1] == "--quiet 77_2", "with the one that was cancelled before"
    assert not (other / "cancelled").exists()
    assert (packed[0].exists(), both[0].exists(), done.exists()) == (True, True, True)


def test_a_refused_scancel_can_be_repeated(runs, slurm, call):
    slurm.tell([("77_1", "PENDING", "Priority", "", "sub.0")])
    folder = make(runs, "alone", claim=submitted(1))
    write(slurm.folder / "scancel.code", "1")
    code, _, said = call("cancel", "alone")
    assert code == 2
    assert "expected Slurm to cancel 1 jobs, got: exit code 1" in said
    assert (folder / "cancelled").exists()
    write(slurm.folder / "scancel.code", "0")
    assert call("cancel", "alone")[0] == 0
    assert slurm.calls("scancel") == ["--quiet 77_1"] * 2


def test_cancel_by_state_or_all(runs, slurm, call):
    made = {state: make(runs, state, state) for state in State}
    assert call("cancel", "--state", "failed,missing")[0] == 0
    marked = {state for state, folder in made.items() if (folder / "cancelled").exists()}
    assert marked == {"failed", "missing", "cancelled"}
    assert call("cancel", "--state", "finished")[1] == "Nothing to cancel: 1 finished.\n"
    code, text, _ = call("cancel", "--all")
    assert code == 0
    assert [state for state, folder in made.items() if not (folder / "cancelled").exists()] == ["finished"]
    assert "running was started by hand and has to be stopped there: process 7 on elsewhere" in text
    assert "Without a job in the queue: 1 run; " in text
    assert slurm.calls("scancel") == []


def test_runs_of_a_local_supervisor_stop_without_slurm(runs, slurm, call):
    local = submitted(0, scheduler="local", worker=this_process())
    make(runs, "one", claim=local)
    make(runs, "two", "running", claim=local)
    assert rows(call()[1])["one"][-1] == "(local)"
    code, text, _ = call("cancel", "--all")
    assert code == 0
    assert "Without a job in the queue: 2 runs; " in text
    assert "by hand" not in text
    assert slurm.calls("scancel") == slurm.calls("squeue") == []


@pytest.mark.parametrize(("answer", "code", "marked"), [("y", 0, 21), ("n", 1, 0), ("", 1, 0), (EOFError, 1, 0)])
def test_many_runs_are_cancelled_after_a_question(runs, slurm, call, monkeypatch, answer, code, marked):
    for k in range(21):
        make(runs, f"run-{k}")
    asked = []

    def reply(question):
        asked.append(question)
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert call("cancel", "--all")[0] == code
    assert asked == ["Cancel 21 runs (21 missing)? [y/N] "]
    assert len(list(runs.glob("*/*/cancelled"))) == marked
    assert call("cancel", "--all", "--yes")[0] == 0
    assert call("cancel", "run-1*")[0] == 0
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert call("cancel", "--all")[0] == 0
    assert len(asked) == 1, "neither with --yes, nor for few, nor without a terminal"


# -- retry ------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Calls of launch.retry; what it is to do can be put into ``launched.then``."""
    said = types.SimpleNamespace(calls=[], then=lambda: 0)

    def retry(folders, changes, trusted):
        said.calls.append(sorted(folder.name for folder in folders))
        said.changes = changes
        paths = [folder / name for folder in folders for name in ("failure.json", "cancelled")]
        said.left = [path for path in paths if path.exists()]
        return said.then()

    module = types.ModuleType("slurm.launch")
    module.retry = retry
    monkeypatch.setitem(sys.modules, "slurm.launch", module)
    return said


def old(index=9):
    return submitted(index, released="failed")


def test_retry_takes_what_nobody_trains(runs, slurm, call, launched):
    for state in State:
        make(runs, state, state, claim=None if state == "queued" else old())
    assert call("retry")[0] == 0
    assert launched.calls == [["cancelled", "failed", "missing", "resumable"]]
    assert launched.changes == {}
    assert launched.left == []
    assert [path.parent.name for path in runs.glob("demo/*/result.json")] == ["finished"]
    states = {run["run"]: run["state"] for run in json.loads(call("--json")[1])["runs"]}
    assert states == {state: state for state in State} | {"failed": "resumable", "cancelled": "resumable"}


def test_retry_with_a_changed_profile(runs, slurm, call, launched):
    make(runs, "one", "failed", claim=old())
    make(runs, "two", "failed", claim=old())
    assert call("retry", "one", "cluster.memory_gb=64", "cluster.extra={mail-type: FAIL}")[0] == 0
    assert launched.calls == [["one"]]
    assert launched.changes == {"memory_gb": 64, "extra": {"mail-type": "FAIL"}}


def test_retry_of_some(runs, slurm, call, launched):
    for state in State:
        make(runs, state, state, claim=None if state == "queued" else old())
    launched.then = lambda: 1
    assert call("retry", "--state", "failed,missing")[0] == 1, "the launcher's own exit code"
    assert call("retry", "resumable", "finished", "running")[0] == 1
    assert launched.calls == [["failed", "missing"], ["resumable"]]
    assert (runs / "demo" / "cancelled" / "cancelled").exists()
    code, text, _ = call("retry", "finished", "running")
    assert (code, text) == (75, "Nothing to retry: 1 finished, 1 running.\n")
    assert call("retry", "finished")[0] == 0
    assert len(launched.calls) == 2


@pytest.mark.parametrize("error", [UserError("no Slurm"), KeyboardInterrupt(), RuntimeError()])
def test_a_submission_that_fails_leaves_the_records(runs, slurm, call, launched, error):
    """But a run that is queued by then keeps no mark that would stop it."""
    failed = make(runs, "failed", "failed", claim=old())
    stopped = make(runs, "stopped", "cancelled", claim=old())
    queued = make(runs, "queued", "cancelled", claim=old())
    given_back = make(runs, "given-back", "cancelled", claim=old())
    marks = (failed / "failure.json", stopped / "cancelled", given_back / "cancelled")
    before = {path: path.read_bytes() for path in marks}

    def fail():
        issue(given_back / "claims", 2, this_process() | {"submission": "new", "released": "not submitted"})
        issue(queued / "claims", 2, this_process() | {"submission": "new", "made": time.time()})
        raise error

    launched.then = fail
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            call("retry")
    else:
        assert call("retry")[0] == (2 if isinstance(error, UserError) else 130)
    assert launched.left == []
    assert {path: path.read_bytes() for path in before} == before
    assert not (queued / "cancelled").exists()


def test_runs_that_were_never_submitted_are_named(runs, slurm, call, launched):
    by_hand = make(runs, "by-hand", "failed")
    make(runs, "sent", "failed", claim=old())
    code, text, _ = call("retry")
    assert code == 0
    assert "Never submitted: 1 run, such as by-hand; python experiments/demo.py --submit takes what" in text
    assert launched.calls == [["sent"]]
    assert (by_hand / "failure.json").exists()


@pytest.mark.parametrize(
    ("state", "kept", "words"),
    [
        ("PENDING", False, "Not cancelled any more: 1 run;"),
        ("RUNNING", False, "any more: 1 run;"),
        ("COMPLETING", True, "retry in a minute"),
    ],
)
def test_a_cancelled_run_whose_job_is_still_there_is_not_submitted_twice(
    runs, slurm, call, launched, state, kept, words
):
    slurm.tell([("77_1", state, "None", "", "sub.0")])
    folder = make(runs, "one", "cancelled", claim=submitted(1))
    make(runs, "two", "missing", claim=old())
    code, text, _ = call("retry")
    assert code == 0
    assert words in text
    assert launched.calls == [["two"]]
    assert (folder / "cancelled").exists() is kept
    assert claims_of(folder) == ["00000001.json"]


def test_ctrl_c_of_a_list_has_its_own_code(runs, slurm, call, monkeypatch):
    make(runs, "one", "finished")
    monkeypatch.setattr(ledger, "now_in", ctrl_c)
    assert call()[0] == 130


def test_retry_without_slurm_leaves_what_is_cancelled_to_the_launcher(runs, slurm, call, launched):
    """Whether its job is still there is unknown; the launcher finds no Slurm and says so."""
    folder = make(runs, "one", "cancelled", claim=submitted(1))
    (slurm.folder / "squeue").write_text("#!/bin/sh\nexit 1\n")

    def refuse():
        raise UserError("expected a Slurm controller")

    launched.then = refuse
    assert call("retry")[0] == 2
    assert launched.calls == [["one"]]
    assert (folder / "cancelled").exists()


# -- copies of runs -----------------------------------------------------------------------


def test_a_copied_claim_is_nobodys(runs, slurm, call, tmp_path):
    """Cancelling a copy leaves the original's job alone."""
    folder = RunFolder(make(runs, "resnet-s1-aaaaaaa1"))
    assert ledger.claim([folder], "sub") == [folder]
    ledger.amend_claim(folder, **submitted(1))
    slurm.tell([("77_1", "PENDING", "Resources", "", "sub.0")])
    copy = tmp_path / "copy"
    shutil.copytree(runs, copy)
    assert ledger.claim_of(RunFolder(copy / "demo" / folder.name)) == {}
    assert call("cancel", folder.name, "--runs", str(copy))[0] == 0
    assert slurm.calls("scancel") == []
    assert ledger.is_claimed_by(folder, "sub")
    moved = tmp_path / "moved"
    runs.rename(moved)
    runs.symlink_to(moved)
    for place in (runs, moved):
        assert ledger.is_claimed_by(RunFolder(place / "demo" / folder.name), "sub")
    assert call("cancel", folder.name)[0] == 0
    assert len(slurm.calls("scancel")) == 1


# -- what a terminal obeys ----------------------------------------------------------------

ESCAPES = "a\x1b]0;title\x07b\x1b[2Jc\u202ed"


def test_no_text_of_others_moves_the_terminal(runs, slurm, call):
    name = "evil-\x1b[31m\u202e-s0-aaaaaaa1"
    folder = make(runs, name, "failed", failure={"kind": "code", "reason": ESCAPES})
    (folder / "output.txt").write_text(f"{ESCAPES}\r50%\n")
    for words in ([], ["--all"], ["--json"], ["show", "evil"], ["logs", "evil", "--no-follow"], ["retry", "evil"]):
        _, text, said = call(*words)
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", text + said), words
    assert call("logs", "evil", "--no-follow")[1] == r"a\x1b]0;title\x07b\x1b[2Jc\u202ed" + "\r50%\n"
