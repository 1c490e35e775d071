"""Every point comes back, and damage is noticed: our reader beside TensorBoard's own."""

import threading
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from torch.utils.tensorboard import SummaryWriter

from analysis import events
from analysis.events import RecordReader, event_files, masked_crc32c, read_events
from tests.run_folders import event_file, record_offsets, write_events

MIB = 2**20


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


def _header(length):
    header = length.to_bytes(8, "little")
    return header + masked_crc32c(header).to_bytes(4, "little")


def _frame(data):
    return _header(len(data)) + data + masked_crc32c(data).to_bytes(4, "little")


def _frames(*events):
    return b"".join(_frame(event.SerializeToString()) for event in events)


def _tail_of_zeros(length, start=b""):
    """The masked checksum of ``start`` and then zeros, as long as ``length`` in all."""
    crc = google_crc32c.value(start)
    for size in [MIB] * ((length - len(start)) // MIB) + [(length - len(start)) % MIB]:
        crc = google_crc32c.extend(crc, bytes(size))
    return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def _peak(folder):
    """A folder's log, and the most bytes that Python held while reading it."""
    tracemalloc.start()
    try:
        return read_events(folder), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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


def test_what_is_being_written_to_replace_an_event_file_is_not_read(tmp_path):
    write_events(tmp_path / "events.out.tfevents.1", [_point("a", 1.0, 1)])
    write_events(tmp_path / "events.out.tfevents.1.77.tmp", [_point("a", 1.0, 1)])
    assert [path.name for path in read_events(tmp_path).files] == ["events.out.tfevents.1"]
    assert read_events(tmp_path).series["a"].repeated_steps() == []


def test_a_record_that_holds_no_event_is_noticed(tmp_path):
    path = tmp_path / "events.out.tfevents.1"
    write_events(path, [_point("a", 1.0, 1)])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + _frame(b"\xff" * 5))
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
    (tmp_path / "events.out.tfevents.1").write_bytes(_header(2**60))
    assert [d.truncated for d in read_events(tmp_path).damages] == [True]


def test_a_folder_without_event_files_has_no_points(tmp_path):
    log = read_events(tmp_path)
    assert (log.files, log.series, log.damages) == ((), {}, [])


@pytest.mark.parametrize(("length", "sound"), [(2**30, True), (2**26, False)])
def test_a_record_of_a_gigabyte_is_checked_but_never_held(tmp_path, length, sound):
    path = tmp_path / "events.out.tfevents.1"
    with open(path, "wb") as file:  # sparse: it takes no room on the disk
        file.write(_frames(_point("a", 1.0, 1)) + _header(length))
        offset = file.tell() - 12
        file.seek(length, 1)
        file.write((_tail_of_zeros(length) if sound else b"1234") + _frames(_point("a", 2.0, 2)))
    log, peak = _peak(tmp_path)
    assert peak < 8 * MIB
    assert log.by_step("a") == ({1: 1.0, 2: 2.0} if sound else {1: 1.0})
    assert [(s.file, s.offset, s.length) for s in log.skipped] == ([(path, offset, length)] if sound else [])
    assert [(d.offset, d.truncated) for d in log.damages] == ([] if sound else [(offset, False)])


def test_a_file_of_many_images_is_held_one_record_at_a_time(tmp_path):
    length = 12 * MIB  # of the image; smaller than what is skipped
    black = Summary.Value(tag="i", image=Summary.Image(encoded_image_string=bytes(length)))
    image = Event(wall_time=1.0, step=7, summary=Summary(value=[black])).SerializeToString()
    bare, size = image[: len(image) - length], len(image)
    assert image.endswith(bytes(length))
    with open(tmp_path / "events.out.tfevents.1", "wb") as file:
        tail = _tail_of_zeros(size, bare)
        for step in range(15):
            file.write(_header(size) + bare)
            file.seek(length, 1)
            file.write(tail + _frames(_point("a", step, step)))
    log, peak = _peak(tmp_path)
    assert peak < 5 * length
    assert list(log.by_step("a")) == list(range(15))
    assert (log.damages, log.skipped) == ([], [])


@pytest.mark.parametrize("block", [1, 12, 13, 60, 64, 150, 1000, 10**6])
@pytest.mark.parametrize("largest", [10**6, 200, 45])
def test_blocks_of_any_size_give_the_same_records(tmp_path, monkeypatch, block, largest):
    path, rng = tmp_path / "file", np.random.default_rng(0)
    data = [rng.bytes(size) for size in (0, 1, 45, 46, 300, 44, 200, 201, 7, 0)]
    path.write_bytes(b"".join(map(_frame, data)))
    offsets = record_offsets(path)
    monkeypatch.setattr(events, "LARGEST", largest)
    with open(path, "rb") as file:
        reader = RecordReader(file, block)
        found = dict(reader)
    expected = dict(zip(offsets, data, strict=False))
    skipped = {offset: expected[offset] for offset, _ in reader.skipped}
    assert found | skipped == expected
    assert all(len(one) > largest for one in skipped.values())
    # A record that lies in a block anyway may be given although it is large.
    assert all(len(one) <= max(largest + 16, block) for one in found.values())
    assert (reader.offset, reader.checksum) == (offsets[-1], google_crc32c.value(path.read_bytes()))


def test_a_file_that_is_cut_while_it_is_read_gives_what_came_before(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(_frames(*(_point("a", step, step) for step in range(100))))
    offsets = record_offsets(path)
    with open(path, "rb", buffering=0) as file:
        reader = RecordReader(file, block=offsets[10])
        found = []
        for offset, _ in reader:
            found.append(offset)
            if offset == offsets[3]:
                path.write_bytes(path.read_bytes()[: offsets[50]])
    assert found == offsets[:50]


def test_each_reading_of_a_growing_file_is_a_prefix_and_goes_on_where_the_last_ended(tmp_path):
    content = _frames(*(_point("a", step, step) for step in range(3000)))
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(b"")

    def write():
        with open(path, "ab", buffering=0) as file:
            for start in range(0, len(content), 331):  # records are cut anywhere
                file.write(content[start : start + 331])

    writer, log, seen = threading.Thread(target=write), None, 0
    writer.start()
    while seen < 3000:
        log = read_events(tmp_path, log)
        steps = log.series["a"].steps.tolist() if log.series else []
        assert steps == list(range(max(seen, len(steps))))
        assert all(damage.truncated for damage in log.damages)
        seen = len(steps)
    writer.join()
    assert log.damages == []


def test_a_folder_that_has_not_changed_is_not_opened_and_one_that_grew_is_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(events.time, "time_ns", lambda: 2**62)  # long after every change
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(_frames(*(_point("a", step, step) for step in range(50))))
    parsed, parse = [], events._parse
    monkeypatch.setattr(events, "_parse", lambda offset, data: parsed.append(offset) or parse(offset, data))
    log = read_events(tmp_path)
    assert len(parsed) == 50
    with monkeypatch.context() as nothing:
        nothing.setattr("builtins.open", None)
        assert read_events(tmp_path, log) is log
    with open(path, "ab") as file:
        file.write(_frames(_point("a", 50, 50), _point("a", 51, 51)))
    assert list(read_events(tmp_path, log).by_step("a")) == list(range(52))
    assert len(parsed) == 52


def _failing(*_):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("name", ["__init__", "_blocks"])
def test_a_failing_disk_is_named_and_asked_again(tmp_path, monkeypatch, name):
    monkeypatch.setattr(events.time, "time_ns", lambda: 2**62)
    path = tmp_path / "events.out.tfevents.1"
    write_events(path, [_point("a", step, step) for step in range(3)])
    log = read_events(tmp_path)
    with open(path, "ab") as file:
        file.write(_frames(_point("a", 3.0, 3)))
    with monkeypatch.context() as failing:
        failing.setattr(RecordReader, name, _failing)
        log = read_events(tmp_path, log)
        assert log == read_events(tmp_path)
    assert [damage.reason for damage in log.damages] == ["the file cannot be read (Input/output error)"]
    log = read_events(tmp_path, log)
    assert (log.by_step("a"), log.damages) == ({0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}, [])


def test_a_folder_that_cannot_be_read_is_named_and_asked_again(tmp_path, monkeypatch):
    write_events(tmp_path / "events.out.tfevents.1", [_point("a", 1.0, 1)])

    with monkeypatch.context() as failing:
        failing.setattr(Path, "glob", _failing)
        log = read_events(tmp_path)
    assert [(d.file, d.reason) for d in log.damages] == [(tmp_path, "the folder cannot be read (Input/output error)")]
    assert read_events(tmp_path, log).by_step("a") == {1: 1.0}
