"""What lies where in a run folder, and which run it starts from."""

import os
from pathlib import Path

import pytest

from runfolder.folder import RunFolder, newest_first, step_of

NAME = "digits-vit_small-adam-20ep-tract0.1-s0-01234567"


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "runs" / "demo" / NAME)


def test_where_a_folder_belongs_is_in_its_path(folder, tmp_path, monkeypatch):
    assert (folder.name, folder.experiment, folder.runs) == (NAME, "demo", tmp_path / "runs")
    assert folder.submissions == tmp_path / "runs" / "demo" / "slurm"
    folder.path.mkdir(parents=True)
    for place, relative in ((tmp_path, f"runs/demo/{NAME}"), (folder.path.parent, NAME), (folder.path, ".")):
        monkeypatch.chdir(place)
        own = RunFolder(relative)
        assert (own.experiment, own.runs, own.submissions) == (folder.experiment, folder.runs, folder.submissions)
        assert own.absolute() == folder


def test_a_folder_is_a_path_to_whoever_takes_one(folder):
    assert (os.fspath(folder), str(folder), Path(folder)) == (str(folder.path), str(folder.path), folder.path)
    assert folder / "anything" == folder.path / "anything"
    assert len({folder, RunFolder(str(folder)), RunFolder(folder)}) == 1
    assert sorted([RunFolder("b"), RunFolder("a")]) == [RunFolder("a"), RunFolder("b")]


def test_everything_has_a_place_of_its_own_in_the_folder(folder):
    names = ["config", "provenance", "result", "progress", "failure", "cancelled", "log", "output"]
    names += ["lease", "claims", "attempts", "checkpoints"]
    places = [getattr(folder, name) for name in names]
    assert len(set(places)) == len(names)
    assert {place.parent for place in places} == {folder.path}


def test_event_files_are_tensorboards_by_name(folder):
    folder.path.mkdir(parents=True)
    for name in ("events.out.tfevents.2.host.1.0", "events.out.tfevents.1.host.2.0", "events.txt", "log.txt"):
        (folder / name).touch()
    assert [path.name[20] for path in folder.events] == ["1", "2"]


def test_the_newest_checkpoint_has_the_highest_step(folder):
    assert (folder.newest_checkpoint(), folder.last_step()) == (None, 0)
    folder.checkpoints.mkdir(parents=True)
    for name in ("step-90-ff.pt", "step-100-aa.pt", "step-20-00.pt", "other.pt", "step-500-ff.pt.1.tmp"):
        (folder.checkpoints / name).touch()
    (folder.checkpoints / "step-900-ff.pt").mkdir()  # no file
    assert [step_of(path) for path in newest_first(folder.checkpoints)] == [100, 90, 20]
    assert (folder.newest_checkpoint().name, folder.last_step()) == ("step-100-aa.pt", 100)


@pytest.mark.parametrize(
    ("start_from", "place"),
    [
        (None, None),
        (5, None),
        ("timm:vit_small_patch16_224", None),
        ("weights.pt", None),
        ("elsewhere/weights.pth", None),
        ("~/weights.pth", None),
        (NAME, "runs/demo"),
        (f"other/{NAME}", "runs/other"),
        (f"../archive/{NAME}", "archive"),
        (f"~/kept/other/{NAME}", "home/kept/other"),
        (f"~nobody-at-all/{NAME}", "runs/~nobody-at-all"),
    ],
)
def test_each_form_of_start_from_leads_to_one_place(folder, tmp_path, monkeypatch, start_from, place):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    start = folder.start(start_from)
    assert (start and Path(os.path.normpath(start))) == (place and tmp_path / place / NAME)


def test_an_absolute_start_is_itself_and_a_relative_folder_starts_from_the_same_runs(folder, tmp_path, monkeypatch):
    assert folder.start(str(tmp_path / "far" / NAME)) == RunFolder(tmp_path / "far" / NAME)
    monkeypatch.chdir(tmp_path)
    assert RunFolder(f"runs/demo/{NAME}").start(f"other/{NAME}") == folder.start(f"other/{NAME}")
