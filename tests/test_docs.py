"""What the pages say is true: links lead somewhere, commands exist, and marked blocks run as they stand.

CONTRIBUTING.md describes the marks of a block (``test``, ``exit=N``, ``file=PATH``).
"""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import CONF, compose_config, parse_overrides
from experiments.grid import grids, load_grid, points
from experiments.training.run import run
from experiments.tuning import UntunedError
from slurm.profile import load_cluster
from tests.cases import tiny_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py")) and path.name != "tests"]
BLOCK = re.compile(r"^( *)```(\w+)([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
EXAMPLE = "experiments/mlp_digits.py"  # the script of a made-up family


def marked(mark):
    """(language, marks, content) of the blocks with a mark."""
    blocks = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            marks = dict(word.partition("=")[::2] for word in block[3].split())
            if mark in marks:
                line = page.read_text().count("\n", 0, block.start()) + 1
                blocks.append(pytest.param(block[2], marks, block[4], id=f"{page.name}:{line}"))
    return blocks


def commands_of(page):
    """Every command of a page as words, from blocks for a console and from `code` in a sentence."""
    text = page.read_text()
    consoles = [block for block in BLOCK.finditer(text) if block[2] == "console" and "exit=" not in block[3]]
    lines = [line for block in consoles for line in block[4].splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", BLOCK.sub("", text))]
    for line in lines:
        with contextlib.suppress(ValueError):  # a formula with an apostrophe
            words = shlex.split(line, comments=True)
            if {"python", "make", "torchrun"} & set(words):
                yield words


def is_placeholder(word):
    return any(part.isupper() and len(part) > 1 for part in re.split(r"\W", word))


# -- links ------------------------------------------------------------------------------------


def anchors(page):
    """As GitHub makes them of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == set(re.findall(r"\(docs/(\w+\.md)\)", readme))


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# -- commands ---------------------------------------------------------------------------------


@functools.cache
def help_of(script):
    """What a script says to --help, with its subcommands'."""
    said = printed(script, "--help")
    commands = {"slurm/status.py": ["watch", "show", "logs", "cancel", "retry"], "slurm/testbed.py": ["up", "down"]}
    return said + "".join(printed(script, command, "--help") for command in commands.get(script, []))


def printed(script, *words):
    return ran(ROOT / script, *words)[1]


def ran(script, *words):
    """The exit code of a script and what it prints; in this process, which has imported everything."""
    before, said, code = (sys.argv, sys.path), io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), 0
    sys.argv, sys.path = [str(script), *words], sys.path.copy()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv, sys.path = before
    said.seek(0)
    return code, said.read()


def check_keys(experiment, words):
    """The keys and values of a command are those of its experiment, grids and clusters."""
    choices = parse_overrides([word for word in words if re.match(r"[\w.]+=", word)])
    assert {*choices.pop("grid", [])} <= {*grids(experiment)}
    assert all(isinstance(value, int) for value in choices.pop("jobs", []))
    cluster = {key: choices.pop(key)[0] for key in list(choices) if key.startswith("cluster.")}
    load_cluster(None, {key.removeprefix("cluster."): value for key, value in cluster.items()})
    for position in range(max(map(len, choices.values()), default=0)):
        with contextlib.suppress(UntunedError):  # runs of the step before, which no page has made
            compose_config(experiment, {key: values[position % len(values)] for key, values in choices.items()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_scripts_flags_keys_and_targets_that_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands_of(page):
        if "make" in words:
            named = [word for word in words[words.index("make") + 1 :] if "=" not in word]
            assert all(is_placeholder(word) or word in targets for word in named), words
            continue
        script = next((word for word in words if word.endswith(".py")), "SCRIPT")
        if is_placeholder(script):
            continue
        script, given = script.replace(EXAMPLE, "experiments/quickstart.py"), words[words.index(script) + 1 :]
        assert (ROOT / script).is_file(), words
        said = help_of(script)
        for word in given:
            if word.startswith("-"):
                assert re.search(rf"(?<![\w-]){word}(?![\w-])", said), words
        if given and re.fullmatch(r"[a-z_]+", given[0]):
            assert given[0] in said, words
        if (CONF / f"{Path(script).stem}.yaml").is_file():
            check_keys(Path(script).stem, given)


def test_the_readme_counts_the_runs_of_its_grids():
    row = re.compile(r"\| `python experiments/(\w+)\.py --\w+(?: grid=(\w+))?` \| (\d+) \|")
    rows = row.findall((ROOT / "README.md").read_text())
    assert len(rows) == 15
    for experiment, grid, runs in rows:
        script = (ROOT / "experiments" / f"{experiment}.py").read_text()
        grid = grid or re.search(r'grid="(\w+)"', script)[1]
        assert len(points(load_grid(grid), {})) == int(runs), grid


# -- blocks that are run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like a checkout, in which four small runs of the quickstart are finished."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in CODE:
        (folder / path.name).symlink_to(path)
    for method in ("vanilla", "tract"):
        for seed in (0, 1):
            run(tiny_config(folder / "runs", method, seed=seed))
    return folder


def shell(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    environment.pop("XDG_CACHE_HOME", None)
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("language", "marks", "content"), marked("test"))
def test_marked_blocks_run_as_they_stand(folder, monkeypatch, language, marks, content):
    if language == "python":
        exec(compile(content, "example", "exec"), {})
        return
    monkeypatch.chdir(folder)
    for command in content.splitlines():
        program, *words = shlex.split(command, comments=True)
        code, said = ran(*words)
        assert (program, code) == ("python", int(marks.get("exit", 0))), f"{command}\n{said}"


def test_the_family_and_the_model_of_the_page_train(tmp_path):
    """Written into a copy of the code, where nothing else is changed."""
    for path in CODE:
        shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    files = [(marks["file"], content) for _, marks, content in (block.values for block in marked("file"))]
    assert len(files) == 4
    for name, content in files:
        (tmp_path / name).write_text(content)
    quickstart = (ROOT / "experiments" / "quickstart.py").read_text()
    (tmp_path / EXAMPLE).write_text(quickstart.replace('"quickstart"', '"mlp_digits"'))
    planned = shell(f"python {EXAMPLE} --dry-run", tmp_path)
    assert "6 runs: 6 missing" in planned.stdout, planned.stderr
    trained = shell(f"python {EXAMPLE} method=tract model.width=64 max_steps=3", tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "(1)" in printed("analysis/tables.py", "--runs", str(tmp_path / "runs"), "--experiment", "mlp_digits")
