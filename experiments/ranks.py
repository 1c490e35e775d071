"""The ranks that share a run: one process, or several started by torchrun or Slurm.

Under Slurm (``srun``, also inside ``salloc``) the ranks find each other through a file in the
run's parent folder: the first rank opens a store on a port that the system chooses and writes
down where. So two jobs on one node cannot clash, and nothing needs to be configured.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runfolder.errors import RunBusyError, UserError
from runfolder.failures import FailureKind
from runfolder.files import read_json, write_json
from runfolder.place import node_name, place_of_this_rank

_MEETING_SECONDS = 300.0  # how long the first rank's address, and then all ranks, are waited for


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run."""

    rank: int = 0
    size: int = 1
    local: int = 0  # rank within the node: which GPU
    control: dist.ProcessGroup | None = None  # CPU group for decisions, so that no GPU is waited for

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def highest(self, code: int) -> int:
        """The highest of all ranks' numbers; every rank must call it."""
        if self.size == 1:
            return code
        value = torch.tensor(code)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return int(value)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, action: Callable[[], Any]) -> Any:
        """Do something on the first rank only; all ranks get its (small, picklable) value, or raise its error."""
        outcome = None
        if self.first:
            try:
                outcome = (action(), None)
            except (UserError, RunBusyError, OSError) as error:
                outcome = (None, error)
        value, error = self.from_first(outcome)
        if error is not None:
            raise error
        return value

    def first_then_all(self, action: Callable[[], Any]) -> Any:
        """Do something on the first rank, then, if it raised nothing, on all others; each rank has its own value."""
        values: list[Any] = []
        self.agree(lambda: values.append(action()))
        return values[0] if self.first else action()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (a picklable object), in the order of the ranks, on all of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of the first rank."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def from_first(self, value: Any) -> Any:
        """The first rank's value (any small picklable object), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


@contextmanager
def joined_ranks(device: torch.device, meeting_place: Path) -> Iterator[Ranks]:
    """Join the processes that share this run, if there are several.

    Who they are stands in the environment, see ``place.py``.

    Args:
        device: what this process computes on.
        meeting_place: a folder that all ranks see; made where it is needed.

    Raises:
        UserError: the other ranks did not come.
    """
    rank, size, local = place_of_this_rank()
    if size == 1:
        yield Ranks()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=_meet(meeting_place, rank, size), rank=rank, world_size=size)
    try:
        control = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
        yield Ranks(rank, size, local, control)
    finally:
        dist.destroy_process_group()


def _meet(place: Path, rank: int, size: int) -> dist.TCPStore:
    """A store on the first rank's node that all ranks of this step have reached."""
    step = "-".join(os.environ.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    path, patience = place / f"meeting-{step}.json", timedelta(seconds=_MEETING_SECONDS)
    try:
        place.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
            write_json(path, {"host": node_name(), "port": store.port})
        else:
            address = _await_address(path)
            store = dist.TCPStore(address["host"], address["port"], timeout=patience)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)], patience)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"expected {size} ranks to meet through {path}, rank {rank} did not see all of them: "
            f"{str(error).splitlines()[0]}; is this folder shared, and can the nodes reach each other?",
            FailureKind.peer,
        ) from None
    finally:
        if rank == 0:
            path.unlink(missing_ok=True)
    return store


def _await_address(path: Path) -> dict:
    end = time.monotonic() + _MEETING_SECONDS
    while time.monotonic() < end:
        os.listdir(path.parent)  # makes a network client look afresh
        address = read_json(path)
        if address:
            return address
        time.sleep(0.1)
    raise OSError(f"no address of the first rank after {_MEETING_SECONDS:.0f} s")


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is this rank's GPU if there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        promised = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
        if name == "cpu" and promised:
            raise UserError(
                f"expected a GPU on {socket.gethostname()}, where Slurm gives this job number {promised}, got none "
                "from torch; runtime.device=cpu trains without.",
                FailureKind.node,
            )
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise UserError(f"expected runtime.device to be auto, cpu, cuda or cuda:N, got {name!r}.") from None
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"expected a GPU for runtime.device={name}, got {torch.cuda.device_count()} GPUs; "
                "use runtime.device=cpu."
            )
        if device.index is None:
            device = torch.device("cuda", place_of_this_rank()[2] % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device
