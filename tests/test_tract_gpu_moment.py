"""The second moment's Triton kernels on a machine without a GPU: interpreted, and built for GPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tract_layers import make
from tract import TrAct, gpu_moment
from tract.second_moment import second_moment as torch_moment

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def _run(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@needs_triton
def test_the_interpreted_kernels_follow_the_formula():
    """In a process of its own, since Triton is switched to its interpreter before it is imported."""
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/interpreted_moment.py")
    done = _run(*tests, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr


class _Built:
    """Stands for a kernel: a launch builds it for a GPU and keeps its assembly."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability, self.assembly = kernel, capability, ""

    def __getitem__(self, grid):
        return self._build

    def _build(self, *arguments, num_warps, enable_fp_fusion, **named):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        parameters = self.kernel.params
        values = dict(zip((p.name for p in parameters), arguments, strict=False)) | named
        types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
        signature = {
            p.name: "constexpr" if p.is_constexpr else types.get(getattr(values[p.name], "dtype", None), "i32")
            for p in parameters
        }
        constants = {(i,): values[p.name] for i, p in enumerate(parameters) if p.is_constexpr}
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        source = ASTSource(self.kernel, signature, constants)
        self.assembly += compile(source, target=GPUTarget("cuda", self.capability, 32), options=options).asm["ptx"]


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [("conv2d groups few rows", torch.float32, 90), ("linear", torch.bfloat16, 80), ("conv2d strided", None, 100)],
)
def test_the_kernels_can_be_built_for_gpus_and_multiply_on_tensor_cores(name, dtype, capability, monkeypatch, tmp_path):
    from tract import gpu_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = [_Built(getattr(gpu_kernels, name), capability) for name in ("partial_moments", "sum_of_partials")]
    for built in kernels:
        monkeypatch.setattr(gpu_kernels, built.kernel.__name__, built)
    layer, x, _ = make(name, torch.float32)
    gpu_moment.second_moment(x.to(dtype), TrAct(layer)._geometry())
    assert "tf32" in kernels[0].assembly
    for built in kernels:
        assert built.assembly
        assert "atom" not in built.assembly  # the order of all sums is fixed
    assert "f64" in kernels[1].assembly
    assert "mul.f64" not in kernels[0].assembly + kernels[1].assembly
    assert "fma.rn.f64" not in kernels[0].assembly + kernels[1].assembly


@pytest.mark.parametrize("supported", [True, False])
def test_the_layer_takes_the_kernels_where_they_are_supported_and_torch_elsewhere(supported, monkeypatch):
    calls = []

    def kernels(x, geometry):
        calls.append(geometry)
        return torch_moment(x, geometry)

    monkeypatch.setattr(gpu_moment, "supports", lambda x, geometry: supported)
    monkeypatch.setattr(gpu_moment, "second_moment", kernels)
    layer, x, _ = make("conv2d", torch.float32)
    wrapped = TrAct(layer)
    wrapped(x).sum().backward()
    assert calls == [wrapped._geometry()] * supported
    assert wrapped.weight.grad.isfinite().all()


def test_nothing_on_a_cpu_is_left_to_the_kernels():
    layer, x, _ = make("conv2d", torch.float32)
    assert not gpu_moment.supports(x, TrAct(layer)._geometry())
