"""Starts training processes that die where they are told to: the other half of test_resume.py.

Run as a program it imports everything once and then, for each request on standard input (one
JSON object a line), forks a process per rank that runs an experiment's command line. A fork
is a process like any other, only without the seconds of importing torch. The answer, one
line, lists the exit codes; -9 is a SIGKILL.

A request: {"arguments": [...], "ranks": 1, "output": FILE, "event": [PLACE, COUNT, SIGNAL] or
null, "delay": seconds or null, "prepare": [FUNCTION, ARGUMENT, ...] or null}. Each rank first calls
the function of this dotted name. The event sends SIGNAL to the first rank itself when it
reaches PLACE for the COUNT-th time; the delay sends SIGKILL to all ranks from outside. A place
is one of PLACES, or "before renaming PATTERN" or "after renaming PATTERN": where a file of this
name appears in the run folder.
"""

import contextlib
import fnmatch
import json
import os
import signal
import socket
import sys
import time

import torch._dynamo  # noqa: F401  (imported here so that no child has to)
from hydra.utils import get_object

import experiments.training.run  # noqa: F401
import slurm.command
from experiments.tasks import accuracy
from experiments.training import checkpoint, loop
from runfolder import files

# What a place is: where the function lives, its name, and whether the signal comes
# before the call ("before"), after it, or in a half-written file ("half").
PLACES = {
    "forward": (loop.Trainer, "_note", "before"),
    "optimizer": (loop.Trainer, "after_step", "before"),
    "evaluation": (accuracy, "_sums", "before"),
    "evaluated": (loop.Trainer, "_record", "after"),
    "half a checkpoint": (checkpoint, "write_atomically", "half"),
    "pruning": (checkpoint.Keeper, "_prune", "before"),
}


def arm(place: str, count: int, number: int) -> None:
    """Make the function at a place send a signal to this process at its count-th call."""
    moment, renaming, pattern = place.partition(" renaming ")
    owner, name, moment = (os, "replace", moment) if renaming else PLACES[place]
    original = getattr(owner, name)
    calls = 0

    def replacement(*arguments, **keywords):
        nonlocal calls
        calls += not renaming or fnmatch.fnmatch(os.path.basename(arguments[1]), pattern)
        if calls == count and moment == "half":
            path, content = arguments
            path.with_name(f"{path.name}.{os.getpid()}{files.TEMPORARY}").write_bytes(content[: len(content) // 2])
        if calls == count and moment != "after":
            os.kill(os.getpid(), number)
        value = original(*arguments, **keywords)
        if calls == count and moment == "after":
            os.kill(os.getpid(), number)
        return value

    setattr(owner, name, replacement)
    assert files.os is os  # the places in os are those that files.py calls


def start(request: dict, rank: int, port: int) -> int:
    """Fork one rank; returns its process id."""
    process = os.fork()
    if process:
        return process
    with open(request["output"], "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    code = 1
    try:
        if request["ranks"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if request["event"] and rank == 0:
            place, count, name = request["event"]
            arm(place, count, getattr(signal, name))
        if request["prepare"]:
            name, *arguments = request["prepare"]
            get_object(name)(*arguments)
        code = slurm.command.main(request["experiment"], "", "", request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(request: dict) -> list[int]:
    """Run all ranks of a request to their ends; when one dies of a signal the others are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alive = {start(request, rank, port): rank for rank in range(request["ranks"])}
    end = None if request["delay"] is None else time.monotonic() + request["delay"]
    codes = {}
    while alive:
        for process, rank in list(alive.items()):
            finished, status = os.waitpid(process, os.WNOHANG)
            if finished:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del alive[process]
        if (end is not None and time.monotonic() > end) or any(code not in (0, 75) for code in codes.values()):
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            end = None
        time.sleep(0.005)
    return [codes[rank] for rank in sorted(codes)]


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
