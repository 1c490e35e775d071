"""The command line that all experiment scripts share: one run here, a grid here, or a grid as jobs of a cluster."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

from experiments.config import (
    OF_ONE_START,
    Config,
    choices_of,
    compose_config,
    folder_of,
    from_tree,
    load_config,
    parse_overrides,
    parse_single,
    run_name,
    to_tree,
)
from experiments.grid import grids, load_grid
from experiments.grid import plan as planned
from runfolder import naming
from runfolder.errors import (
    EXIT_BAD_INPUT,
    EXIT_BUSY,
    EXIT_INTERRUPTED,
    EXIT_TRY_AGAIN,
    Parser,
    RunBusyError,
    TrainingFailedError,
    UserError,
    nearest,
)
from runfolder.folder import RunFolder, relative
from runfolder.printing import print_any_name, printable, reader_has_left
from runfolder.states import is_finished
from runfolder.tags import primary_metric
from slurm import plan, profile
from slurm.foreground import train_here
from slurm.launch import submit
from slurm.profile import Cluster, load_cluster


def main(experiment: str, description: str, grid: str, arguments: list[str] | None = None) -> int:
    """Run an experiment script.

    Args:
        experiment: the script's name and its file in ``conf/``.
        description: the script's docstring, shown by --help.
        grid: the grid that --local and --dry-run take where none is named.
        arguments: the command line without the program's name.

    Returns:
        Exit code: 0 done (or submitted), 1 failed, 2 bad input, 69 busy, 75 stopped with a checkpoint.
    """
    print_any_name()
    if arguments is None:  # a program of its own: all that it imports stays, and is not searched for garbage
        gc.disable()
    parser = _parser(experiment, description, grid)
    try:
        options, unknown = parser.parse_known_intermixed_args(arguments)
        for word in unknown:
            raise UserError(
                f"unknown flag {word}; the flags are --local, --submit, --dry-run, --resume RUN, --pdb, --help."
            )
        code = _dispatch(experiment, grid, options)
        print(end="", flush=True)
        return code
    except UserError as error:
        return _leave(EXIT_BAD_INPUT, f"error: {error}")
    except RunBusyError as error:
        return _leave(EXIT_BUSY, f"busy: {error}")
    except TrainingFailedError as error:
        return _leave(1, f"failed: {error}")
    except BrokenPipeError:
        return reader_has_left()
    except KeyboardInterrupt:
        return _leave(EXIT_INTERRUPTED, "interrupted; the same command continues from the last checkpoint")


def _leave(code: int, sentence: str) -> int:
    """Say why, on the first rank only, and hand the exit code on."""
    if _is_first_rank():
        print(printable(sentence), file=sys.stderr)
    return code


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _dispatch(experiment: str, grid: str, options: argparse.Namespace) -> int:
    if options.resume is not None:
        return _run_here(_replay(experiment, options.resume, options.overrides), options.pdb)
    overrides = parse_overrides(options.overrides)
    if not (options.local or options.submit or options.dry_run):
        for key in overrides:
            if key in ("grid", "jobs", "cluster") or key.startswith("cluster."):
                raise UserError(f"{key}= chooses how a grid is run; add --local, --submit or --dry-run.")
        return _run_here(compose_config(experiment, parse_single(options.overrides)), options.pdb)
    return _run_grid(experiment, grid, options, overrides)


def _run_grid(experiment: str, grid: str, options: argparse.Namespace, overrides: dict[str, list]) -> int:
    for key in overrides:
        if options.local and (key == "cluster" or key.startswith("cluster.")):
            raise UserError(f"{key}= is for --submit; --local takes jobs=N, the most runs at a time.")
    if options.submit and "jobs" in overrides:
        raise UserError("jobs= is for --local; --submit takes cluster.parallel=N, the most jobs at a time.")
    jobs = _jobs(overrides.pop("jobs", [1]))
    name = str(_single("grid", overrides.pop("grid", [grid])))
    cluster = _cluster(overrides)
    configs = planned(experiment, name, overrides)
    _all_is_imported()
    if note := load_grid(name).get("note"):
        print(f"note: {note}")
    if not options.dry_run:
        return train_here(experiment, configs, jobs) if options.local else submit(experiment, configs, cluster)
    try:
        plan.show(experiment, configs, jobs, cluster)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _cluster(overrides: dict[str, list]) -> Cluster:
    """Take ``cluster=NAME`` and ``cluster.KEY=VALUE`` out of the overrides: the cluster's profile."""
    name = _single("cluster", overrides.pop("cluster", [None]))
    keys = [key for key in overrides if key.startswith("cluster.")]
    changes = {key.removeprefix("cluster."): _single(key, overrides.pop(key)) for key in keys}
    return load_cluster(None if name is None else str(name), changes)


def _single(key: str, values: list) -> Any:
    if len(values) > 1:
        given = ",".join(map(str, values))
        raise UserError(
            f"expected one {key}, got {key}={given}; start one after another, or, if that is one value, "
            f"quote it: '{key}=\"{given}\"'."
        )
    return values[0]


def _run_here(config: Config, debugger: bool) -> int:
    import torch._dynamo  # noqa: F401  (torch's optimizers do at their first step)

    from experiments.training.run import run  # with torch, which --help can do without
    from experiments.training.stop import StoppedError

    _all_is_imported()
    folder = relative(folder_of(config))
    finished_before = is_finished(folder_of(config))
    try:
        result = run(config)
    except StoppedError as stop:
        again = f"--resume {shlex.quote(folder)}"
        return _leave(EXIT_TRY_AGAIN, f"stopped ({stop}) with a checkpoint; the same command continues, or: {again}")
    except (UserError, RunBusyError):
        raise
    except Exception:
        if debugger:
            import pdb

            pdb.post_mortem()
        raise
    measure = "/" + primary_metric(result).rpartition("/")[2]
    whole = {tag: value for tag, value in result["metrics"].items() if tag.count("/") == 1}  # not of parts of a path
    figures = ", ".join(f"{tag} {value:.2f}" for tag, value in whole.items() if tag.endswith(measure))
    if _is_first_rank():
        print(f"{'finished already' if finished_before else 'finished'}: {figures} in {folder}")
    return 0


def _all_is_imported() -> None:
    if not gc.isenabled():
        gc.enable()


def _replay(experiment: str, folder: str, overrides: list[str]) -> Config:
    """The configuration of a run folder; only ``runtime`` may be changed."""
    tree = to_tree(load_config(RunFolder(folder).config))
    if tree["experiment"] != experiment:
        raise UserError(
            f"expected a run of {experiment}, got one of {tree['experiment']}; "
            f"python experiments/{tree['experiment']}.py --resume {shlex.quote(folder)}"
        )
    runtime = tree["runtime"]
    shared_root = naming.in_data_dir(tree["data"].get("root"), runtime["data_dir"])
    runtime |= OF_ONE_START
    changes = parse_single(overrides)
    for key, value in changes.items():
        name = key.removeprefix("runtime.")
        if name == key:
            raise UserError(f"expected only runtime.* beside --resume, got {key}; other values make another run.")
        if name not in runtime:
            raise UserError(f"unknown key {key}; {nearest(key, (f'runtime.{name}' for name in runtime))}.")
        runtime[name] = value
    if shared_root is not None:
        tree["data"]["root"] = f"{runtime['data_dir']}/{shared_root}".rstrip("/")
    # A run or its experiment may be a link to another disk: first where it is said to be, then where it is.
    for place in (os.path.abspath(folder), os.path.realpath(folder)):
        if "runtime.runs" not in changes:
            runtime["runs"] = str(RunFolder(Path(place)).runs)
        config = from_tree(tree)
        if folder_of(config).path.resolve() == Path(folder).resolve():
            break
    else:
        raise UserError(
            f"expected a run in RUNS/{experiment}/{run_name(config)}, got {folder}; give both folders their names back."
        )
    return config


def _jobs(values: list) -> int:
    if len(values) != 1 or not isinstance(values[0], int) or values[0] < 1:
        raise UserError(f"expected jobs=N with N at least 1, got jobs={','.join(map(str, values))}.")
    return values[0]


def _parser(experiment: str, description: str, grid: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"python experiments/{experiment}.py",
        description=description,
        epilog=textwrap.fill(
            f"Groups: model={{{','.join(choices_of('model'))}}} data={{{','.join(choices_of('data'))}}} "
            f"optim={{{','.join(choices_of('optim'))}}} schedule={{{','.join(choices_of('schedule'))}}} "
            f"method={{{','.join(choices_of('method'))}}} debug={{{','.join(choices_of('debug'))}}}. "
            f"Grids: {', '.join(grids(experiment))}. Clusters: {', '.join(profile.names())}. "
            f"Every value of experiments/conf/{experiment}.yaml, and of the "
            "dataclasses in experiments/config.py, can be given as key=value. Exit codes: 0 done, 1 failed, "
            "2 bad input, 69 busy, 75 stopped with a checkpoint (the same command continues).",
            width=100,
            break_on_hyphens=False,
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="for example seed=1 method=tract method.lambda_=0.05"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--local",
        action="store_true",
        help=f"the whole grid here (grid={grid}; jobs=N at a time), or what KEY=A,B selects",
    )
    how.add_argument(
        "--submit",
        action="store_true",
        help="the same grid as jobs of a cluster (cluster=PROFILE, cluster.KEY=VALUE); returns at once",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, its cost and its jobs; do nothing")
    how.add_argument("--resume", metavar="RUN", help="continue exactly this run folder here")
    parser.add_argument("--pdb", action="store_true", help="open the debugger where an error happens")
    return parser
