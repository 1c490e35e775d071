"""Damaged folders and full disks: one sentence with the file's name, and nothing lost."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.config import prepare_folder
from runfolder.files import TEMPORARY
from runfolder.folder import RunFolder
from slurm.command import main
from tests.cases import tiny_config
from tests.holding import held_elsewhere

TINY = ["epochs=2", "max_steps=4", "model=vit_small", "model.width=16", "runtime.checkpoint_steps=2"]


def quickstart(*arguments: str) -> int:
    return main("quickstart", "", "quickstart", list(arguments))


@pytest.fixture
def finished(tmp_path) -> Path:
    assert quickstart(*TINY, f"runtime.runs={tmp_path}") == 0
    (folder,) = (tmp_path / "quickstart").iterdir()
    return folder


@pytest.mark.parametrize("content", ["", '{"metrics": ', "[]", '{"metrics": 3}', "\xff"])
def test_a_damaged_result_is_named(finished, content, capsys):
    (finished / "result.json").write_text(content, encoding="latin-1")
    assert quickstart("--resume", str(finished)) == 2
    assert f"expected the result of a run in {finished / 'result.json'}" in capsys.readouterr().err


def test_a_deleted_result_is_written_anew_from_the_last_checkpoint(finished):
    before = json.loads((finished / "result.json").read_text())
    (finished / "result.json").unlink()
    assert quickstart("--resume", str(finished)) == 0
    after = json.loads((finished / "result.json").read_text())
    assert [after[k] for k in ("weights_sha256", "metrics")] == [before[k] for k in ("weights_sha256", "metrics")]


@pytest.mark.parametrize("content", ["", "[1]", '{"attempts": null}', "{}"])
def test_a_damaged_provenance_is_set_aside_not_lost(finished, content):
    (finished / "result.json").unlink()
    (finished / "provenance.json").write_text(content)
    assert quickstart("--resume", str(finished)) == 0
    assert (finished / "provenance-damaged.json").read_text() == content
    assert len(json.loads((finished / "provenance.json").read_text())["attempts"]) == 1


@pytest.mark.parametrize("loss", [Path.unlink, lambda path: os.truncate(path, 10)])
def test_a_checkpoint_whose_record_is_gone_is_passed_over(finished, loss):
    """Else the run would finish with a table that lacks its first epochs."""
    (finished / "result.json").unlink()
    for path in finished.glob("events.out.tfevents.*"):
        loss(path)
    assert quickstart("--resume", str(finished)) == 0
    log = (finished / "log.txt").read_text()
    assert "its record events.out.tfevents" in log
    assert log.count("starts at step 0") == 2


def test_a_finished_run_is_reported_from_a_folder_that_cannot_be_written(finished, capsys):
    shutil.rmtree(finished / "lease")
    (finished / "lease").write_text("")  # root may write everywhere, but not below this
    assert quickstart("--resume", str(finished)) == 0
    assert "finished already" in capsys.readouterr().out
    (finished / "result.json").unlink()
    assert quickstart("--resume", str(finished)) == 2
    assert "expected a folder that can be written" in capsys.readouterr().err


def test_a_full_disk_keeps_the_checkpoint_before_and_leaves_no_half_file(tmp_path, capsys):
    """A real file system of one megabyte."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small file system: {mounted.stderr.strip()}")
    try:
        wide = [*TINY, "model.depth=2", f"runtime.runs={small}", "runtime.keep_checkpoints=9"]
        wide = [word for word in wide if not word.startswith(("model.width", "max_steps"))] + ["model.width=32"]
        assert quickstart(*wide) == 2
        assert "No space left on device" in capsys.readouterr().err
        (folder,) = (small / "quickstart").iterdir()
        assert not list(folder.rglob(f"*{TEMPORARY}"))
        saved = RunFolder(folder).newest_checkpoint()
        assert saved is not None
        elsewhere = tmp_path / "large" / "quickstart"
        elsewhere.mkdir(parents=True)
        shutil.copytree(folder, elsewhere / folder.name)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert quickstart("--resume", str(elsewhere / folder.name)) == 0
    assert f"continues at step {int(saved.name[5:13])}" in (elsewhere / folder.name / "log.txt").read_text()


def test_a_refused_start_leaves_the_running_runs_configuration(tmp_path):
    folder = prepare_folder(tiny_config(tmp_path))
    before = (folder / "config.yaml").read_bytes()
    with held_elsewhere(folder):
        assert quickstart("--resume", str(folder), "runtime.log_every=7") == 69
    assert (folder / "config.yaml").read_bytes() == before


def test_only_the_right_script_resumes_a_run(finished, capsys):
    assert main("cifar_vit", "", "figure4", ["--resume", str(finished)]) == 2
    assert "python experiments/quickstart.py --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typo", "meant"), [("modle", "model"), ("dta", "data"), ("optm", "optim"), ("methd", "method")]
)
def test_a_misspelt_group_is_answered_by_the_group(typo, meant, capsys):
    assert quickstart(f"{typo}=x") == 2
    assert f"nearest: {meant}" in capsys.readouterr().err
