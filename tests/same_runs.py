"""Whether two runs ended the same, byte for byte: for tests of what may not make a difference."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis import tables
from experiments.training import checkpoint
from runfolder.folder import RunFolder


def only_run(runs: Path) -> RunFolder:
    (path,) = (runs / "quickstart").glob("*/config.yaml")
    return RunFolder(path.parent)


def points(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("time/", "memory/"))]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def last_checkpoint(folder: RunFolder) -> dict:
    result = json.loads(folder.result.read_text())
    return checkpoint.load(folder.newest_checkpoint(), result["config_hash"])


def table(runs: Path, capsys) -> str:
    capsys.readouterr()
    assert tables.main(["--runs", str(runs), "--experiment", "quickstart", "--format", "md"]) == 0
    return capsys.readouterr().out


def assert_same(disturbed: Path, reference: Path, capsys) -> None:
    """The runs of two folders of runs are the same: weights, metrics, points, last checkpoint, table."""
    mine, its = only_run(disturbed), only_run(reference)
    assert mine.name == its.name
    assert points(mine) == points(its)
    results = [json.loads(folder.result.read_text()) for folder in (mine, its)]
    for key in ("weights_sha256", "metrics", "config_hash", "steps"):
        assert results[0][key] == results[1][key]
    states = [last_checkpoint(folder) for folder in (mine, its)]
    for key in ("model", "optimizer", "ema", "scaler"):
        assert_equal_trees(states[0][key], states[1][key])
    assert table(disturbed, capsys) == table(reference, capsys)
    assert not list(mine.path.glob("**/*.tmp"))


def assert_equal_trees(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_equal_trees(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b
