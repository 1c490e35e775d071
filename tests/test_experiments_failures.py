"""What failed decides what is done about it; so each kind is told from the others."""

import errno
import json

import pytest
import torch

from experiments.config import folder_of, prepare_folder
from experiments.training.checkpoint import Keeper
from experiments.training.diagnosis import kind_of, record_error
from experiments.training.loop import Trainer
from experiments.training.run import run
from experiments.training.stop import StoppedError
from runfolder import failures
from runfolder.errors import RunBusyError, SupersededError, TrainingFailedError, UserError
from runfolder.failures import TRACEBACK_LINES, FailureKind, keep_room, record
from runfolder.folder import RunFolder
from runfolder.states import state_of
from runfolder.tickets import issue
from slurm.verdict import judge
from tests.cases import tiny_config
from tests.holding import held_elsewhere
from tract import NonFiniteError

# Messages as torch, NCCL and gloo word them.
KINDS = [
    (TrainingFailedError("train/loss is not finite in step 3"), "non-finite"),
    (NonFiniteError("input of conv1 is not finite"), "non-finite"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "out-of-memory"),
    (MemoryError(), "out-of-memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."), "out-of-memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out-of-memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), "out-of-memory"),
    (UserError("expected CIFAR-10 in data", FailureKind.data), "data"),
    (UserError("expected optim.lr to be a number"), "input"),
    (OSError(errno.ENOSPC, "No space left on device"), "disk"),
    (OSError(errno.EROFS, "Read-only file system"), "disk"),
    (OSError(errno.EPERM, "Operation not permitted"), "disk"),
    (OSError(errno.EIO, "Input/output error"), "node"),
    (OSError(errno.ESTALE, "Stale file handle"), "node"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "node"),
    (RuntimeError("No CUDA GPUs are available: no CUDA-capable device is detected"), "node"),
    (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "node"),
    (RuntimeError("CUDA error: unspecified launch failure"), "node"),
    (UserError("expected a GPU on n1, where Slurm gives this job number 0", FailureKind.node), "node"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), "peer"),
    (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), "peer"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "peer"),
    (RuntimeError("CUDA error: device-side assert triggered"), "code"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "code"),
    (KeyError("lr"), "code"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), "code"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind"), KINDS, ids=lambda value: f"{value!r:.40}")
def test_each_error_has_its_kind(error, kind):
    assert kind_of(error) == kind


def test_every_kind_that_training_records_is_told_from_the_others():
    by_launchers = {FailureKind.no_progress, FailureKind.requeues, FailureKind.unreadable}
    assert {kind for _, kind in KINDS} == set(FailureKind) - by_launchers


def _recorded(folder):
    return json.loads(folder.failure.read_text())


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_the_record_has_reason_place_and_the_end_of_the_traceback(folder):
    try:
        raise ValueError("first line\nsecond line")
    except ValueError as error:
        record_error(folder, error)
    said = _recorded(folder)
    assert (said["kind"], said["reason"]) == ("code", "ValueError: first line")
    assert said["traceback"][-1] == "second line"
    assert any("test_experiments_failures" in line for line in said["traceback"])
    assert len(said["traceback"]) <= TRACEBACK_LINES
    assert said["host"]


def test_what_another_rank_says_of_itself_stays(folder):
    """The rank that failed knows why; those that lost it do not."""
    record(folder, FailureKind.out_of_memory, "rank 1")
    record_error(folder, ConnectionError("Connection closed by peer"))
    assert _recorded(folder)["reason"] == "rank 1"


def test_a_lost_peer_is_recorded_by_the_first_rank_and_overwritten_by_the_cause(folder):
    record_error(folder, ConnectionError("Connection closed by peer"), first=False)
    assert not folder.failure.exists()
    record_error(folder, ConnectionError("Connection closed by peer"))
    assert _recorded(folder)["kind"] == "peer"
    record_error(folder, MemoryError(), first=False)
    assert _recorded(folder)["kind"] == "out-of-memory"


def _failing(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Trainer, "step", fail)


@pytest.mark.parametrize(
    ("error", "kind"), [(KeyError("x"), "code"), (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory")]
)
def test_a_failed_run_says_why_until_it_is_started_again(tmp_path, monkeypatch, error, kind):
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        _failing(patch, error)
        with pytest.raises(type(error)):
            run(config)
    folder = folder_of(config)
    assert _recorded(folder)["kind"] == kind
    assert state_of(folder) == "failed"
    run(config)
    assert not folder.failure.exists()
    assert state_of(folder) == "finished"


def test_a_missing_data_folder_is_a_failure_of_the_data(tmp_path):
    config = tiny_config(tmp_path, data="imagefolder", data__root=str(tmp_path / "missing"), data__image_size=8)
    prepare_folder(config)  # as for a submitted run; a new folder would go again
    with pytest.raises(UserError, match="missing"):
        run(config)
    assert _recorded(folder_of(config))["kind"] == "data"


@pytest.mark.parametrize("error", [StoppedError("signal"), RunBusyError("taken"), KeyboardInterrupt()])
def test_to_stop_is_no_failure(tmp_path, monkeypatch, error):
    config = tiny_config(tmp_path)
    _failing(monkeypatch, error)
    with pytest.raises(type(error)):
        run(config)
    assert not folder_of(config).failure.exists()


def test_a_refused_start_says_nothing_about_somebody_elses_run(tmp_path):
    config = tiny_config(tmp_path, runtime__device="cuda:77")
    folder = prepare_folder(config)
    with held_elsewhere(folder), pytest.raises(UserError, match="GPU"):
        run(config)
    assert not folder.failure.exists()
    with pytest.raises(UserError, match="GPU"):
        run(config)
    assert _recorded(folder)["kind"] == "input"


def test_a_full_disk_takes_the_record_of_its_failure(tmp_path, monkeypatch):
    """There is room for it: a file that goes then."""
    folder = RunFolder(tmp_path)
    keep_room(folder)
    real = failures.write_json

    def full(path, content):
        if folder.room.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(failures, "write_json", full)
    record(folder, FailureKind.disk, "full")
    assert json.loads(folder.failure.read_text())["kind"] == "disk"


def test_a_run_keeps_room_while_it_trains_and_no_longer(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, max_steps=1)
    room, seen, trained = folder_of(config).room, [], Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (seen.append(room.stat().st_size), trained(self)))
    run(config)
    assert seen == [8192]
    assert not room.exists()


def test_without_a_record_a_full_disk_is_still_called_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failures, "write_json", full)
    verdict = judge(RunFolder(tmp_path), 1, "stopped", was_told=False, has_elsewhere=False)
    assert verdict.reason.startswith(f"disk: {tmp_path} cannot be written: No space left")


def test_a_writer_whose_file_a_newer_one_has_removed_leaves_as_superseded(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, max_steps=2, **{"runtime.checkpoint_steps": 1})
    folder = folder_of(config)

    def gone(*_):
        issue(folder.lease, 2, {"host": "elsewhere", "beats_every": 10.0})
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x.tmp")

    monkeypatch.setattr(Keeper, "save", gone)
    with pytest.raises(SupersededError, match="has been taken over"):
        run(config)
