import pytest
import torch
import torch.nn as nn

from tests import reference
from tests.tract_layers import error, gradients, tract_gradient
from tract import NonFiniteError, TrAct, apply_tract

INPUTS = {
    "standardised": lambda *shape: torch.randn(shape),
    "raw pixels": lambda *shape: torch.randint(0, 256, shape).float(),
    "bright, little contrast": lambda *shape: 250 + torch.randn(shape),
    "constant images": lambda *shape: (255 * torch.rand(shape[0], *(1,) * (len(shape) - 1))).expand(shape),
    "zeros": lambda *shape: torch.zeros(shape),
    "one image": lambda *shape: torch.randn(shape[1:]).expand(shape),
    "tiny": lambda *shape: 1e-20 * torch.randn(shape),
    "mostly dead pixels": lambda *shape: torch.randn(shape) * (torch.arange(shape[-1]) % 7 == 0),
}
LAYERS = {
    "linear, few rows": (lambda: nn.Linear(768, 8), (40, 768)),
    "linear, many rows": (lambda: nn.Linear(48, 8), (300, 48)),
    "conv, few rows": (lambda: nn.Conv2d(3, 8, 16, stride=16), (3, 3, 48, 48)),
    "conv, many rows": (lambda: nn.Conv2d(3, 8, 5, padding=2), (2, 3, 20, 20)),
    "conv, n = 768": (lambda: nn.Conv2d(3, 8, 16, stride=16), (18, 3, 112, 112)),
}


@pytest.mark.parametrize("damping", [1e-6, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradient_is_finite_and_leads_downhill_whatever_the_input(name, kind, dtype, damping):
    """<T, G> > 0 unless G = 0: the inverse of a positive definite matrix is positive definite."""
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), INPUTS[kind](*shape).to(dtype)
    direction = torch.randn_like(layer(x)).detach()
    plain = reference.plain_gradients(layer, x, direction)[1].double()
    actual = tract_gradient(layer, x, direction, damping).double()
    assert actual.isfinite().all()
    assert (plain * actual).sum() > 0 or (kind == "zeros" and not actual.any())


def _direct(x, direction, damping):
    """dz^T (X X^T / b + damping I)^-1 X, another form of the update, without a difference of large numbers."""
    gram = x @ x.mT / len(x) + damping * torch.eye(len(x)).double()
    return torch.linalg.solve(gram, direction).mT @ x


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("b", [30, 300])
def test_float64_error_is_bounded_by_the_condition_number(b, kind):
    """error <= 100 eps tr A / lambda: digits are lost only as far as the damping is below the second moment."""
    layer, x, direction = nn.Linear(48, 8).double(), INPUTS[kind](b, 48).double(), torch.randn(b, 8).double()
    condition = 1 + x.square().sum(-1).mean().item() / 0.1
    actual, expected = tract_gradient(layer, x, direction), _direct(x, direction, 0.1)
    assert (actual - expected).norm() <= 100 * torch.finfo(torch.float64).eps * condition * expected.norm()


PLACES = [("linear, few rows", (3, 5)), ("linear, many rows", (3, 5))]
PLACES += [("conv, few rows", (1, 2, 5, 7)), ("conv, many rows", (1, 2, 5, 7))]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_non_finite_input_raises_an_error_that_names_the_layer(name, place, bad):
    make, shape = LAYERS[name]
    model = nn.ModuleDict({"stem": nn.Sequential(make())})
    apply_tract(model)
    x = torch.randn(shape)
    x[place] = bad
    with pytest.raises(NonFiniteError, match=r"layer stem\.0: expected finite inputs"):
        model["stem"](x).sum().backward()


def test_an_input_whose_square_overflows_float32_is_no_error():
    layer, x = nn.Linear(6, 4), 1e25 * torch.randn(20, 6)
    direction = torch.randn(20, 4)
    expected = reference.preconditioned(
        reference.plain_gradients(layer, x, direction)[1], reference.second_moment(layer, x), 0.1
    )
    assert error(tract_gradient(layer, x, direction), expected) < 1e-6


def test_after_a_non_finite_input_the_layer_goes_on():
    layer, x, direction = TrAct(nn.Linear(6, 4)), torch.randn(20, 6), torch.randn(20, 4)
    before = gradients(layer, x, direction)[1].clone()
    with pytest.raises(NonFiniteError):
        layer(x / 0)
    assert torch.equal(gradients(layer, x, direction)[1], before)
