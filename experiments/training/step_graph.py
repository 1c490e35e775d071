"""A whole optimizer step as one CUDA graph: recorded once, then launched on each new batch.

A small network's step is hundreds of short kernels, and starting them takes the host longer than the GPU needs to run
them. A graph starts all of them with one call. Replaying it runs no Python: the same kernels on the same memory, so

- the batch is copied to where the recorded one was, and numbers that change from step to step (the learning rate, the
  step's number) are tensors that stay in place;
- random numbers are those that the step would draw: torch gives the graph the state of the GPU's generator, which each
  step seeds;
- what layers require of numbers on the GPU (``tract/finite.py``) is computed in the recording and asked after each
  replay, with the same errors. The moving average follows each step outside as well;
- whatever waits for the GPU, or does something else in each step, cannot be recorded. The first steps of a process and
  smaller batches run kernel by kernel; the rest is refused by :func:`step_graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from experiments.config import Config, Precision
from experiments.ranks import Ranks
from experiments.tasks.base import Task
from experiments.training.optim import make_replayable
from runfolder.errors import UserError
from tract.finite import recorded, require
from tract.methods.base import Method

_STEPS_BEFORE = 3  # which make what stays: the optimizer's state, the libraries' work spaces
Update = Callable[[tuple[Tensor, ...]], None]


class Recorder:
    """Records and replays work on a GPU.

    Args:
        device: where the work runs.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)  # the default one cannot be recorded

    def run(self, work: Callable[[], None]) -> None:
        """As it is, where it could be recorded: gradients remember the stream of their first use.

        Raises:
            UserError: the work draws random numbers on the CPU, which no replay would draw anew.
        """
        with self._aside(), _no_draws_on_the_cpu():
            work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work's kernels; they are recorded without being run.

        Raises:
            RuntimeError: the work waits for the GPU; its message has the word "capturing".
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins loaded batches, may go on.
        with self._aside(), torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    @contextmanager
    def _aside(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)


class StepGraph:
    """Steps on whole batches, replayed as soon as one could be recorded.

    Args:
        recorder: runs, records and replays.
        records: whether to record at all; else every step runs kernel by kernel, with the same result.
    """

    def __init__(self, recorder: Recorder, records: bool = True):
        self._recorder, self._records, self._before = recorder, records, _STEPS_BEFORE
        self._batch: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._required: list[tuple[Tensor, str]] = []

    def __call__(self, update: Update, batch: tuple[Tensor, ...], whole: bool) -> None:
        """Update the weights by a batch.

        Args:
            update: a step on a batch, the same operations for all whole batches.
            batch: its tensors.
            whole: not the last, smaller one of an epoch.

        Raises:
            UserError: the update waits for the GPU, or draws random numbers on the CPU.
            NonFiniteError: a layer's numbers are not what it requires; on a GPU it may be those of some steps before.
        """
        if not (whole and self._records and self._before == 0):
            self._before = max(0, self._before - whole)
            self._recorder.run(partial(update, batch))
            return
        if self._replay is None:
            self._record(update, batch)
        for place, part in zip(self._batch, batch, strict=True):
            place.copy_(part)
        self._replay()
        for condition, message in self._required:
            require(condition, message)

    def _record(self, update: Update, batch: tuple[Tensor, ...]) -> None:
        self._batch = tuple(part.clone() for part in batch)
        try:
            with recorded() as self._required:
                self._replay = self._recorder.record(partial(update, self._batch))
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            raise _refused("a network that waits for nothing", str(error).strip().splitlines()[0]) from error


def step_graph(
    config: Config, task: Task, method: Method, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device
) -> StepGraph:
    """The graph of a run's steps; its optimizer is made ready for it.

    Raises:
        UserError: a run whose steps cannot be recorded.
    """
    if device.type != Recorder.device_type:
        raise _refused("a GPU", f"runtime.device={device.type}")
    if ranks.size > 1:
        raise _refused("one rank", ranks.size)
    if not task.replayable:
        raise _refused("batches of one shape", task.name)
    if not method.replayable:
        raise _refused("a method that does the same in every step", config.method["name"])
    try:
        make_replayable(optimizer)
    except ValueError:
        raise _refused("an optimizer with a fused kernel of torch's", f"optim={config.optim['name']}") from None
    if config.precision is Precision.fp16 and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise _refused("an optimizer that skips bad steps by itself", f"precision=fp16, optim={config.optim['name']}")
    return StepGraph(Recorder(device), records=not config.runtime.anomaly)


@contextmanager
def _no_draws_on_the_cpu() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    if not torch.equal(torch.get_rng_state(), before):
        raise _refused("a network that draws its random numbers on the GPU", "one that draws on the CPU")


def _refused(expected: str, got: object) -> UserError:
    return UserError(f"expected {expected} for compile=graph, got {got}; compile=false trains it.")
