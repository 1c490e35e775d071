"""What a fresh machine installs agrees with the code, and imports point one way."""

import ast
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


# -- floors -----------------------------------------------------------------------------

# From the bottom up; what a module imports of the project lies on its own floor or below. A name stands for
# all modules below it that no longer name fits.
FLOORS = [
    ["runfolder"],
    ["tract"],
    ["experiments.config", "experiments.grid", "experiments.tuning", "experiments.ranks", "experiments.randomness"],
    ["experiments.models"],
    ["experiments.tasks"],
    ["experiments.data"],
    ["experiments.training"],
    ["slurm"],
    ["experiments"],  # the scripts
    ["analysis"],
    ["benchmarks"],
]
# beside Python's own; triton comes with torch for CUDA
LIBRARIES = {"runfolder": {"numpy", "yaml"}, "tract": {"torch", "triton"}}
ALONE = {"tract": set(), "analysis": {"runfolder"}}  # what of the project they import, whatever their floor


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions; ``from A import B`` may be a module or a name in one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(module: str) -> int:
    """The floor of a module; -1 outside the project."""
    fits = [
        (len(name), floor)
        for floor, names in enumerate(FLOORS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    return max(fits, default=(0, -1))[1]


def modules() -> list[tuple[str, Path]]:
    tops = {name.partition(".")[0] for names in FLOORS for name in names}
    paths = sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in paths]


def test_imports_run_down_only():
    """Every import counts, also inside a function, without exemption."""
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        for name in imports_of(path)
        if floor_of(name) > floor_of(module)
    ]
    assert not wrong


@pytest.mark.parametrize("package", ALONE)
def test_what_stands_alone_imports_nothing_else_of_the_project(package):
    tops = {module.partition(".")[0] for module, _ in modules()}
    for module, path in modules():
        if module.partition(".")[0] == package:
            found = {name.partition(".")[0] for name in imports_of(path)}
            assert found & tops <= ALONE[package] | {package}, module


@pytest.mark.parametrize("package", LIBRARIES)
def test_what_is_imported_by_all_needs_few_libraries(package):
    allowed = {package, *LIBRARIES[package], *sys.stdlib_module_names}
    for module, path in modules():
        if module.partition(".")[0] == package:
            assert {name.partition(".")[0] for name in imports_of(path)} <= allowed, module


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


def test_every_package_of_the_library_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "tract").rglob("__init__.py")}
    assert set(listed) == found


def test_versions_agree():
    import tract

    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert tract.__version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert f"## {tract.__version__}" in changelog
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
