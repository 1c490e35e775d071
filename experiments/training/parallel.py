"""The ranks that share a run: one process, or several started by torchrun or Slurm."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.errors import RunBusyError, UserError


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
            except (UserError, RunBusyError) as error:
                outcome = (None, error)
        value, error = self.from_first(outcome)
        if error is not None:
            raise error
        return value

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
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the process group that the environment describes (RANK, WORLD_SIZE), if any."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        control = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
        yield Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", 0)), control)
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is this rank's GPU if there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device
