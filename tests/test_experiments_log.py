"""The record of a run is as it was written, or says at once that it is not."""

import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.config import folder_of, to_tree
from experiments.training.log import RunLog, lost_events
from experiments.training.run import run
from experiments.training.stop import StoppedError, StopRequest, Wish
from runfolder.errors import UserError
from runfolder.failures import FailureKind
from runfolder.folder import RunFolder
from tests.cases import tiny_config


@pytest.fixture
def log(tmp_path):
    """An open record with ten points."""
    config = tiny_config(tmp_path)
    log = RunLog(RunFolder(tmp_path))
    log.begin({}, to_tree(config), "test/top1")
    for step in range(10):
        log.scalar("train/loss", 1 / (step + 1), step)
    yield log
    log.close()


def _flip(path, place, bit=4):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_any_flipped_bit_is_noticed_and_only_where_it_counts(log, tmp_path):
    sizes = log.sizes()
    ((name, size),) = sizes.items()
    path, folder, draw = tmp_path / name, RunFolder(tmp_path), random.Random(0)
    assert lost_events(folder, sizes) is None
    for place in [*range(12), size - 1, *draw.sample(range(size), 60)]:
        bit = draw.randrange(8)
        _flip(path, place, bit)
        said = lost_events(folder, sizes)
        assert said.startswith(f"its record {name} is damaged at byte ")
        damage = int(said.split("at byte ")[1].split()[0])
        assert damage <= place
        assert lost_events(folder, {name: damage}) is None, "the records before it are whole"
        with pytest.raises(UserError, match=r"other bytes: its record .* is damaged at byte") as refused:
            log.sizes()
        assert refused.value.kind == FailureKind.node
        _flip(path, place, bit)
    assert lost_events(folder, sizes) is None


def _points(config):
    events = EventAccumulator(str(folder_of(config)), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("where", ["before the first checkpoint", "after it"])
def test_a_byte_flipped_while_a_run_is_stopped_costs_steps_but_no_point(tmp_path, monkeypatch, where):
    settings = {"max_steps": 12, "runtime.checkpoint_steps": 4, "runtime.log_every": 1, "runtime.keep_checkpoints": 5}
    expected = run(tiny_config(tmp_path / "a", **settings))
    calls, sizes = iter(range(100)), []
    real = RunLog.sizes
    with monkeypatch.context() as stopping:
        stopping.setattr(StopRequest, "wish", lambda self: Wish.STOP if next(calls) == 9 else Wish.GO_ON)
        stopping.setattr(RunLog, "sizes", lambda self: sizes.append(real(self)) or sizes[-1])
        with pytest.raises(StoppedError):
            run(tiny_config(tmp_path / "b", **settings))
    config = tiny_config(tmp_path / "b", **settings)
    (name,) = sizes[0]
    _flip(folder_of(config) / name, sizes[0][name] - 20 if where.startswith("before") else sizes[0][name] + 20)
    kept = sorted(folder_of(config).checkpoints.iterdir())
    if where.startswith("before"):
        with pytest.raises(UserError, match=r"whose record is whole, got none: .* is damaged at byte .*from a copy"):
            run(config)
        assert sorted(folder_of(config).checkpoints.iterdir()) == kept
        return
    result = run(config)
    said = folder_of(config).log.read_text()
    assert said.count("is damaged at byte") == 2
    assert "continues at step 4 of 12" in said
    assert result["weights_sha256"] == expected["weights_sha256"]
    found, wanted = _points(config), _points(tiny_config(tmp_path / "a", **settings))
    assert found.keys() == wanted.keys()
    assert all(found[tag] == wanted[tag] for tag in found if tag.startswith(("train/", "test/", "tract/")))


def test_a_byte_flipped_while_a_run_goes_on_ends_it_at_its_next_checkpoint(tmp_path, monkeypatch):
    settings = {"max_steps": 12, "runtime.checkpoint_steps": 4, "runtime.log_every": 1}
    config, real, calls = tiny_config(tmp_path, **settings), RunLog.sizes, []

    def flipped(log):
        calls.append(1)
        if len(calls) == 2:
            (path,) = folder_of(config).events
            _flip(path, 60)
        return real(log)

    with monkeypatch.context() as damaging:
        damaging.setattr(RunLog, "sizes", flipped)
        with pytest.raises(UserError, match=r"expected the record as it was written"):
            run(config)
    assert folder_of(config).failure.exists()
    (checkpoint,) = folder_of(config).checkpoints.iterdir()
    with pytest.raises(UserError, match="whose record is whole"):
        run(config)
    assert list(folder_of(config).checkpoints.iterdir()) == [checkpoint]
