"""Torch's global switches and its profiler, for the time of one run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from experiments.config import Config, Products
from runfolder.errors import UserError
from runfolder.folder import RunFolder

_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


@dataclass(frozen=True)
class Switches:
    """Torch's global switches that decide its numbers and its speed."""

    threads: int
    deterministic: bool
    warn_only: bool  # an operation without a deterministic kernel is a warning, not an error
    fill_uninitialized_memory: bool  # in deterministic mode; a kernel for each new tensor
    cudnn_benchmark: bool
    matmul_precision: str
    conv_tf32: bool

    @classmethod
    def now(cls) -> Switches:
        """As they are."""
        return cls(
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
        )

    @classmethod
    def of(cls, config: Config) -> Switches:
        """As a run wants them."""
        runtime = config.runtime
        return cls(
            torch.get_num_threads() if runtime.threads is None else runtime.threads,
            runtime.deterministic,
            warn_only=False,
            fill_uninitialized_memory=False,
            cudnn_benchmark=not runtime.deterministic,
            matmul_precision=config.matmul_precision.value,
            conv_tf32=config.conv_precision is not Products.highest,
        )

    def put(self) -> None:
        """Set them."""
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill_uninitialized_memory
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.allow_tf32 = self.conv_tf32


@contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """Torch's global switches for this run; put back afterwards.

    Raises:
        UserError: deterministic kernels are wanted, and an operation has none on this device.
    """
    before = Switches.now()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    try:
        Switches.of(config).put()
        with torch.autograd.set_detect_anomaly(config.runtime.anomaly):
            yield
    except RuntimeError as error:
        if (named := _NOT_DETERMINISTIC.search(str(error))) is None:
            raise
        raise UserError(
            f"expected operations with deterministic kernels, got {named[1]}, which has none on this device; "
            "runtime.deterministic=false trains with it, but not to the same bytes after an interruption."
        ) from error
    finally:
        before.put()


@contextmanager
def profiled(folder: RunFolder | None) -> Iterator[None]:
    """A Chrome trace of everything inside in ``profile.json``, and the costliest operations in ``profile.txt``.

    Args:
        folder: the run folder, or None to profile nothing.
    """
    if folder is None:
        yield
        return
    with torch.profiler.profile(record_shapes=True) as profiler:
        yield
    profiler.export_chrome_trace(str(folder / "profile.json"))
    (folder / "profile.txt").write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
