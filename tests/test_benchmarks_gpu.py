"""The script for when a GPU is at hand: exercised without one."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_work


@pytest.fixture
def here(monkeypatch):
    """Processes' work is done in this one; pytest and other scripts are not run."""
    monkeypatch.setattr(
        gpu.Run, "answers", lambda run, name, *each: [gpu_work.WORK[name](run.device, **options) for options in each]
    )
    monkeypatch.setattr(gpu.Run, "command", lambda run, *words: f"1 passed\n{' '.join(words)}")


def _record(folder):
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_every_stage_leaves_its_figures(here, tmp_path, capsys):
    sizes = dataclasses.replace(gpu.CPU, together=(1,))
    vit = ("quickstart", {"model": "vit_small", "batch_size": 8, "runtime.threads": 1})
    sizes.digests["ViT fp16"] = (vit[0], vit[1] | {"precision": "fp16"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CPU", sizes)
        assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    record, table = _record(tmp_path)
    assert list(record["stages"]) == [stage.__name__ for stage in gpu.STAGES]
    assert {stage["outcome"] for stage in record["stages"].values()} == {"done"}
    figures = record["figures"]
    for name in sizes.digests:
        assert figures[f"two runs of {name}"] == figures[f"a stopped run of {name}"] == "the same"
    assert figures["harness / plain script"] > 0
    assert figures["images/s of 1 runs side by side"] > 0
    low, high = figures["quartiles of the overhead of CIFAR ViT"]
    assert -1 < low <= high
    assert set(record["bars"].values()) == {"not a GPU"}
    assert "| harness / plain script |" in table
    assert "benchmarks/layer.py --help" in table
    assert "not a GPU: overhead of DeiT-B ≤ 0.30 %, got –" in capsys.readouterr().out


def test_processes_begin_together(tmp_path):
    """By processes of their own."""
    run = gpu.Run("cpu", dataclasses.replace(gpu.CPU, together=(2,)), tmp_path, end=time.monotonic() + 300)
    ((figure, speed),) = gpu.side_by_side(run)
    assert figure == "images/s of 2 runs side by side"
    assert speed > 0


def _stage(*, figures=(), then=None):
    def stage(run):
        """What it does."""
        yield from figures
        if then is not None:
            then(run)

    return stage


def test_what_fails_or_takes_too_long_ends_alone(here, tmp_path, monkeypatch, capsys):
    sleep = "import time; time.sleep({})"
    first, second, third = (
        _stage(figures=[("harness / plain script", 2.9)], then=lambda run: run._outputs([[sys.executable, "nothing"]])),
        _stage(then=lambda run: run._outputs([[sys.executable, "-c", sleep.format(n)] for n in (0, 60)])),
        _stage(figures=[("overhead of DeiT-S", 0.008), ("CUDA tests", "passed"), ("two runs of ViT fp16", "differs")]),
    )
    first.__name__, second.__name__, third.__name__ = "first", "second", "third"
    monkeypatch.setattr(gpu, "STAGES", {first: 10, second: 0.5, third: 10})
    monkeypatch.setattr(gpu, "GPU", gpu.CPU)
    monkeypatch.setattr(gpu_work, "machine", lambda device: {"device": "a GPU", "packages": {}})
    monkeypatch.setitem(gpu_work.WORK, "machine", gpu_work.machine)
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(start(*args, **more)) or started[-1])
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert len(started) == 3
    assert all(process.returncode is not None for process in started), "all have ended"
    record, table = _record(tmp_path)
    assert [stage["outcome"] for stage in record["stages"].values()] == ["failed", "failed", "done"]
    assert "can't open file" in record["stages"]["first"]["words"]
    assert record["stages"]["second"]["words"].startswith("out of time")
    bars = record["bars"]
    assert (bars["CUDA tests"], bars["overhead of DeiT-S"]) == ("held", "held")
    assert (bars["harness / plain script"], bars["two runs of ViT fp16"]) == ("missed", "missed")
    assert bars["overhead of DeiT-B"] == "not measured"
    assert "| overhead of DeiT-S | 0.80 % | ≤ 0.80 % | held |" in table
    assert "missed: harness / plain script ≥ 3, got 2.9" in capsys.readouterr().out


def test_a_digest_sees_each_bit_and_each_word():
    tree = {"model": {"weight": torch.ones(2)}, "optimizer": {"lr": 0.1, "step": torch.tensor(3.0)}}
    changed = [
        {"model": {"weight": torch.tensor([1.0, 1.0000001])}, "optimizer": tree["optimizer"]},
        {"model": tree["model"], "optimizer": {"lr": 0.2, "step": torch.tensor(3.0)}},
        {"model": {"weight": torch.ones(2, 1)}, "optimizer": tree["optimizer"]},
        {"model": {"weight": torch.ones(2).bfloat16()}, "optimizer": tree["optimizer"]},
    ]
    assert len({gpu_work.digest(each) for each in (tree, *changed)}) == 5
    assert gpu_work.digest(tree) == gpu_work.digest({key: dict(value) for key, value in tree.items()})


def test_a_dry_run_says_what_would_be_run(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--only", "tests", "side_by_side", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("tests, 120 s at most: ")
    assert printed.endswith("together 4 minutes at most\n")
    assert not (tmp_path / "none").exists()
