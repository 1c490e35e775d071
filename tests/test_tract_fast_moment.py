"""The fast ways to the second moment: float32 products, lags of overlapping kernels, tiles; their errors and memory."""

import copy

import pytest
import torch
import torch.nn as nn

import tract.autocorrelation as lags
import tract.second_moment as code
from benchmarks.interleaved import peak_bytes
from benchmarks.layer import MAIN
from tests import reference
from tests.tract_layers import error, tract_gradient
from tract import TrAct
from tract.damped_solve import damped_solve
from tract.ops import factor_op, second_moment_op, solve_op

CONVOLUTIONS = {
    "3x3": (nn.Conv2d(3, 4, 3, padding=1), (5, 3, 11, 12)),
    "7x7 s2": (nn.Conv2d(3, 4, 7, stride=2, padding=3), (6, 3, 24, 21)),
    "5x4 s3x1": (nn.Conv2d(2, 4, (5, 4), stride=(3, 1), padding=(4, 0)), (5, 2, 17, 13)),
    "dilated": (nn.Conv2d(2, 4, 3, stride=2, dilation=(3, 2), padding=(1, 4)), (7, 2, 19, 16)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (5, 6, 9, 10)),
    "depthwise": (nn.Conv2d(3, 6, 5, groups=3, padding=2), (4, 3, 9, 10)),
    "same, even": (nn.Conv2d(2, 4, (4, 2), padding="same"), (5, 2, 9, 10)),
    "circular": (nn.Conv2d(2, 4, 5, padding=2, stride=2, padding_mode="circular"), (5, 2, 14, 11)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (5, 3, 8, 9)),
    "wide padding": (nn.Conv2d(1, 4, 3, padding=7, stride=2), (5, 1, 4, 3)),
    "gaps": (nn.Conv2d(2, 4, 2, stride=3), (5, 2, 12, 10)),
    "one position": (nn.Conv2d(3, 4, 5), (9, 3, 5, 5)),
    "1d": (nn.Conv1d(3, 4, 7, stride=2, padding=3), (6, 3, 50)),
    "1d dilated circular": (nn.Conv1d(2, 4, 3, dilation=4, padding=5, padding_mode="circular"), (6, 2, 30)),
}
OTHERS = {
    "linear": (nn.Linear(12, 4), (5, 300, 12)),
    "long rows": (nn.Linear(450, 4), (2100, 450)),
    "patches": (nn.Conv2d(3, 4, 8, stride=8), (20, 3, 80, 80)),
    "long rows in groups": (nn.Conv2d(8, 4, 8, stride=8, groups=2), (12, 8, 80, 80)),
    "3d": (nn.Conv3d(2, 4, 3, padding=1), (3, 2, 9, 8, 7)),
}


def _case(name, dtype=torch.float64):
    layer, shape = (CONVOLUTIONS | OTHERS)[name]
    layer = copy.deepcopy(layer).to(dtype)
    return layer, torch.randn(shape, dtype=dtype), TrAct(copy.deepcopy(layer))._geometry()


def _brute(layer, x):
    X = reference.rows(layer, x)
    return X.mT @ X


@pytest.fixture
def way(monkeypatch):
    """Force overlapping kernels through their lags or through their rows, and remember whether lags were used."""

    def force(name):
        monkeypatch.setattr(code, "seconds", lambda *_: 0.0 if name == "lags" else float("inf"))
        used, original = [], code._from_lags
        monkeypatch.setattr(code, "_from_lags", lambda *given: used.append(1) or original(*given))
        return used

    return force


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_lags_and_rows_give_the_same_second_moment(name, dtype, bound, way):
    layer, x, geometry = _case(name, torch.float32)
    if name == "one position":  # nearly all is outside and subtracted again: rows are always faster then
        bound *= 2
    expected = _brute(layer, x)
    for which in ("lags", "rows"):
        used = way(which)
        moment = code.second_moment(x, geometry, dtype)
        assert bool(used) == (which == "lags")
        assert moment.dtype == torch.float64
        assert error(moment, expected) < bound


@pytest.mark.parametrize("limit", ["_SPECTRA", "_WORK", "_STRIPS", "_IMAGES"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_slabs_of_positions_and_parts_of_the_batch_add_up(name, limit, way, monkeypatch):
    layer, x, geometry = _case(name)
    way("lags")
    monkeypatch.setattr(lags, limit, 3 if limit == "_IMAGES" else 3000)
    assert error(code.second_moment(x, geometry), _brute(layer, x)) < 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_lags_of_any_convolution(seed, way):
    draw = lambda low, high: int(torch.randint(low, high, ()))  # noqa: E731
    torch.manual_seed(seed)
    groups = draw(1, 4)
    layer = nn.Conv2d(
        groups * draw(1, 4), groups, (draw(1, 7), draw(1, 7)), stride=(draw(1, 4), draw(1, 4)), groups=groups,
        dilation=(draw(1, 4), draw(1, 4)), padding=(draw(0, 6), draw(0, 6)),
    )  # fmt: skip
    smallest = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    x = torch.randn(draw(1, 7), layer.in_channels, *(size + draw(0, 12) for size in smallest))
    way("lags")
    assert error(code.second_moment(x, TrAct(layer)._geometry()), _brute(layer, x)) < 1e-12


@pytest.mark.parametrize("name", OTHERS)
def test_float32_products_are_as_good_as_their_bound(name):
    layer, x, geometry = _case(name, torch.float32)
    moment = code.second_moment(x, geometry, torch.float32)
    assert 0 < error(moment, _brute(layer, x)) < 1e-6
    assert error(moment, moment.mT) < 1e-7


@pytest.mark.parametrize(
    ("name", "by_lags"), [("ImageNet stem", True), ("DeiT-S embedding", False), ("ViT tokens", False)]
)
def test_kernels_that_overlap_by_far_go_by_their_lags(name, by_lags, monkeypatch):
    used, case = [], MAIN[name]
    monkeypatch.setattr(code, "_from_lags", lambda *_: used.append("lags"))
    monkeypatch.setattr(code, "_from_rows", lambda *_: used.append("rows"))
    code.second_moment(torch.zeros(case.shape), TrAct(case.layer())._geometry(), torch.float32)
    assert used == ["lags" if name == "ImageNet stem" else "rows"]


# -- errors of the gradient -----------------------------------------------------------------------


def _gradient_error(layer, x, direction, damping=0.1):
    actual = tract_gradient(copy.deepcopy(layer), x, direction, damping)
    expected = reference.tract_gradient(layer, x, direction, damping)
    return error(actual, expected)


def _plain_error(layer, x, direction):
    plain = copy.deepcopy(layer)
    float32 = reference.plain_gradients(plain, x, direction)[1].clone()
    return error(float32, reference.plain_gradients(plain.double(), x.double(), direction.double())[1])


LARGE = {
    "CIFAR stem": (nn.Conv2d(3, 8, 3, padding=1), (24, 3, 32, 32)),
    "tokens": (nn.Linear(48, 16), (24, 64, 48)),
    "ImageNet stem": (nn.Conv2d(3, 8, 7, stride=2, padding=3), (6, 3, 64, 64)),
    "patches": (nn.Conv2d(3, 8, 8, stride=8), (30, 3, 64, 64)),
}


def _large(name):
    layer, shape = LARGE[name]
    x = torch.randn(shape)
    return layer, x, torch.randn_like(layer(x)).detach() / len(x)


@pytest.mark.parametrize("name", LARGE)
def test_on_standardised_inputs_the_gradient_is_as_exact_as_the_plain_one(name):
    layer, x, direction = _large(name)
    assert _gradient_error(layer, x, direction) <= max(1e-6, 1.2 * _plain_error(layer, x, direction))


@pytest.mark.parametrize("name", LARGE)
def test_on_raw_pixel_values_the_gradient_errs_by_a_ten_thousandth_at_most(name):
    layer, x, direction = _large(name)
    smooth = x.cumsum(-1) if x.dim() == 3 else nn.functional.avg_pool2d(x, 5, 1, 2)
    pixels = (smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255
    assert _gradient_error(layer, pixels, direction) <= 1e-4


@pytest.mark.parametrize("level", [1.0, 255.0])
@pytest.mark.parametrize("name", LARGE)
def test_on_flat_images_the_gradient_is_finite_and_exact(name, level):
    layer, x, direction = _large(name)
    flat = torch.full_like(x, level)
    exact = reference.plain_gradients(copy.deepcopy(layer).double(), flat.double(), direction.double())[1]
    moment = TrAct(copy.deepcopy(layer))
    geometry = moment._geometry()
    total = second_moment_op(flat, geometry.numbers(), 0.1)
    factor = factor_op(total, total.new_full((1,), geometry.count_rows(flat)), False, 0.1, name)
    product = solve_op(exact.float(), factor)
    X = reference.rows(layer, flat)
    expected = reference.preconditioned(exact.float(), X.mT @ X / X.shape[1], 0.1)
    assert product.isfinite().all()
    assert error(product, expected) <= 1e-6


@pytest.mark.parametrize(
    ("scale", "damping"), [(255.0, 0.1), (1.0, 1e-5), (1e20, 0.1)], ids=["raw pixels", "tiny damping", "overflow"]
)
def test_products_are_made_in_float64_where_roundings_would_show(scale, damping):
    layer, x, _ = _large("CIFAR stem")
    geometry = TrAct(copy.deepcopy(layer))._geometry()
    assert torch.equal(code.second_moment_for(scale * x, geometry, damping), code.second_moment(scale * x, geometry))
    assert not torch.equal(code.second_moment_for(x, geometry, 0.1), code.second_moment(x, geometry))


@pytest.mark.parametrize(("rows", "exact"), [(47, True), (48, False)])
def test_products_of_few_rows_are_made_in_float64(rows, exact):
    x, geometry = torch.randn(rows, 12), TrAct(nn.Linear(12, 4))._geometry()
    assert torch.equal(code.second_moment_for(x, geometry, 0.1), code.second_moment(x, geometry)) == exact


def test_autocast_does_not_reach_the_products():
    layer, x, _ = _large("tokens")
    geometry = TrAct(copy.deepcopy(layer))._geometry()
    with torch.autocast("cpu", torch.bfloat16):
        under = second_moment_op(x, geometry.numbers(), 0.1)
    assert torch.equal(under, second_moment_op(x, geometry.numbers(), 0.1))


# -- the solve ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(3, 5), (64, 40), (65, 40), (70, 1100)])
def test_the_factor_solves_for_all_rows_of_the_gradient(n, m):
    rows, gradient = torch.randn(2, 3 * n, n).double(), torch.randn(2, m, n).double()
    moment = rows.mT @ rows / len(rows[0])
    kept = moment.clone()
    product, succeeded = damped_solve(gradient, moment, 0.1)
    assert succeeded
    assert torch.equal(moment, kept)
    assert error(product @ (moment + 0.1 * torch.eye(n).double()), gradient) < 1e-12


# -- memory ---------------------------------------------------------------------------------------


def _peak_mib(run):
    return peak_bytes(run, torch.device("cpu")) / 2**20


def _all_that_is_added(layer, x):
    geometry, gradient = TrAct(layer)._geometry(), torch.zeros_like(layer.weight).detach()

    def run():
        total = second_moment_op(x, geometry.numbers(), 0.1)
        factor = factor_op(total, total.new_full((1,), geometry.count_rows(x)), False, 0.1, "layer")
        del total
        solve_op(gradient, factor)

    return run


@pytest.mark.parametrize("share", [0.125, 2])
@pytest.mark.parametrize("name", MAIN)
def test_the_layers_of_the_papers_networks_need_16_mib_more_whatever_the_batch(name, share):
    batch, *rest = MAIN[name].shape
    layer = MAIN[name].layer()
    assert _peak_mib(_all_that_is_added(layer, torch.randn(int(batch * share), *rest))) <= 16


@pytest.mark.parametrize("way_of", ["raw pixels", "transposed tokens", "circular", "one large image"])
def test_unusual_inputs_need_no_more(way_of):
    conv = nn.Conv2d(3, 8, 7, stride=2, padding=3)
    layer, x = {
        "raw pixels": (conv, 255 * torch.rand(8, 3, 224, 224)),
        "transposed tokens": (nn.Linear(48, 8), torch.randn(1024, 48, 196).mT),
        "circular": (nn.Conv2d(3, 8, 7, stride=2, padding=3, padding_mode="circular"), torch.randn(8, 3, 224, 224)),
        "one large image": (conv, torch.randn(1, 3, 1000, 800)),
    }[way_of]
    assert _peak_mib(_all_that_is_added(layer, x)) <= 16
