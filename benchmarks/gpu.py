"""All that waits for a GPU, in one go: tests, digests, overheads, throughput, and which bars hold.

python benchmarks/gpu.py                           on the GPU of this machine, about twelve minutes
python benchmarks/gpu.py --dry-run                 what would be run, for how long at most
python benchmarks/gpu.py --only digests overhead   some stages
python benchmarks/gpu.py --device cpu              tiny sizes, to see that it works

The stages run in order of what is wanted first. Each has a time limit and processes of its own; one that fails or takes
too long leaves what it has found, and the others follow. OUT/gpu.json and OUT/gpu.md are written anew after every
result. Images are synthetic. Nothing else should run on the GPU meanwhile.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from runfolder.errors import EXIT_BAD_INPUT
from runfolder.files import write_atomically, write_json

ROOT = Path(__file__).resolve().parents[1]
_TAIL = 2000  # characters of a process's words that are kept
Figure = tuple[str, object]  # (what, its value)


@dataclass(frozen=True)
class Bar:
    """A figure that is to be at most (or at least) so much."""

    figure: str
    limit: object
    at_least: bool = False

    def verdict(self, figures: dict[str, object]) -> str:
        """Held, missed or not measured."""
        value = figures.get(self.figure)
        if value is None:
            return "not measured"
        if value == self.limit:
            return "held"
        return "held" if not isinstance(self.limit, str) and (value > self.limit) is self.at_least else "missed"

    def __str__(self) -> str:
        if isinstance(self.limit, str):
            return self.limit
        return f"{'≥' if self.at_least else '≤'} {_shown(self.figure, self.limit)}"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: on a GPU, or to see that it works."""

    steps: tuple[int, int]  # of a digest: where it is stopped, and the end
    harness: tuple[str, dict]  # setting and overrides
    images: int  # of an epoch
    turns: int
    workers: int
    together: tuple[int, ...]
    digests: dict[str, tuple[str, dict]]
    overheads: dict[str, tuple[str, dict, dict[str, int], float]]  # ..., sizes, the bar


def _blocks(blocks: int, steps: int) -> dict[str, int]:
    return {"blocks": blocks, "steps": steps, "warmup": max(1, steps // 2), "batches": 4}


_CIFAR, _IMAGENET, _GRAPH = _blocks(12, 20), _blocks(8, 5), {"compile": "graph"}
GPU = Sizes(
    steps=(17, 40),
    harness=("cifar_resnet", {}),
    images=128 * 150,
    turns=3,
    workers=min(8, (os.cpu_count() or 2) - 1),
    together=(1, 2, 4, 8),
    digests={
        "ResNet fp32": ("cifar_resnet", {}),
        "ViT fp32": ("cifar_vit", {}),
        "ViT fp16": ("cifar_vit", {"precision": "fp16"}),
        "ViT fp32, graph": ("cifar_vit", _GRAPH),
    },
    overheads={
        "CIFAR ViT": ("cifar_vit", {}, _CIFAR, 0.02),
        "CIFAR ViT, graph": ("cifar_vit", _GRAPH, _CIFAR, 0.007),
        "CIFAR ResNet-18": ("cifar_resnet", {}, _CIFAR, 0.01),
        "ResNet-50 at 256": ("imagenet_resnet50", {"batch_size": 256}, _IMAGENET, 0.007),
        "DeiT-S": ("deit_small", {}, _IMAGENET, 0.008),
        "DeiT-B": ("deit_base", {}, _IMAGENET, 0.003),
    },
)
_TINY = {"batch_size": 8, "runtime.threads": 1}
CPU = Sizes(
    steps=(2, 3),
    harness=("quickstart", {"model": "resnet_small", **_TINY}),
    images=16,
    turns=1,
    workers=0,
    together=(1, 2),
    digests={"ResNet fp32": ("quickstart", {"model": "resnet_small", **_TINY})},
    overheads={"CIFAR ViT": ("quickstart", {"model": "vit_small", **_TINY}, _blocks(2, 1), 0.02)},
)
EXTRA_MIB = 64
BARS = [
    Bar("CUDA tests", "passed"),
    *(Bar(f"{how} {name}", "the same") for name in GPU.digests for how in ("two runs of", "a stopped run of")),
    *(
        bar
        for name, (*_, limit) in GPU.overheads.items()
        for bar in (Bar(f"overhead of {name}", limit), Bar(f"MiB more for {name}", EXTRA_MIB))
    ),
    Bar("harness / plain script", 3.0, at_least=True),
]


class FailedError(Exception):
    """A process failed or ran out of time; the message has its last words."""


@dataclass
class Run:
    """What has been found so far, and how processes are started."""

    device: str
    sizes: Sizes
    folder: Path
    end: float = 0.0  # of the present stage's time
    notes: list[str] = field(default_factory=list)

    def command(self, *words: str) -> str:
        """What a command of the project prints, without a bar of its own."""
        return self._outputs([[sys.executable, *words]])[0]

    def answers(self, name: str, *options: dict) -> list:
        """The answers of processes that run side by side; see ``gpu_work.py``."""
        script = str(ROOT / "benchmarks" / "gpu_work.py")
        given = [json.dumps({"device": self.device} | each) for each in options]
        printed = self._outputs([[sys.executable, script, name, each] for each in given])
        return [json.loads(text.strip().splitlines()[-1]) for text in printed]

    def _outputs(self, commands: list[list[str]]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / str(number) for number in range(len(commands))]
            started = []
            try:
                for command, output in zip(commands, outputs, strict=True):
                    with output.open("wb") as file:
                        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True, "cwd": ROOT}
                        started.append(subprocess.Popen(command, **options))
                for process in started:
                    process.wait(max(0.0, self.end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise FailedError("out of time: " + _tail(outputs)) from None
            finally:
                for process in started:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            if any(process.returncode for process in started):
                raise FailedError(_tail(outputs))
            return [output.read_text(errors="replace") for output in outputs]


def _tail(outputs: list[Path]) -> str:
    return "\n".join(output.read_text(errors="replace").strip()[-_TAIL:] for output in outputs if output.exists())


# -- stages: each yields its figures as they arrive ------------------------------------------------


def tests(run: Run) -> Iterator[Figure]:
    """What the tests say that need a GPU; on the CPU they say why they are skipped."""
    try:
        words = run.command("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_tract_cuda.py")
    except FailedError:
        yield "CUDA tests", "failed"
        raise
    run.notes.append(words.strip().splitlines()[-1])
    yield "CUDA tests", "passed" if " passed" in words else "skipped"


def digests(run: Run) -> Iterator[Figure]:
    """Whether two runs, and one that stops and goes on in another process, end with the same bytes."""
    stop, end = run.sizes.steps
    with tempfile.TemporaryDirectory() as folder:
        whole = {"families": run.sizes.digests, "states": folder, "begin": 0, "end": end, "leaves": False}
        first, again, _ = run.answers("digests", whole, whole, whole | {"end": stop, "leaves": True})
        (resumed,) = run.answers("digests", whole | {"begin": stop})
    for name, digest in first.items():
        yield f"digest of {name}", digest
        yield f"two runs of {name}", _same(digest, again[name])
        yield f"a stopped run of {name}", _same(digest, resumed[name])


def layer(run: Run) -> Iterator[Figure]:
    """Every layer against the plain one."""
    return _told_by("layer.py", run)


def step(run: Run) -> Iterator[Figure]:
    """Whole steps of the recipes."""
    return _told_by("step.py", run)


def overhead(run: Run) -> Iterator[Figure]:
    """Time and memory that TrAct adds to a step, by `experiments/runtime.py`, one recipe after the other."""
    for name, (setting, overrides, sizes, _) in run.sizes.overheads.items():
        (found,) = run.answers("overhead", {"setting": setting, "overrides": overrides, "sizes": sizes})
        yield f"overhead of {name}", found["overhead"]
        yield f"quartiles of the overhead of {name}", [found["low"], found["high"]]
        yield f"ms per plain step of {name}", found["vanilla_milliseconds"]
        if "extra_mib" in found:
            yield f"MiB more for {name}", found["extra_mib"]


def harness(run: Run) -> Iterator[Figure]:
    """Throughput of training against a plain script with a DataLoader."""
    setting, overrides = run.sizes.harness
    given = {"setting": setting, "overrides": overrides, "images": run.sizes.images}
    (speeds,) = run.answers("harness", given | {"workers": run.sizes.workers, "turns": run.sizes.turns})
    for name, speed in speeds.items():
        yield f"images/s of {name}", speed
        if name != "plain script":
            yield f"{name} / plain script", speed / speeds["plain script"]


def side_by_side(run: Run) -> Iterator[Figure]:
    """Throughput of several runs on one GPU, all together."""
    setting, overrides = run.sizes.harness
    for count in run.sizes.together:
        with tempfile.TemporaryDirectory() as ready:
            given = {"setting": setting, "overrides": overrides, "images": run.sizes.images, "together": count}
            options = [given | {"ready": str(Path(ready) / str(number))} for number in range(count)]
            yield f"images/s of {count} runs side by side", sum(run.answers("side_by_side", *options))


# In this order; seconds that each may take.
STAGES: dict[Callable[[Run], Iterator[Figure]], float] = {
    tests: 120,
    digests: 120,
    layer: 60,
    step: 90,
    overhead: 240,
    harness: 90,
    side_by_side: 120,
}


def _told_by(script: str, run: Run) -> Iterator[Figure]:
    words = ("--device", run.device) if run.device != "cpu" else ("--help",)  # on the CPU they have bars of their own
    yield f"benchmarks/{script}", run.command(f"benchmarks/{script}", *words).strip()


def _same(one: str, other: str) -> str:
    return "the same" if one == other else f"differs: {other}"


# -- the record -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; returns the exit code: 1 where a stage failed or a bar is missed."""
    names = [stage.__name__ for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the record (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and their limits, run nothing")
    options = parser.parse_args(arguments)
    chosen = {stage: seconds for stage, seconds in STAGES.items() if stage.__name__ in options.only}
    if options.dry_run:
        for stage, seconds in chosen.items():
            print(f"{stage.__name__}, {seconds:g} s at most: {stage.__doc__}")
        print(f"together {sum(chosen.values()) / 60:g} minutes at most")
        return 0
    run = Run(options.device, GPU if options.device == "cuda" else CPU, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    run.end = time.monotonic() + 120
    try:
        (machine,) = run.answers("machine", {})
    except FailedError as error:
        print(f"error: expected a GPU that torch can use, got:\n{error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    record = {"device": options.device, "machine": machine, "stages": {}, "figures": {}}
    for stage, seconds in chosen.items():
        record["stages"][stage.__name__] = _outcome(stage, seconds, run, record)
        _write(record, options.out)
    verdicts = _verdicts(record)
    for bar, verdict in verdicts.items():
        print(f"{verdict}: {bar.figure} {bar}, got {_shown(bar.figure, record['figures'].get(bar.figure))}")
    failed = any(stage["outcome"] != "done" for stage in record["stages"].values())
    return int(failed or "missed" in verdicts.values())


def _outcome(stage: Callable, seconds: float, run: Run, record: dict) -> dict:
    began = time.monotonic()
    run.end, run.notes = began + seconds, []
    outcome = {"outcome": "done"}
    try:
        for figure, value in stage(run):
            record["figures"][figure] = value
            print(f"{stage.__name__}: {figure}: {_shown(figure, value)}", flush=True)
            _write(record, run.folder)
    except FailedError as error:
        outcome = {"outcome": "failed", "words": str(error)}
        print(f"{stage.__name__}: failed: {error}", flush=True)
    return outcome | {"seconds": time.monotonic() - began, "limit": seconds, "notes": run.notes}


def _verdicts(record: dict) -> dict[Bar, str]:
    return {bar: "not a GPU" if record["device"] == "cpu" else bar.verdict(record["figures"]) for bar in BARS}


def _write(record: dict, folder: Path) -> None:
    figures, verdicts = record["figures"], _verdicts(record)
    write_json(folder / "gpu.json", record | {"bars": {bar.figure: verdict for bar, verdict in verdicts.items()}})
    bars = {bar.figure: bar for bar in BARS}
    lines = ["| figure | value | bar | |", "|---|---|---|---|"]
    for figure in figures | dict.fromkeys(bars):
        bar = bars.get(figure)
        value = _shown(figure, figures.get(figure))
        if "\n" not in value:
            lines.append(f"| {figure} | {value} | {bar or ''} | {verdicts[bar] if bar else ''} |")
    lines += ["", "| stage | outcome | s |", "|---|---|---|"]
    lines += [f"| {name} | {each['outcome']} | {each['seconds']:.0f} |" for name, each in record["stages"].items()]
    lines += [f"\n{figure}:\n\n{value}" for figure, value in figures.items() if "\n" in str(value)]
    machine = {key: value for key, value in record["machine"].items() if key != "packages"}
    packages = record["machine"]["packages"]
    lines += ["", ", ".join(f"{key} {value}" for key, value in (machine | packages).items())]
    write_atomically(folder / "gpu.md", ("\n".join(lines) + "\n").encode())


def _shown(figure: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(figure, each) for each in value)
    if value is None:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    return f"{100 * value:.2f} %" if "overhead" in figure else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
