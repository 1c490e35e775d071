"""Whatever names and texts hold, and wherever the output goes, nothing ends in a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import figures, report, tables
from tests.run_folders import ATTEMPT, configuration, curve, write_run

ROOT = Path(__file__).resolve().parents[1]
HALF = "\ud800"  # of a surrogate pair: no text in any encoding
BELL = "a\x07b\x00c\ufffe"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Half characters and control characters wherever a run folder has words."""
    root = tmp_path_factory.mktemp("odd") / "runs"
    attempts = (ATTEMPT | {"commit": f"{HALF}x", "command": BELL, "hardware": {"device": f"{HALF}{BELL}"}},)
    for seed in range(2):
        for method in ("vanilla", f"m{BELL}"):
            config = configuration(seed, method)
            writable, unnamed = config | {"method": {"name": "m"}}, {"config_hash": None}
            folder = write_run(root, writable, curve(seed, method), attempts=attempts, result=unnamed)
            del config["experiment"]
            (folder / "config.yaml").write_text(json.dumps(config))
            folder.rename(folder.with_name(os.fsdecode(b"\xfe%d" % seed) + f"{method == 'vanilla'}"))
    failure = {"kind": HALF, "reason": f"{HALF} is bad", "traceback": [HALF]}
    write_run(root, configuration(5), [70.0], finished=False, failure=failure)
    (root / "demo").rename(root / os.fsdecode(b"demo\xff"))  # which TensorBoard cannot write to
    return root


def _started(script, runs, *arguments, **options):
    command = [sys.executable, str(ROOT / "analysis" / script), "--runs", str(runs), "--no-cache", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, **options)


@pytest.mark.parametrize("form", ["md", "latex", "csv", "json"])
def test_tables_of_odd_names_are_written(odd, tmp_path, form):
    assert tables.main(["--runs", str(odd), "--no-cache", "--format", form, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    text = path.read_text(encoding="utf-8")
    assert r"demo\udcff" in text
    assert form != "json" or json.loads(text)[0]["experiment"] == "demo\udcff"


def test_figures_of_odd_names_are_drawn(odd, tmp_path):
    assert figures.main(["--runs", str(odd), "--no-cache", "--out", str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pdf", ".png"]


def test_a_page_of_odd_names_is_written(odd, tmp_path):
    assert report.main(["--runs", str(odd), "--no-cache", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"\ud800 is bad" in page
    assert "ma\ufffdb\ufffdc\ufffd" in page  # the legend


@pytest.mark.parametrize("form", ["md", "json"])
def test_an_output_of_ascii_gets_escapes(odd, form):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = _started("tables.py", odd, "--format", form, stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode("ascii")
    assert form != "json" or json.loads(said)[0]["caption"].startswith("demo\udcff: test/top1, mean ± sample")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("script", ["tables.py", "figures.py", "report.py"])
def test_a_full_output_is_one_sentence(odd, tmp_path, script):
    out = [] if script == "tables.py" else ["--out", tmp_path / "out.png"]
    with open("/dev/full", "w") as full:
        done = _started(script, odd, *out, stdout=full)
    assert (done.returncode, done.stderr.count(b"error: expected an output that can be written")) == (2, 1)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_has_gone_is_no_error(odd):
    ours, theirs = os.pipe()
    os.close(ours)
    done = _started("tables.py", odd, stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")
