"""Every point comes back, and damage is noticed: our reader beside TensorBoard's own."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from torch.utils.tensorboard import SummaryWriter

from analysis.events import event_files, masked_crc32c, read_events
from tests.run_folders import event_file, record_offsets, write_events


def _tensorboard(folder):
    """{tag: [(step, value, wall time)]} by TensorBoard's reader, without down-sampling."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return {tag: [(e.step, e.value, e.wall_time) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def _ours(folder):
    series = read_events(folder).series
    return {tag: list(zip(own.steps, own.values, own.wall_times, strict=True)) for tag, own in series.items()}


def _point(tag, value, step):
    return Event(wall_time=2.0, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def _start(step):
    return Event(wall_time=3.0, step=step, session_log=SessionLog(status=SessionLog.START))


def test_all_of_25000_points_come_back(tmp_path):
    values = np.random.default_rng(0).normal(size=25_000).astype(np.float32)
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in enumerate(values):
            writer.add_scalar("train/loss", value, step)
    own = read_events(tmp_path)
    assert own.series["train/loss"].values.tolist() == values.tolist()
    assert own.series["train/loss"].steps.tolist() == list(range(25_000))
    assert own.damages == []
    assert _ours(tmp_path) == _tensorboard(tmp_path)


@pytest.mark.parametrize("double", [False, True])
def test_scalars_in_the_newer_format_come_back(tmp_path, double):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(5):
            writer.add_scalar("a", 0.1 * step, step, new_style=True, double_precision=double)
            writer.add_scalar("b", -step, step)
    expected = [0.1 * step if double else float(np.float32(0.1 * step)) for step in range(5)]
    assert list(read_events(tmp_path).by_step("a").values()) == expected
    assert list(read_events(tmp_path).by_step("b").values()) == [0, -1, -2, -3, -4]


def test_metadata_named_once_serves_all_points_of_a_tag(tmp_path):
    events = [Event(step=step, summary=scalar_pb("a", float(step))) for step in range(3)]
    for event in events[1:]:
        event.summary.value[0].ClearField("metadata")
    write_events(tmp_path / "events.out.tfevents.1", events)
    assert read_events(tmp_path).by_step("a") == {0: 0.0, 1: 1.0, 2: 2.0}


def test_what_is_no_scalar_is_not_taken_for_one(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("text", "words", 1)
        writer.add_histogram("histogram", np.arange(10), 1)
        writer.add_hparams({"lr": 0.1}, {"hparam/top1": 1.0}, run_name=".")
        writer.add_scalar("scalar", 1.0, 1)
    assert set(read_events(tmp_path).series) == set(_tensorboard(tmp_path)) == {"scalar", "hparam/top1"}


@pytest.mark.parametrize("purge_step", [0, 3, 5, 9, 10])
def test_a_resumed_run_has_each_step_once(tmp_path, purge_step):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(10):
            writer.add_scalar("train/loss", step, step)
            writer.add_scalar("train/lr", step, step)
    event_file(tmp_path).rename(tmp_path / "events.out.tfevents.1.first")  # TensorBoard sorts by name
    with SummaryWriter(str(tmp_path), purge_step=purge_step) as writer:
        for step in range(purge_step, 12):
            writer.add_scalar("train/loss", -step, step)
    loss = read_events(tmp_path).series["train/loss"]
    assert loss.steps.tolist() == list(range(12))
    assert loss.values.tolist() == [*range(purge_step), *(-step for step in range(purge_step, 12))]
    assert list(read_events(tmp_path).by_step("train/lr")) == list(range(purge_step))
    assert {tag: points for tag, points in _tensorboard(tmp_path).items() if points} == _ours(tmp_path)


def test_without_a_start_repeated_steps_are_reported_and_the_last_is_used(tmp_path):
    for offset in (0, 100):
        with SummaryWriter(str(tmp_path)) as writer:
            for step in range(4):
                writer.add_scalar("a", offset + step, step + offset // 50)
    own = read_events(tmp_path).series["a"]
    assert own.repeated_steps() == [2, 3]
    assert own.by_step() == {0: 0, 1: 1, 2: 100, 3: 101, 4: 102, 5: 103}
    assert len(own) == 8


def test_files_are_read_in_the_order_of_their_start(tmp_path):
    for stamp in (9, 10, 100):  # neither the order of names nor that of creation
        write_events(tmp_path / f"events.out.tfevents.{stamp}.host", [_start(stamp), _point("a", stamp, stamp)])
    assert [path.name.split(".")[3] for path in event_files(tmp_path)] == ["9", "10", "100"]
    assert list(read_events(tmp_path).by_step("a")) == [9, 10, 100]


def test_files_of_one_second_are_ordered_by_their_first_event(tmp_path):
    for name, time in (("a", 7.75), ("b", 7.25)):
        events = [Event(wall_time=time, step=1, summary=scalar_pb("x", time))]
        path = tmp_path / f"events.out.tfevents.7.{name}"
        write_events(path, events)
        path.write_bytes(path.read_bytes()[record_offsets(path)[1] :])
    assert [path.name[-1] for path in event_files(tmp_path)] == ["b", "a"]


def test_truncation_at_every_byte_of_the_last_record_keeps_the_points_before(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(5):
            writer.add_scalar("a", step, step)
    path = event_file(tmp_path)
    content, last = path.read_bytes(), record_offsets(path)[-2]
    for size in range(last, len(content) + 1):
        path.write_bytes(content[:size])
        log = read_events(tmp_path)
        assert list(log.by_step("a")) == list(range(5 if size == len(content) else 4))
        whole = size in (last, len(content))
        assert [(d.file, d.offset, d.truncated) for d in log.damages] == ([] if whole else [(path, last, True)])


def test_every_flipped_bit_is_noticed_and_the_points_before_are_kept(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(4):
            writer.add_scalar("a", step, step)
    path = event_file(tmp_path)
    content, offsets = path.read_bytes(), record_offsets(path)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        log = read_events(tmp_path)
        record = sum(offset <= position for offset in offsets) - 1
        assert [d.offset for d in log.damages] == [offsets[record]]
        assert list(log.by_step("a")) == list(range(max(record - 1, 0)))


def test_an_empty_file_is_noticed_and_the_others_are_read(tmp_path):
    write_events(tmp_path / "events.out.tfevents.1", [_point("a", 1.0, 1)])
    (tmp_path / "events.out.tfevents.2").touch()
    log = read_events(tmp_path)
    assert [(d.file.name, d.offset, d.restarted) for d in log.damages] == [("events.out.tfevents.2", 0, False)]
    assert log.by_step("a") == {1: 1.0}


@pytest.mark.parametrize("content", [b"\0" * 40, b"no events at all, but a long line of text"])
def test_what_is_no_event_file_is_noticed(tmp_path, content):
    (tmp_path / "events.out.tfevents.2").write_bytes(content)
    log = read_events(tmp_path)
    assert [d.offset for d in log.damages] == [0]
    assert log.series == {}


def test_a_record_that_holds_no_event_is_noticed(tmp_path):
    path = tmp_path / "events.out.tfevents.1"
    write_events(path, [_point("a", 1.0, 1)])
    size, data = path.stat().st_size, b"\xff" * 5
    header = len(data).to_bytes(8, "little")
    frame = header + masked_crc32c(header).to_bytes(4, "little") + data + masked_crc32c(data).to_bytes(4, "little")
    path.write_bytes(path.read_bytes() + frame)
    log = read_events(tmp_path)
    assert [d.offset for d in log.damages] == [size]
    assert log.by_step("a") == {1: 1.0}


def test_a_truncated_file_that_a_restart_continues_is_told_from_one_that_just_ends(tmp_path):
    write_events(tmp_path / "events.out.tfevents.1", [_point("a", 1.0, 1), _point("a", 2.0, 2)])
    first = tmp_path / "events.out.tfevents.1"
    first.write_bytes(first.read_bytes()[:-3])
    assert [d.restarted for d in read_events(tmp_path).damages] == [False]
    write_events(tmp_path / "events.out.tfevents.2", [_start(2), _point("a", 2.0, 2)])
    log = read_events(tmp_path)
    assert [d.restarted for d in log.damages] == [True]
    assert log.by_step("a") == {1: 1.0, 2: 2.0}


def test_a_length_far_beyond_the_file_is_a_truncated_record(tmp_path):
    header = (2**60).to_bytes(8, "little")
    (tmp_path / "events.out.tfevents.1").write_bytes(header + masked_crc32c(header).to_bytes(4, "little"))
    assert [d.truncated for d in read_events(tmp_path).damages] == [True]


def test_a_folder_without_event_files_has_no_points(tmp_path):
    log = read_events(tmp_path)
    assert (log.files, log.series, log.damages) == ((), {}, [])
