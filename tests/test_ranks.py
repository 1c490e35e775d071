"""How ranks find out who they are, and find each other without a port to agree on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.ranks import choose_device
from runfolder.errors import UserError
from runfolder.place import place_of_this_rank

ROOT = Path(__file__).parents[1]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
STEP = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (3, 8, 1)),
        (STEP, (5, 6, 2)),
        (TORCHRUN | STEP, (3, 8, 1)),  # torchrun inside a job
        ({"SLURM_NTASKS": "6"}, (0, 1, 0)),  # the shell of salloc: no step, one process
        (STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),  # srun --pty
    ],
)
def test_the_environment_tells_the_rank(environment, place, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place_of_this_rank() == place


def test_a_gpu_that_slurm_promised_is_missed(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    with pytest.raises(UserError, match="expected a GPU on .* got none") as caught:
        choose_device("auto")
    assert caught.value.kind == "node"
    assert choose_device("cpu").type == "cpu"


MEET = """
import sys, torch, json
from pathlib import Path
from experiments import ranks as meeting
meeting._MEETING_SECONDS = float(sys.argv[2])
with meeting.joined_ranks(torch.device("cpu"), Path(sys.argv[1])) as ranks:
    total = ranks.sum(torch.tensor([1.0 + ranks.rank]))
    print(json.dumps([ranks.rank, ranks.size, ranks.local, total.item()]))
"""


def _start(folder, rank, size=2, job="7", step="0", seconds=60):
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    environment |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_LOCALID": str(rank)}
    environment |= {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURMD_NODENAME": "127.0.0.1"}
    command = [sys.executable, "-c", MEET, str(folder), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)


def test_two_jobs_on_one_node_meet_without_clashing(tmp_path):
    """Two jobs of two ranks at the same time, in one folder, nothing configured."""
    started = {(job, rank): _start(tmp_path / "slurm", rank, job=job) for job in ("7", "8") for rank in (1, 0)}
    for (_, rank), process in started.items():
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert json.loads(said.splitlines()[-1]) == [rank, 2, rank, 3.0]
    assert not list((tmp_path / "slurm").iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_in_vain_says_so(tmp_path, rank):
    process = _start(tmp_path, rank, seconds=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "UserError: expected 2 ranks to meet through" in errors
    assert f"rank {rank} did not see all of them" in errors
    assert not list(tmp_path.glob("meeting-*.json"))
