import pytest
import torch

from tests.tract_layers import error
from tract.damped_solve import damped_solve, damped_solve_dual, damped_solve_rows, effective_damping

EPS = torch.finfo(torch.float64).eps
SIZES = [(1, 4, 6, 30), (1, 4, 6, 3), (3, 2, 5, 8), (3, 2, 5, 1), (1, 1, 1, 1), (2, 7, 40, 12)]


def _problem(g, m, n, b):
    """(D, G = D X, X^T, X^T X / b)."""
    rows, output_gradient = torch.randn(g, n, b).double(), torch.randn(g, m, b).double()
    return output_gradient, output_gradient @ rows.mT, rows, rows @ rows.mT / b


@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("size", SIZES)
def test_product_times_damped_moment_gives_the_gradient_back(size, damping):
    output_gradient, gradient, rows, moment = _problem(*size)
    damped = moment + damping * torch.eye(size[2]).double()
    product, succeeded = damped_solve(gradient, moment, damping)
    dual_product, dual_succeeded = damped_solve_dual(output_gradient, rows, damping)
    assert succeeded
    assert dual_succeeded
    assert error(product @ damped, gradient) < 1e-11
    assert error(dual_product @ damped, gradient) < 1e-11


@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("size", SIZES)
def test_dual_form_equals_primal_form(size, damping):
    output_gradient, gradient, rows, moment = _problem(*size)
    primal, dual = damped_solve(gradient, moment, damping)[0], damped_solve_dual(output_gradient, rows, damping)[0]
    assert error(dual, primal) < 1e-10


@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("size", [size for size in SIZES if size[3] <= size[2]])
def test_form_of_gradient_and_rows_equals_the_others(size, damping):
    output_gradient, gradient, rows, _ = _problem(*size)
    expected, _ = damped_solve_dual(output_gradient, rows, damping)
    product, succeeded = damped_solve_rows(gradient, rows, damping)
    assert succeeded
    assert error(product, expected) < 1e-9


def test_what_rounding_has_put_outside_the_rows_falls_away():
    output_gradient, gradient, rows, moment = _problem(1, 4, 30, 3)
    expected, _ = damped_solve_dual(output_gradient, rows, 1e-6)
    rounded = gradient.float()
    assert error(damped_solve_rows(rounded, rows, 1e-6)[0], expected) < 1e-6
    assert error(damped_solve(rounded, moment, 1e-6)[0], expected) > 1e-3


@pytest.mark.parametrize("copies", [0, 2, 5])
def test_dependent_rows_are_as_good_as_others(copies):
    output_gradient, gradient, rows, _ = _problem(2, 4, 40, 4)
    rows = torch.cat([rows, *[rows[..., :1]] * copies, torch.zeros(2, 40, 1).double()], dim=-1)
    output_gradient = torch.cat([output_gradient, output_gradient.new_zeros(2, 4, copies + 1)], dim=-1)
    expected, _ = damped_solve_dual(output_gradient, rows, 0.1)
    assert error(damped_solve_rows(gradient, rows, 0.1)[0], expected) < 1e-9


def test_without_rows_there_is_no_update():
    product, succeeded = damped_solve_rows(torch.zeros(1, 4, 6), torch.zeros(1, 6, 0).double(), 0.1)
    assert succeeded
    assert torch.equal(product, torch.zeros(1, 4, 6).double())
    product, succeeded = damped_solve_rows(torch.zeros(1, 4, 6), torch.zeros(1, 6, 2).double(), 0.1)
    assert succeeded
    assert torch.equal(product, torch.zeros(1, 4, 6).double())


@pytest.mark.parametrize("solve", [damped_solve, damped_solve_dual])
def test_groups_are_solved_one_by_one(solve):
    output_gradient, gradient, rows, moment = _problem(3, 2, 5, 4)
    arguments = (gradient, moment) if solve is damped_solve else (output_gradient, rows)
    apart = [solve(*(part[i : i + 1] for part in arguments), 0.1)[0] for i in range(3)]
    torch.testing.assert_close(solve(*arguments, 0.1)[0], torch.cat(apart), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 255.0])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_dual_form_does_not_multiply_rounding_of_the_gradient(damping, scale):
    """From D in float32 it is as exact as from D in float64; from G in float32 the primal form is not."""
    rows = scale * torch.rand(1, 300, 20).double()
    rows[..., 10:] = rows[..., :10]  # rank deficient even among the rows
    output_gradient = torch.randn(1, 4, 20)
    exact = damped_solve_dual(output_gradient.double(), rows, damping)[0]
    assert error(damped_solve_dual(output_gradient, rows, damping)[0], exact) < 1e-12
    rounded = (output_gradient @ rows.mT.float(), rows @ rows.mT / 20, damping)
    assert error(damped_solve(*rounded)[0], exact) > 1e-6


@pytest.mark.parametrize(("n", "b"), [(48, 20), (3072, 128), (3072, 1500)])
def test_dual_form_of_rows_in_float32_is_as_exact_as_its_products(n, b):
    rows, output_gradient = torch.randn(2, n, b), torch.randn(2, 4, b)
    product, succeeded = damped_solve_dual(output_gradient, rows, 0.1)
    assert succeeded
    assert product.dtype == torch.float32
    assert 0 < error(product, damped_solve_dual(output_gradient, rows.double(), 0.1)[0]) < 1e-6


def test_solution_is_linear_in_the_gradient():
    _, gradient, _, moment = _problem(2, 4, 6, 30)
    product = damped_solve(gradient, moment, 0.1)[0]
    assert torch.equal(damped_solve(gradient * 2**16, moment, 0.1)[0], product * 2**16)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e8, 1e20])
def test_effective_damping_is_damping_or_eight_roundings_of_the_trace_whichever_is_larger(scale):
    trace = scale * torch.tensor([0.0, 1.0, 5.0]).double()
    for value, t in zip(effective_damping(0.1, trace), trace, strict=True):
        assert value == max(0.1, 8 * EPS * t)


@pytest.mark.parametrize("n", [2, 50, 400])
@pytest.mark.parametrize("scale", [1.0, 255.0**2, 1e15])
def test_a_moment_of_rank_one_can_always_be_factorised(n, scale):
    moment = scale * torch.ones(1, n, n).double()
    product, succeeded = damped_solve(torch.randn(1, 3, n), moment, 1e-30)
    assert succeeded
    assert product.isfinite().all()


def test_an_indefinite_or_non_finite_moment_is_reported():
    _, gradient, _, moment = _problem(1, 2, 3, 9)
    assert not damped_solve(gradient, moment - 100 * torch.eye(3), 0.1)[1]
    assert not damped_solve(gradient, moment * torch.nan, 0.1)[1]
