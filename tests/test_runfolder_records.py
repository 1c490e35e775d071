"""What the JSON files of a run folder say: states, failures, and whether a result is that of the events."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runfolder import failures, states
from runfolder.errors import UserError
from runfolder.failures import FailureKind, cure_of, record
from runfolder.folder import RunFolder
from runfolder.lease import take
from runfolder.records import Failure, Result, disagreeing, read_result
from runfolder.states import State, state_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


# -- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "logged", "same"),
    [
        (71.23, 71.23000335693359, True),  # as float32 holds it
        (71.23, 71.2301, False),
        (1e-12, 0.0, True),
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (math.inf, math.inf, True),
        (71.23, None, False),
        ("71.23", 71.23, False),
        (True, 1.0, False),
        (None, 1.0, False),
    ],
)
def test_a_measure_of_the_test_set_must_be_the_logged_number(said, logged, same):
    assert disagreeing({"test/top1": said}, {"test/top1": logged}) == ([] if same else ["test/top1"])


def test_of_other_measures_numbers_at_epochs_are_compared():
    logged = dict.fromkeys(("train/loss", "time/epoch_seconds", "words/said", "ema/top1"), 1.0)
    said = {"train/loss": 2.0, "time/epoch_seconds": 2.0, "words/said": "two", "ema/top1": 1.0}
    assert disagreeing(said, logged) == ["time/epoch_seconds"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metrics": 5}', "\0"])
def test_a_damaged_result_is_one_sentence(folder, text):
    assert read_result(folder) is None
    folder.result.write_text(text)
    with pytest.raises(
        UserError, match=r"^expected the result of a run in .*result\.json, got .*move this file elsewhere"
    ):
        read_result(folder)


def test_a_result_is_read_as_it_was_written(folder):
    result = Result(metrics={"test/top1": 71.0}, epochs=5)
    folder.result.write_text(json.dumps(result))
    assert read_result(folder) == result


# -- failures -----------------------------------------------------------------------------------


def test_every_kind_of_failure_has_a_word_and_a_cure_of_its_own():
    assert len({cure_of(kind) for kind in FailureKind}) == len(FailureKind)
    for kind in FailureKind:
        assert re.fullmatch("[a-z]+(-[a-z]+)*", kind)
        assert cure_of(str(kind)) == cure_of(kind) == kind.cure
        assert re.fullmatch(r"[a-z][^.]*(optim\.lr|runtime\.\w+)?[^.]*[a-z0-9]", kind.cure), kind.cure
        assert len(kind.cure) <= 80


@pytest.mark.parametrize("kind", ["", "unheard-of", None, 5])
def test_a_kind_that_is_unknown_here_has_a_cure_too(kind):
    assert cure_of(kind) == "look into its log"


def test_only_what_a_machine_may_be_blamed_for_may_pass_elsewhere():
    assert {kind for kind in FailureKind if kind.may_pass_elsewhere} == {"node", "peer"}
    assert not any(kind.may_pass_elsewhere and kind.explains_itself for kind in FailureKind)


@pytest.mark.parametrize("lines", [None, ["line 1", "line 2"]])
def test_a_recorded_failure_has_all_keys(folder, lines):
    record(folder, FailureKind.disk, "the disk is full", lines)
    said = json.loads(folder.failure.read_text())
    assert said.keys() == Failure.__annotations__.keys() - (set() if lines else {"traceback"})
    assert (said["kind"], said["reason"], said.get("traceback")) == ("disk", "the disk is full", lines)


# -- states -------------------------------------------------------------------------------------


def test_the_files_of_a_folder_tell_its_state(folder):
    """Each file outweighs those before it, but a lease all but the result."""
    assert state_of(folder) == State.missing
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-5-0123.pt").touch()
    assert state_of(folder) == State.resumable
    record(folder, FailureKind.code, "an error")
    assert state_of(folder) == State.failed
    folder.cancelled.touch()
    assert state_of(folder) == State.cancelled
    lease = take(folder, beats_every=60.0)
    assert state_of(folder) == State.running
    folder.result.write_text("{}")
    assert state_of(folder) == State.finished
    folder.result.unlink()
    lease.release()
    assert state_of(folder) == State.cancelled


def test_every_state_is_one_that_a_folder_or_the_queue_tells():
    told = {"missing", "resumable", "failed", "cancelled", "running", "finished"}
    assert set(State) == told | {State.queued}
    assert set(states.LIVE) == {State.running, State.queued}


# -- the bottom of the house --------------------------------------------------------------------


def test_the_package_needs_the_standard_library_numpy_and_yaml_alone():
    """What importing all of it loads beyond what Python has, found in a process of its own."""
    modules = [f"runfolder.{path.stem}" for path in (ROOT / "runfolder").glob("*.py") if path.stem != "__init__"]
    assert failures.__name__ in modules
    code = f"import sys; before = set(sys.modules); import {', '.join(modules)}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    of_yaml = {"yaml", "_yaml", "cython_runtime", *(name for name in loaded if name.startswith("_cython"))}
    assert loaded - sys.stdlib_module_names <= {"runfolder", "numpy", *of_yaml}
