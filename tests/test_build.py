"""What a fresh machine installs, and what the README promises, agree with the code."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)$")


def pins(lines) -> dict[str, str]:
    found = (PIN.match(line.strip()) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def pins_of(name: str) -> dict[str, str]:
    return pins((ROOT / name).read_text().splitlines())


def test_conda_and_pip_install_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (by_pip,) = (part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pins(by_pip) == pins_of("requirements.txt") | pins_of("requirements-test.txt")


def test_constraints_hold_every_requirement_at_its_version():
    constraints = pins_of("constraints.txt")
    for name, version in (pins_of("requirements.txt") | pins_of("requirements-test.txt")).items():
        assert constraints[name] == version


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-test.txt"):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        for line in filter(None, lines):
            assert PIN.match(line) or line.startswith("-r "), f"{name}: {line}"


def test_the_library_imports_torch_and_the_standard_library_only():
    allowed = {"torch", "tract", "__future__", *sys.stdlib_module_names}
    for path in (ROOT / "tract").rglob("*.py"):
        for name in re.findall(r"^\s*(?:from|import) ([A-Za-z_]+)", path.read_text(), re.MULTILINE):
            assert name in allowed, f"{path} imports {name}"


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("tract", "experiments|slurm|analysis"),
        ("experiments", "analysis"),
        ("slurm", "analysis"),
        ("analysis", "tract|experiments|slurm|torch"),
    ],
)
def test_imports_point_one_way(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        assert not re.search(rf"^\s*(?:from|import) (?:{forbidden})\b", path.read_text(), re.MULTILINE), path


def test_training_does_not_need_the_launcher():
    """Only the command line reaches up to ``slurm``, and only where a grid is submitted."""
    for path in (ROOT / "experiments").rglob("*.py"):
        found = re.findall(r"^(\s*)(?:from|import) slurm\b", path.read_text(), re.MULTILINE)
        assert not found or (path.name == "cli.py" and all(found)), path


def test_the_library_can_be_installed_alone(tmp_path):
    """A wheel holds the package tract and asks for torch alone."""
    source = tmp_path / "source"  # building leaves files beside what it builds
    source.mkdir()
    shutil.copytree(ROOT / "tract", source / "tract")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
    )
    if built.returncode and re.search("No matching distribution|Connection|Temporary failure", built.stderr):
        pytest.skip("no package index to fetch the build tool setuptools from")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        needs = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tract"}
    assert [re.match("[a-z]+", need)[0] for need in needs] == ["torch"]


def test_versions_agree():
    import tract

    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert tract.__version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert f"## {tract.__version__}" in changelog
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_readme_names_files_and_targets_that_exist():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python ((?:experiments|analysis|benchmarks)/\w+\.py)", readme):
        assert (ROOT / script).is_file(), script
