import pytest
import torch

from tract import second_moment as code
from tract.second_moment import Geometry
from tract.whole_float32 import whole_float32

CUDA, CPU, ALL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends
READ = {
    "legacy": torch.get_float32_matmul_precision,
    "allow_tf32": lambda: CUDA.allow_tf32,
    "cuda": lambda: CUDA.fp32_precision,
    "cpu": lambda: CPU.fp32_precision,
    "all": lambda: ALL.fp32_precision,
}
WAYS = {
    "nothing": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "cuda": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "cpu": lambda: setattr(CPU, "fp32_precision", "bf16"),
    "all": lambda: setattr(ALL, "fp32_precision", "tf32"),
    "all but cuda": lambda: (setattr(ALL, "fp32_precision", "tf32"), setattr(CUDA, "fp32_precision", "ieee")),
}


def _settings():
    """What torch says of itself; an error, where both of its interfaces have been used, is an answer too."""

    def read(function):
        try:
            return function()
        except RuntimeError:
            return "mixed"

    return {name: read(function) for name, function in READ.items()}


@pytest.fixture(autouse=True)
def _as_torch_starts():
    yield
    torch.set_float32_matmul_precision("highest")
    for setting in (CUDA, CPU, ALL):
        setting.fp32_precision = "none"


@pytest.mark.parametrize("way", WAYS)
def test_products_are_whole_inside_and_as_the_user_has_set_them_afterwards(way):
    WAYS[way]()
    before = _settings()
    with whole_float32():
        assert CUDA.fp32_precision == CPU.fp32_precision == "ieee"
    assert _settings() == before
    with pytest.raises(KeyError), whole_float32():
        raise KeyError
    assert _settings() == before


def test_a_setting_for_all_operations_is_still_followed_afterwards():
    ALL.fp32_precision = "tf32"
    with whole_float32():
        pass
    ALL.fp32_precision = "ieee"
    assert CUDA.fp32_precision == "ieee"


def test_the_second_moment_is_multiplied_whole(monkeypatch):
    seen = []
    products = code._from_rows
    monkeypatch.setattr(code, "_from_rows", lambda *a: (seen.append(CUDA.fp32_precision), products(*a))[1])
    ALL.fp32_precision = "tf32"
    code.second_moment(torch.randn(9, 4), Geometry(4), torch.float32)
    assert seen == ["ieee"]
