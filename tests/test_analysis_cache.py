"""What is read through the cache is what is read without it, whatever has happened to the files."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from analysis import cache as cache_module
from analysis import events, tables
from analysis.cache import Cache, default_folder, pack, unpack
from analysis.events import masked_crc32c, read_events
from analysis.load import load_runs
from benchmarks import reading
from tests.run_folders import configuration, curve, event_file, record_offsets, write_run

ROOT = Path(__file__).parents[1]
NAMES = [f"events.out.tfevents.{stamp}.host" for stamp in (5, 5.5, 7, 10)] + ["tfevents"]


def _frame(event):
    data = event.SerializeToString()
    header = len(data).to_bytes(8, "little")
    return header + masked_crc32c(header).to_bytes(4, "little") + data + masked_crc32c(data).to_bytes(4, "little")


def _point(tag, step, value):
    return _frame(
        Event(wall_time=value, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
    )


def _start(step):
    return _frame(Event(wall_time=3.0, step=step, session_log=SessionLog(status=SessionLog.START)))


def _newer(step, named):
    """A point in the newer format, whose plug-in is named in the first point of a file only."""
    event = Event(wall_time=4.0, step=step, summary=scalar_pb("newer", float(step)))
    if not named:
        event.summary.value[0].metadata.CopyFrom(SummaryMetadata())
    return _frame(event)


def _facts(log):
    series = [(tag, s.steps.tobytes(), s.values.tobytes(), s.wall_times.tobytes()) for tag, s in log.series.items()]
    extents = [(extent.identity, extent.offset, extent.checksum, extent.plugins) for extent in log.extents]
    return log.files, series, log.damages, log.skipped, extents


_STEPS = st.integers(0, 6)
_RECORDS = st.one_of(
    st.builds(_point, st.sampled_from("ab"), _STEPS, st.sampled_from([1.0, 2.0, 3.0, float("nan")])),
    st.builds(_start, _STEPS),
    st.builds(_newer, _STEPS, st.booleans()),
    st.just(_frame(Event(wall_time=1.0, file_version="x" * 60))),  # more than LARGEST below
)
_PLACES = st.floats(0, 1)
_FILES = st.sampled_from(NAMES)
_CHANGES = st.one_of(
    st.tuples(st.just("append"), _FILES, st.lists(_RECORDS, min_size=1, max_size=4).map(b"".join)),
    st.tuples(st.just("append part"), _FILES, st.builds(lambda r, at: r[: int(at * len(r))], _RECORDS, _PLACES)),
    st.tuples(st.sampled_from(["cut", "cut as when resuming", "flip", "change a byte to zero"]), _FILES, _PLACES),
    st.tuples(st.sampled_from(["delete", "touch", "resume"]), _FILES, _RECORDS),
    st.tuples(st.just("replace"), _FILES, st.lists(_RECORDS, max_size=3).map(b"".join)),
)


def _whole_records(path, place):
    """A record's end, as far into the file as ``place`` says."""
    content = path.read_bytes()
    try:
        ends = [end for end in record_offsets(path) if end <= len(content)]
    except Exception:  # a damaged file has no such
        return int(place * len(content))
    return ends[int(place * (len(ends) - 1))]


def _change(folder, what, name, detail):
    path = folder / name
    if what in ("append", "append part"):
        with open(path, "ab") as file:
            file.write(detail)
        return
    if not path.exists():
        return
    content = path.read_bytes()
    at = int(detail * (len(content) - 1)) if isinstance(detail, float) and content else 0
    if what == "cut":
        os.truncate(path, at)
    elif what == "cut as when resuming":  # a new file with the old name
        (folder / "beside").write_bytes(content[: _whole_records(path, detail)])
        os.replace(folder / "beside", path)
    elif what in ("flip", "change a byte to zero") and content:
        changed = bytearray(content)
        changed[at] = changed[at] ^ 1 if what == "flip" else 0
        with open(path, "r+b") as file:  # the same inode
            file.write(changed)
    elif what == "delete":
        path.unlink()
    elif what == "touch":
        path.touch()
    elif what == "replace":
        path.write_bytes(detail)
    elif what == "resume":  # every file is cut to whole records and a new one begins
        os.truncate(path, _whole_records(path, 1.0))
        (folder / NAMES[-2]).write_bytes(_start(3) + detail)


def _cut_and_then_only_its_sound_part(name=NAMES[-1]):
    """The size is then that of what was read, but nothing is missing any more."""
    changes = ("append", name, _point("a", 1, 1.0) * 2), ("append part", name, _point("a", 2, 1.0)[:9])
    later = ("append", NAMES[0], _point("a", 3, 3.0)), ("replace", name, _point("a", 1, 1.0) * 2)
    return [(changes[0], False), (changes[1], False), (later[0], True), (later[1], True)]


@pytest.mark.parametrize("clock", ["hours lie between changes", "all happens within a tick", "as it is"])
@given(history=st.lists(st.tuples(_CHANGES, st.booleans()), min_size=1, max_size=12))
@example(history=_cut_and_then_only_its_sound_part())
@settings(max_examples=200, deadline=None)
def test_cached_is_fresh_after_any_history(clock, history):
    ticks, identity = iter(range(10**6)), events._identity
    with tempfile.TemporaryDirectory() as root, mock.patch.object(events, "LARGEST", 60):
        folder, cache = Path(root, "run"), Cache(Path(root, "cache"))
        folder.mkdir()
        patches = {
            "hours lie between changes": mock.patch.object(events.time, "time_ns", return_value=2**62),
            "all happens within a tick": mock.patch.object(events, "_identity", lambda f: (f.st_size, 0, 0, 0)),
            "as it is": mock.patch.object(events, "_identity", identity),
        }
        with patches[clock]:
            for change, reads in [*history, (("touch", NAMES[0], b""), True)]:
                _change(folder, *change)
                for path in folder.iterdir() if clock == "hours lie between changes" else ():
                    if path.name == change[1] or change[0] == "resume":
                        os.utime(path, ns=(0, next(ticks)))
                if reads:
                    assert _facts(cache.read_events(folder)) == _facts(read_events(folder))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs", configuration(), curve(0, "vanilla"))


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "made" / "cache")


@pytest.fixture
def opened(monkeypatch):
    """The event files that are opened for reading records, long after they were written."""
    monkeypatch.setattr(events.time, "time_ns", lambda: 2**62)
    seen, make = [], events.RecordReader.__init__
    monkeypatch.setattr(events.RecordReader, "__init__", lambda *a, **k: seen.append(a[1].name) or make(*a, **k))
    return seen


def test_the_second_reading_opens_no_event_file_and_writes_nothing(run, cache, opened):
    first, kept = cache.read_events(run), cache.path_of(run).stat()
    assert opened == [str(event_file(run))]
    assert _facts(cache.read_events(run)) == _facts(first)
    assert opened == [str(event_file(run))]
    assert cache.path_of(run).stat() == kept
    assert _facts(first) == _facts(read_events(run))


def test_a_file_that_was_just_written_is_read_again_although_it_looks_the_same(run, cache, monkeypatch):
    monkeypatch.setattr(events, "_identity", lambda facts: (facts.st_size, facts.st_mtime_ns, facts.st_ino))
    cache.read_events(run)
    path = event_file(run)
    was, content = path.stat(), bytearray(path.read_bytes())
    content[record_offsets(path)[3] + 20] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert cache.read_events(run).damages == read_events(run).damages != []


def test_what_is_kept_comes_back_and_nothing_else_is_taken_for_it(run, tmp_path):
    log = read_events(run)
    content = pack(log, run)
    assert _facts(unpack(content, run)) == _facts(log)
    assert unpack(content, tmp_path) is None
    for size in range(0, len(content), 97):
        assert unpack(content[:size], run) is None
    for position in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        assert unpack(bytes(damaged), run) is None


def test_what_is_kept_takes_24_bytes_a_point(run):
    log = read_events(run)
    points = sum(len(series) for series in log.series.values())
    one_more = read_events(run)
    for series in one_more.series.values():
        series.append(0, 0.0, 0.0)
    grown = len(pack(one_more, run)) - len(pack(log, run))
    assert grown == 24 * len(log.series)
    assert len(pack(log, run)) < 24 * points + 1000


def _spoil_content(path, cache):
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


def _spoil_empty(path, cache):
    path.write_bytes(b"")


def _spoil_folder(path, cache):
    path.unlink()
    path.mkdir()


def _spoil_no_folder(path, cache):
    shutil.rmtree(cache.folder)
    cache.folder.write_text("a file")


def _spoil_other(path, cache):
    """The file of another folder, with other points, in this one's place."""
    other = write_run(cache.folder / "runs", configuration(seed=1), curve(1, "vanilla"))
    path.write_bytes(pack(read_events(other), other))


@pytest.mark.parametrize("spoil", [_spoil_content, _spoil_empty, _spoil_folder, _spoil_no_folder, _spoil_other])
def test_a_spoiled_cache_is_silently_not_used(run, cache, capsys, opened, spoil):
    expected = _facts(read_events(run))
    cache.read_events(run)
    spoil(cache.path_of(run), cache)
    opened.clear()
    assert _facts(cache.read_events(run)) == _facts(cache.read_events(run)) == expected
    assert opened[0] == str(event_file(run))
    assert capsys.readouterr() == ("", "")


def test_another_version_is_not_used_and_is_replaced(run, cache, opened):
    cache.read_events(run)
    name, _, rest = cache.path_of(run).read_bytes().split(b" ", 2)
    cache.path_of(run).write_bytes(b" ".join([name, b"another", rest]))
    cache.read_events(run)
    assert len(opened) == 2
    cache.read_events(run)
    assert len(opened) == 2


def test_the_version_changes_with_the_code_that_reads(tmp_path, monkeypatch):
    changed = tmp_path / "events.py"
    changed.write_text(Path(events.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(events, "__file__", str(changed))
    assert cache_module._version() != cache_module._VERSION


@pytest.mark.parametrize(("number", "sentences"), [(errno.ENOSPC, 1), (errno.EACCES, 0)])
def test_a_failing_disk_is_one_sentence_and_no_half_file(tmp_path, cache, capsys, monkeypatch, number, sentences):
    for seed in range(3):
        write_run(tmp_path / "runs", configuration(seed=seed), curve(seed, "vanilla"))
    expected = load_runs(tmp_path / "runs")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    runs = load_runs(tmp_path / "runs", cache=cache)
    assert [_facts(run.events) for run in runs["demo"]] == [_facts(run.events) for run in expected["demo"]]
    said = capsys.readouterr().err.splitlines()
    assert [line.count(str(cache.folder)) for line in said] == [1] * sentences
    assert list(cache.folder.iterdir()) == []


def test_two_processes_use_one_cache_at_once(tmp_path, cache):
    for seed in range(4):
        write_run(tmp_path / "runs", configuration(seed=seed), curve(seed, "vanilla"))
    folders = sorted((tmp_path / "runs" / "demo").iterdir())
    code = (
        "import sys; from pathlib import Path; from analysis.cache import Cache, pack\n"
        "for _ in range(40):\n"
        "    for folder in map(Path, sys.argv[2:]):\n"
        "        log = Cache(Path(sys.argv[1])).read_events(folder)\n"
        "        Cache(Path(sys.argv[1]))._put(folder, log)\n"
        "        assert sum(map(len, log.series.values())) == 60 and not log.damages\n"
    )
    command = [sys.executable, "-c", code, str(cache.folder), *map(str, folders)]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert {path.name for path in cache.folder.iterdir()} == {cache.path_of(folder).name for folder in folders}
    assert all(_facts(cache.read_events(folder)) == _facts(read_events(folder)) for folder in folders)


def test_runs_are_the_same_with_and_without_a_cache(run, cache):
    plain = load_runs(run.parents[1])
    for _ in range(2):
        cached = load_runs(run.parents[1], cache=cache)
        assert dataclasses.replace(cached["demo"][0], events=None) == dataclasses.replace(plain["demo"][0], events=None)
        assert _facts(cached["demo"][0].events) == _facts(plain["demo"][0].events)


def test_a_copy_of_a_run_elsewhere_has_an_entry_of_its_own(run, cache):
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    assert cache.read_events(copy).files[0].parent == copy
    assert cache.read_events(run).files[0].parent == run
    assert len(list(cache.folder.iterdir())) == 2


def test_a_run_of_no_points_keeps_nothing(tmp_path, cache):
    (tmp_path / "empty").mkdir()
    assert cache.read_events(tmp_path / "empty").files == ()
    assert not cache.folder.exists()


def test_the_default_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for given_, expected in (("/x", "/x"), ("", "/home/me/.cache"), ("relative", "/home/me/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", given_)
        assert default_folder() == Path(expected, "tract-analysis")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path("/home/me/.cache/tract-analysis")


def test_the_commands_keep_what_they_read_where_they_are_told(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("analysis.command.default_folder", lambda: tmp_path / "default")
    command = ["--runs", str(run.parents[1]), "--format", "json"]
    said = []
    for flags in (["--no-cache"], ["--cache", str(tmp_path / "chosen")], ["--cache", str(tmp_path / "chosen")], []):
        assert tables.main([*command, *flags]) == 0
        said.append(json.loads(capsys.readouterr().out))
        kept = {name: (tmp_path / name).exists() for name in ("chosen", "default")}
        assert kept == {"chosen": flags != ["--no-cache"], "default": not flags}
    assert said == said[:1] * 4
    assert tables.main([*command, "--cache", "here", "--no-cache"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_the_benchmark_compares_the_same_points(tmp_path):
    for seed in range(2):
        reading.make_run(tmp_path / "runs" / "demo" / f"s{seed}", seed, epochs=3, train_points=10)
    assert [reader(tmp_path) for reader in reading.READERS.values()] == [2 * (3 * 8 + 10)] * 3
