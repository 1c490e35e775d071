import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import spectral_norm

import tract
from tests.tract_layers import LAYERS, error
from tract.conjugate_gradients import conjugate_gradients
from tract.proxprop import ProxProp, ProxPropConv2d, ProxPropLayer, ProxPropLinear, proxprop_layer

TAU = 0.3
TRANSPOSED = {
    "transposed1d": (nn.ConvTranspose1d, (3, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (4, 3, 5)),
    "transposed2d": (nn.ConvTranspose2d, (3, 4, (3, 2)), {"stride": (2, 1), "dilation": (1, 2)}, (3, 3, 4, 5)),
    "transposed2d groups": (nn.ConvTranspose2d, (4, 6, 3), {"groups": 2, "padding": 3}, (2, 4, 6, 6)),
    "transposed2d few rows": (nn.ConvTranspose2d, (8, 2, 2), {"bias": False}, (1, 8, 2, 2)),
    "transposed3d": (nn.ConvTranspose3d, (2, 3, 2), {"stride": 2}, (2, 2, 2, 3, 2)),
}
OTHERS = {
    "batch norm": (nn.BatchNorm2d, (3,), {}, (4, 3, 5, 5)),
    "layer norm": (nn.LayerNorm, (6,), {}, (5, 6)),
    "embedding": (nn.Embedding, (7, 3), {}, None),
}
TABLE = LAYERS | TRANSPOSED
WITH_OTHERS = TABLE | OTHERS
SOME = ("linear", "linear few rows", "linear tokens", "conv2d everything", "conv2d few rows", "transposed2d groups")


def make(name, dtype=torch.float64, **options):
    """A plain layer, an input and a direction of its output's shape."""
    kind, arguments, layer_options, shape = WITH_OTHERS[name]
    layer = kind(*arguments, dtype=dtype, **layer_options, **options)
    x = torch.randint(7, (5, 4)) if shape is None else torch.randn(shape, dtype=dtype)
    return layer, x, torch.randn_like(layer(x)).detach()


def gradients(layer, x, direction):
    layer.zero_grad()
    (layer(x) * direction).sum().backward()
    return flat(p.grad for p in layer.parameters() if p.requires_grad)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def literal(layer, x, direction, tau, trained=None):
    """argmin 1/2 |A (theta - D) - (A theta - g)|^2 + |D|^2 / (2 tau), by the Jacobian A and a least-squares solver."""
    layer = copy.deepcopy(layer)
    held = {n: p.detach() for n, p in layer.named_parameters() if trained is None or n in trained}
    jacobian = torch.autograd.functional.jacobian(
        lambda *tensors: torch.func.functional_call(layer, dict(zip(held, tensors, strict=True)), x),
        tuple(held.values()),
    )
    A = torch.cat([part.flatten(direction.dim()).reshape(direction.numel(), -1) for part in jacobian], dim=1)
    identity = torch.eye(A.shape[1], dtype=A.dtype)
    stacked = torch.cat([A, identity / tau**0.5])
    target = torch.cat([direction.flatten(), torch.zeros(A.shape[1], dtype=A.dtype)])
    return torch.linalg.lstsq(stacked, target[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("tau", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("name", WITH_OTHERS)
def test_exact_step_minimises_the_proximal_objective(name, tau):
    layer, x, direction = make(name)
    expected = literal(layer, x, direction, tau)
    assert error(gradients(ProxProp(layer, tau, "prox_exact"), x, direction), expected) < 1e-9


@pytest.mark.parametrize("name", WITH_OTHERS)
def test_conjugate_gradients_with_enough_steps_equal_the_exact_step(name):
    layer, x, direction = make(name)
    exact = gradients(ProxProp(layer, TAU, "prox_exact"), x, direction)
    assert error(gradients(ProxProp(layer, TAU, "prox_cg300"), x, direction), exact) < 1e-9
    assert error(gradients(ProxProp(layer, TAU, "prox_cg1"), x, direction), exact) > 1e-9 or "linear one" in name


@pytest.mark.parametrize("name", SOME)
def test_each_iteration_lowers_the_objective(name):
    layer, x, direction = make(name)
    tau = 5.0

    def objective(step):
        names, sizes = zip(*((n, p.numel()) for n, p in layer.named_parameters()), strict=True)
        parts = zip(names, step.split(sizes), strict=True)
        moved = {n: dict(layer.named_parameters())[n].detach() - part.view_as(getattr(layer, n)) for n, part in parts}
        output = torch.func.functional_call(layer, moved, x)
        return 0.5 * (output - layer(x) + direction).square().sum() + step.square().sum() / (2 * tau)

    steps = [gradients(ProxProp(layer, tau, f"prox_cg{n}"), x, direction) for n in (1, 2, 3, 5)]
    values = [objective(step).item() for step in (torch.zeros_like(steps[0]), *steps)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 3
    assert objective(gradients(ProxProp(layer, tau, "prox_exact"), x, direction)).item() <= values[-1] + 1e-9


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg1", "prox_cg4"])
@pytest.mark.parametrize("name", WITH_OTHERS)
def test_small_steps_tend_to_tau_times_the_gradient(name, mode):
    layer, x, direction = make(name)
    plain = gradients(layer, x, direction)
    for tau in (1e-5, 1e-7):
        assert error(gradients(ProxProp(layer, tau, mode), x, direction), tau * plain) < 3e3 * tau


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "gradient"])
@pytest.mark.parametrize("name", TABLE)
def test_output_and_input_gradient_are_the_plain_layers_bit_for_bit(name, mode):
    layer, x, direction = make(name, torch.float32)
    found = []
    for each in (layer, ProxProp(copy.deepcopy(layer), TAU, mode)):
        mine = x.clone().requires_grad_()
        z = each(mine)
        (z * direction).sum().backward()
        found.append((z.detach(), mine.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradient_mode_is_plain():
    layer, x, direction = make("conv2d")
    assert torch.equal(gradients(ProxProp(layer, TAU, "gradient"), x, direction), gradients(layer, x, direction))


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "name", ["linear", "linear few rows", "conv2d everything", "transposed2d groups", "layer norm"]
)
def test_frozen_parameters_take_no_part_in_the_step(name, frozen, mode):
    layer, x, direction = make(name)
    getattr(layer, frozen).requires_grad_(False)
    (trained,) = {"weight", "bias"} - {frozen}
    expected = literal(layer, x, direction, TAU, trained=[trained])
    found = gradients(ProxProp(layer, TAU, mode if mode == "prox_exact" else "prox_cg200"), x, direction)
    assert error(found, expected) < 1e-9
    assert getattr(layer, frozen).grad is None


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
@pytest.mark.parametrize("name", [*SOME, "layer norm"])
def test_micro_batches_give_the_step_of_the_whole_batch(name, mode):
    layer, x, direction = make(name)
    whole = gradients(ProxProp(copy.deepcopy(layer), TAU, mode), x, direction)
    wrapped = nn.Sequential(ProxProp(layer, TAU, mode))
    earlier = [torch.randn_like(p) for p in wrapped.parameters()]
    for parameter, gradient in zip(wrapped.parameters(), earlier, strict=True):
        parameter.grad = gradient.clone()
    with tract.accumulate(wrapped):
        for part, way in zip(x.split(2), direction.split(2), strict=True):
            (wrapped(part) * way).sum().backward()
    added = flat(p.grad - g for p, g in zip(wrapped.parameters(), earlier, strict=True))
    assert error(added, whole) < 1e-9


def test_gradients_that_are_there_already_are_kept():
    layer, x, direction = make("linear")
    wrapped = ProxProp(layer, TAU, "prox_cg2")
    once = gradients(wrapped, x, direction)
    (wrapped(x) * direction).sum().backward()
    assert error(flat(p.grad for p in wrapped.parameters()), 2 * once) < 1e-12


def test_zero_grad_inside_accumulation_forgets_what_came_before():
    layer, x, direction = make("linear")
    alone = gradients(ProxProp(copy.deepcopy(layer), TAU, "prox_exact"), x, direction)
    model = nn.Sequential(ProxProp(layer, TAU, "prox_exact"))
    with tract.accumulate(model):
        model(2 * x).sum().backward()
        model.zero_grad()
        (model(x) * direction).sum().backward()
    assert error(flat(p.grad for p in model.parameters()), alone) < 1e-12


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
@pytest.mark.parametrize("name", ["linear", "linear few rows", "conv2d everything", "conv2d few rows"])
def test_in_float32_the_increment_is_not_a_difference_of_large_numbers(name, mode):
    layer, x, direction = make(name)
    with torch.no_grad():
        layer.weight += 1000.0
    expected = gradients(ProxProp(layer, TAU, mode), x, 1e-4 * direction)
    layer, x, direction = copy.deepcopy(layer).float(), x.float(), direction.float()
    assert error(gradients(ProxProp(layer, TAU, mode), x, 1e-4 * direction), expected) < 1e-4


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "linear few rows", "conv2d everything", "transposed2d"])
def test_half_precision_and_autocast(name, dtype, mode):
    layer, x, direction = make(name)
    half = copy.deepcopy(layer).to(dtype)
    rounded = copy.deepcopy(half).double()
    expected = gradients(ProxProp(rounded, TAU, mode), x.to(dtype).double(), direction.to(dtype).double())
    found = gradients(ProxProp(half, TAU, mode), x.to(dtype), direction.to(dtype))
    assert found.dtype == dtype
    assert error(found, expected) < 0.05
    wrapped = ProxProp(copy.deepcopy(layer).float(), TAU, mode)
    with torch.autocast("cpu", dtype):
        z = wrapped(x.float())
    assert z.dtype == dtype
    (z * direction.to(dtype)).sum().backward()
    exact = gradients(ProxProp(layer, TAU, mode), x, direction)
    assert wrapped.weight.grad.dtype == torch.float32
    assert error(flat(p.grad for p in wrapped.parameters()), exact) < 0.05


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_cost_of_conjugate_gradients_in_passes_of_the_layer(steps):
    """A forward pass of the layer is one; so is each product with A."""
    passes = []

    class Counted(nn.Conv2d):
        def forward(self, x):
            passes.append(torch.is_grad_enabled())
            return super().forward(x)

    layer = proxprop_layer(Counted)(3, 4, 3, mode=f"prox_cg{steps}")
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(passes) <= steps + 2


def test_conjugate_gradients_take_one_product_with_the_transpose_less_than_steps():
    taken = []
    A = torch.randn(9, 6, dtype=torch.float64)
    b = torch.randn(2, 6, dtype=torch.float64)

    def normal(p):
        image = p @ A.T
        return image.square().sum(-1), lambda: (taken.append(1), image @ A)[1]

    d = conjugate_gradients(b, normal, 0.5, 6)
    torch.testing.assert_close(d, b @ torch.linalg.inv(A.T @ A + 0.5 * torch.eye(6).double()))
    assert len(taken) == 5
    assert conjugate_gradients(torch.zeros_like(b), normal, 0.5, 3).count_nonzero() == 0


def test_the_originals_slip_is_an_option_and_no_conjugate_direction():
    layer, x, direction = make("conv2d")
    exact = gradients(ProxProp(layer, TAU, "prox_exact"), x, direction)
    errors = {v: error(gradients(ProxProp(layer, TAU, "prox_cg2", variant=v), x, direction), exact) for v in
              ("standard", "stabilised", "original")}  # fmt: skip
    assert errors["standard"] < errors["original"]
    assert abs(errors["standard"] - errors["stabilised"]) < 1e-3 * errors["standard"]


def test_running_statistics_are_updated_once_a_step():
    plain, x, direction = make("batch norm")
    wrapped = ProxProp(copy.deepcopy(plain), TAU, "prox_cg5")
    plain(x), (wrapped(x) * direction).sum().backward()
    assert torch.equal(plain.running_mean, wrapped.running_mean)
    assert wrapped.num_batches_tracked == plain.num_batches_tracked


@pytest.mark.parametrize("name", ["linear", "conv2d everything", "transposed2d groups"])
def test_drop_in_for_both_spellings(name):
    kind, arguments, options, _ = TABLE[name]
    new = proxprop_layer(kind)
    theirs = new(*arguments, tau_prox=0.05, optimization_mode="prox_cg3", **options)
    ours = new(*arguments, tau=0.05, mode="prox_cg3", **options)
    assert (theirs.tau, theirs.mode) == (ours.tau, ours.mode) == (0.05, "prox_cg3")
    assert (new(*arguments, **options).tau, new(*arguments, **options).mode) == (1.0, "prox_cg1")
    assert isinstance(ours, kind)


def test_state_dict_is_the_plain_layers_and_the_originals_is_read():
    plain, wrapped = nn.Conv2d(3, 4, 3), ProxPropConv2d(3, 4, 3)
    wrapped.load_state_dict(plain.state_dict())
    plain.load_state_dict(wrapped.state_dict())
    wrapped.load_state_dict(plain.state_dict() | {"tau_prox": torch.tensor([1.0])})
    model = nn.Sequential(nn.Linear(4, 4), ProxPropLinear(4, 2))
    model.load_state_dict(model.state_dict() | {"1.tau_prox": torch.tensor([1.0])})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None])
@pytest.mark.parametrize("name", ["linear", "conv2d everything", "layer norm"])
def test_copies_train_alike(name, copied):
    layer, x, direction = make(name)
    wrapped = ProxProp(layer, TAU, "prox_cg3", variant="stabilised")
    if copied is None:
        file = io.BytesIO()
        torch.save(wrapped, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        with tract.accumulate(nn.Sequential(wrapped)):
            twin = copied(wrapped)
    assert twin.variant == "stabilised"
    assert torch.equal(gradients(twin, x, direction), gradients(wrapped, x, direction))


def test_unwrap_gives_the_plain_layers_with_the_same_tensors():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    weight = model[0].weight
    model[0] = ProxProp(model[0])
    assert tract.unwrap(model) is model
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight
    assert not {"tau", "mode"} & set(vars(model[0]))


def test_torch_compile_trains_alike():
    model = nn.Sequential(ProxPropLinear(6, 8, mode="prox_cg2"), nn.ReLU(), ProxPropLinear(8, 3, mode="prox_exact"))
    x = torch.randn(10, 6)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    assert all(error(p.grad, g) < 1e-5 for p, g in zip(model.parameters(), plain, strict=True))


def test_no_second_derivative():
    layer = ProxPropLinear(3, 2)
    loss = layer(torch.randn(4, 3, requires_grad=True)).square().sum()
    (gradient,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_evaluation_is_the_plain_layer():
    layer, x, _ = make("conv2d")
    wrapped = ProxProp(layer).eval()
    with torch.no_grad():
        assert torch.equal(wrapped(x), layer(x))


def test_a_layer_of_several_inputs():
    layer = proxprop_layer(nn.Bilinear)(3, 4, 2, mode="prox_exact", tau=TAU).double()
    a, b, direction = torch.randn(6, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 2).double()
    (layer(a, b) * direction).sum().backward()
    features = torch.cat([torch.einsum("bi,bj->bij", a, b).flatten(1), torch.ones(6, 1).double()], dim=1)
    inverse = torch.linalg.inv(features.T @ features + torch.eye(13).double() / TAU)
    expected = direction.T @ features @ inverse
    assert error(layer.weight.grad.flatten(1), expected[:, :-1]) < 1e-9
    assert error(layer.bias.grad, expected[:, -1]) < 1e-9


def test_a_transposed_convolution_of_a_given_output_size():
    layer = nn.ConvTranspose2d(3, 2, 3, stride=2).double()
    x = torch.randn(2, 3, 4, 4).double()
    direction = torch.randn(2, 2, 10, 10).double()
    found = {}
    for mode in ("prox_exact", "prox_cg300"):
        wrapped = ProxProp(copy.deepcopy(layer), TAU, mode)
        (wrapped(x, output_size=(10, 10)) * direction).sum().backward()
        found[mode] = flat(p.grad for p in wrapped.parameters())
    assert error(*found.values()) < 1e-9


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.scale.square()


def test_a_layer_that_is_not_linear_in_its_parameters_is_refused():
    layer = proxprop_layer(Squared)()
    with pytest.raises(TypeError, match="expected a layer that is linear in its parameters, got Squared"):
        layer(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("make_layer", "kind", "message"),
    [
        (lambda: ProxPropLinear(3, 2, tau=0.0), ValueError, "tau > 0 and finite, got 0.0"),
        (lambda: ProxPropLinear(3, 2, tau=float("nan")), ValueError, "tau > 0 and finite, got nan"),
        (lambda: ProxPropLinear(3, 2, tau="1"), TypeError, "tau to be a number, got '1'"),
        (lambda: ProxPropLinear(3, 2, tau=1.0, tau_prox=1.0), ValueError, "tau or tau_prox, which are the same"),
        (lambda: ProxPropLinear(3, 2, mode="prox_cg0"), ValueError, "prox_cgN with N >= 1, got 'prox_cg0'"),
        (lambda: ProxPropLinear(3, 2, mode="exact"), ValueError, "got 'exact'"),
        (lambda: ProxPropLinear(3, 2, variant="fast"), ValueError, "variant to be one of standard"),
        (lambda: ProxPropLinear(3, 2, statistics="all"), ValueError, 'statistics="global" or "local"'),
        (lambda: proxprop_layer(nn.Linear(3, 2)), TypeError, "expected a plain layer class"),
        (lambda: proxprop_layer(ProxPropLinear), TypeError, "expected a plain layer class"),
        (lambda: proxprop_layer(nn.ReLU)(), TypeError, "parameters of its own and no layers inside, got ReLU"),
        (lambda: ProxProp(ProxPropLinear(3, 2)), TypeError, "wrap a layer once"),
        (lambda: ProxProp(spectral_norm(nn.Linear(3, 2))), TypeError, "got one that is computed from others"),
        (
            lambda: proxprop_layer(nn.Embedding)(3000, 2, mode="prox_exact"),
            ValueError,
            "at most 4096 parameters .* got 6000; use prox_cgN",
        ),
    ],
)
def test_errors_come_when_the_layer_is_made(make_layer, kind, message):
    with pytest.raises(kind, match=message):
        make_layer()


def test_an_infinite_input_is_named():
    layer = ProxPropLinear(3, 2, mode="prox_exact")
    with pytest.raises(tract.NonFiniteError, match="ProxPropLinear: expected finite inputs"):
        layer(torch.full((4, 3), float("inf")))


def test_layers_of_two_methods_accumulate_side_by_side():
    model = nn.Sequential(tract.TrActLinear(4, 3), ProxPropLinear(3, 2, mode="prox_exact"))
    x = torch.randn(8, 4)
    model(x).square().sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with tract.accumulate(model, tract.TrActLayer), tract.accumulate(model, ProxPropLayer):
        for part in x.split(3):
            model(part).square().sum().backward()
    assert all(error(p.grad, g) < 1e-5 for p, g in zip(model.parameters(), whole, strict=True))


def test_frozen_layers_and_layers_that_are_not_called_do_nothing_inside_accumulation():
    model = nn.ModuleList([ProxPropLinear(4, 3), ProxPropLinear(3, 2), ProxPropLinear(2, 2, mode="prox_exact")])
    model[0].requires_grad_(False)
    with tract.accumulate(model):
        model[1](model[0](torch.randn(5, 4))).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False, True, True]


def test_an_empty_batch_is_no_reason_to_refuse_a_layer():
    layer = proxprop_layer(nn.LayerNorm)(4)
    layer(torch.zeros(0, 4)).sum().backward()
    layer(torch.ones(2, 4))


def test_layers_of_one_class_are_one_class():
    assert proxprop_layer(nn.Linear) is ProxPropLinear
    assert issubclass(ProxPropLinear, ProxPropLayer)
