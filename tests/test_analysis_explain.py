"""A number leads to its runs, and its commands make the same numbers again."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from analysis import tables
from experiments.training.run import run
from slurm.command import main
from tests.cases import tiny_config
from tests.run_folders import ATTEMPT, configuration, curve, write_run

PATCHED = ATTEMPT | {"dirty": True, "diff": "diff-01234567.patch", "commit": "f" * 40, "world_size": 4}


@pytest.fixture
def runs(tmp_path):
    """Two networks, two methods, two seeds; one run took two attempts on other code."""
    for model in ("big", "small"):
        for method in ("vanilla", {"name": "tract", "lambda_": 0.1}):
            for seed in range(2):
                patched = (model, seed) == ("big", 1) and method != "vanilla"
                attempts = [ATTEMPT, PATCHED] if patched else [ATTEMPT]
                config = configuration(seed, method, model=model)
                write_run(tmp_path, config, curve(seed, model), attempts=attempts, result={"seconds": 1800.0})
    return tmp_path


def explained(capsys, runs, cell, *more):
    assert tables.main(["--runs", str(runs), "--explain", cell, *more]) == 0
    return capsys.readouterr().out


def test_the_runs_behind_a_number_and_their_origins(runs, capsys):
    text = explained(capsys, runs, "big/TRACT")
    assert text.startswith("**big / tract: ")
    first, second = [line.split("|")[1:-1] for line in text.splitlines() if "-tract-s" in line and line.startswith("|")]
    for seed, words in enumerate((first, second)):
        folder = Path(words[2].strip())
        assert json.loads((folder / "result.json").read_text())["metrics"]["test/top1"] == pytest.approx(
            curve(seed, "big")[-1]
        )
        assert words[0].strip() == str(seed)
        assert float(words[1]) == round(curve(seed, "big")[-1], 2)
    assert [word.strip() for word in first[3:6]] == ["1", "0.5", "0123456789ab"]
    changed = "ffffffffffff with uncommitted changes diff-01234567.patch"
    assert [word.strip() for word in second[3:6]] == ["2", "2", f"0123456789ab; {changed}"]
    assert "2.5 GPU-hours in all" in text
    commands = re.search(r"```\n(.*)```", text, re.S)[1].splitlines()
    places = [commands.index(f"git checkout {commit}") for commit in ("0123456789abcdef", "f" * 40)]
    assert places == [0, 4]
    assert commands[5].startswith("git apply ")
    assert commands[5].endswith("/diff-01234567.patch")


def test_strict_fails_on_doubts_also_with_a_cell_explained(runs, capsys):
    assert tables.main(["--runs", str(runs), "--explain", "big / tract", "--strict"]) == 1  # of two commits
    assert capsys.readouterr().out.startswith("**big / tract: ")


def test_a_cell_whose_row_has_a_slash_is_found(tmp_path, capsys):
    for start in ("deit/a-0", "deit/b-0"):
        for method in ("vanilla", "tract"):
            write_run(tmp_path, configuration(method=method, start_from=start), curve(0, start + method))
    for words in ("deit/a-0 / tract", "Tract / deit/a-0"):
        assert explained(capsys, tmp_path, words).startswith("**deit/a-0 / tract: ")


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("tract", "expected --explain to name one cell, got tract, which fits 2: big / tract; small / tract."),
        ("bigg / tract", "no cell bigg / tract; nearest: big / tract"),
        ("", "no cell ; nearest: "),
    ],
)
def test_a_name_of_no_cell_or_of_several_is_one_sentence(runs, capsys, cell, sentence):
    assert tables.main(["--runs", str(runs), "--explain", cell]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_a_gap_of_the_papers_tables_has_no_run(runs, capsys):
    assert "No run is behind it." in explained(capsys, runs, "VGG-11 / TrAct", "--table", "1")
    assert "0.67" in explained(capsys, runs, "table 5 / TrAct", "--table", "all", *_runtime(runs))


def _runtime(folder):
    times = {
        name: {"vanilla": [1.0], "tract": [1.0], "config": {}} for name in ("cifar_vit", "deit_small", "deit_base")
    }
    path = folder.parent / "runtime.json"
    path.write_text(json.dumps({"settings": times, "packages": {}, "hardware": {}}))
    return ["--runtime", str(path)]


def test_its_commands_make_the_same_run_again(tmp_path, capsys, monkeypatch):
    before = run(tiny_config(tmp_path / "runs", "tract", max_steps=3))
    commands = explained(capsys, tmp_path / "runs", "tract").split("```")[1].splitlines()
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)
        if words[:1] in (["mkdir"], ["cp"]):
            subprocess.run(words, check=True)
        elif words[:1] == ["python"]:
            assert words[1] == "experiments/quickstart.py"
            assert main("quickstart", "", "", words[2:]) == 0
    (result,) = (tmp_path / "again").rglob("result.json")
    assert json.loads(result.read_text())["weights_sha256"] == before["weights_sha256"]
