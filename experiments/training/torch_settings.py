"""Torch's global switches and its profiler, for the time of one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from experiments.config import Config
from runfolder.folder import RunFolder


@contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """Torch's global switches for this run; put back afterwards."""
    runtime = config.runtime
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(runtime.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not runtime.deterministic
    try:
        with torch.autograd.set_detect_anomaly(runtime.anomaly):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark


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
