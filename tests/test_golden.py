"""The checker of ``golden.py``, on vectors of our own making: literal loops in NumPy, and by hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from tests import golden

SHARED = Path(os.environ.get("TRACT_DATA", "")).parent / "golden"


def _by_hand(x, weight, bias, g, tau, mode, slip):
    """The original's step for a linear layer, one output unit at a time, as a difference of two solutions."""
    A = np.hstack([x, np.ones((len(x), 1))])
    H, steps = A.T @ A + np.eye(A.shape[1]) / tau, []
    for unit in range(len(weight)):
        steps.append(A.T @ g[:, unit])
    b = np.stack(steps, axis=1)
    if mode == "gradient":
        return b
    if mode == "prox_exact":
        before = np.vstack([weight.T, bias])
        return before - np.linalg.solve(H, A.T @ (A @ before - g) + before / tau)
    d, r, count = np.zeros_like(b), b.copy(), int(mode.removeprefix("prox_cg"))
    p, rs = r.copy(), (r * r).sum(0)
    for k in range(1, count + 1):
        q = H @ p
        alpha = rs / ((p * q).sum(0) + 1e-6)
        d += alpha * p
        if k == count:
            break
        r = r - alpha * q
        new = (r * r).sum(0)
        if new.max() < 1e-4 * (b * b).sum(0).mean():
            break
        p = r + (r if slip and k == 1 else p) * new / (rs + 1e-6)
        rs = new
    return d


def _proxprop_case(folder, mode, tau, seed):
    rng, name = np.random.default_rng(seed), f"ours_{mode}"
    x, weight, bias, g = (rng.normal(size=size) for size in ((9, 5), (4, 5), (4,), (9, 4)))
    files = {"f64": True, "fixedcg_f64": False} if "cg" in mode else {"f64": True}
    for kind, slip in files.items():
        d = _by_hand(x, weight, bias, g, tau, mode, slip)
        arrays = {"x": x, "weight": weight, "bias": bias, "grad_output": g, "tau_effective": np.float64(tau)}
        arrays |= {"output": x @ weight.T + bias, "grad_input": g @ weight, "grad_weight": d[:-1].T, "grad_bias": d[-1]}
        np.savez(folder / f"{name}.{kind}.npz", **arrays)
    return {
        "name": name,
        "kind": "linear",
        "module": "Linear",
        "mode": mode,
        "in_features": 5,
        "out_features": 4,
        "bias": True,
        "files": {kind: f"{name}.{kind}.npz" for kind in files},
        "outputs": ["output", "grad_input", "grad_weight", "grad_bias"],
    }


@pytest.fixture
def proxprop(tmp_path):
    modes = ("gradient", "prox_exact", "prox_cg1", "prox_cg3")
    cases = [_proxprop_case(tmp_path, mode, 0.7, seed) for seed, mode in enumerate(modes)]
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": cases}))
    return tmp_path, cases


def test_vectors_by_hand_agree(proxprop, capsys):
    folder, cases = proxprop
    assert golden.main(["proxprop", str(folder)]) == 0
    assert capsys.readouterr().out == f"{len(cases)} of {len(cases)} cases agree\n"


@pytest.mark.parametrize("key", ["grad_weight", "grad_bias", "output", "grad_input"])
@pytest.mark.parametrize("kind", ["f64", "fixedcg_f64"])
def test_a_wrong_number_in_any_file_disagrees(proxprop, capsys, key, kind):
    folder, cases = proxprop
    path = folder / f"ours_prox_cg3.{kind}.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {key: arrays[key] * (1 + 1e-6)})
    assert golden.main(["proxprop", str(folder)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"ours_prox_cg3: {kind} {key} in torch.float64")
    assert last == f"{len(cases) - 1} of {len(cases)} cases agree"


def test_what_is_not_known_or_cannot_be_read_disagrees(proxprop, capsys):
    folder, cases = proxprop
    more = [{"name": "new", "kind": "transformer", "files": cases[0]["files"]}, cases[1] | {"files": {"f64": "no.npz"}}]
    (folder / "manifest.json").write_text(json.dumps({"cases": [*cases, *more]}))
    assert golden.main(["proxprop", str(folder)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == "new: unknown kind 'transformer'"
    assert lines[1].startswith("ours_prox_exact: FileNotFoundError")
    assert last == "4 of 6 cases agree"


def _subspaces_cases(folder):
    """A 1x1 convolution on a line, by einsum; a cosine schedule and label smoothing by their formulas."""
    rng = np.random.default_rng(5)
    x, g, first, second = (rng.normal(size=size) for size in ((2, 3, 4, 5), (2, 6, 4, 5), (6, 3, 1, 1), (6, 3, 1, 1)))
    alpha = 0.3
    weight = (1 - alpha) * first + alpha * second
    gradient = np.einsum("bohw,bihw->oi", g, x)[..., None, None]
    arrays = {"x": x, "grad_output": g, "coef": np.array([alpha]), "effective_weight": weight}
    arrays |= {
        "output": np.einsum("oi,bihw->bohw", weight[..., 0, 0], x),
        "param/weight": first,
        "param/weight1": second,
    }
    arrays |= {"grad/x": np.einsum("oi,bohw->bihw", weight[..., 0, 0], g)}
    arrays |= {"grad/weight": (1 - alpha) * gradient, "grad/weight1": alpha * gradient}
    np.savez(folder / "conv.npz", **arrays)
    epochs, warm = np.arange(30), 4
    rates = 0.2 * (epochs + 1) / warm
    rates[warm:] = 0.1 * (1 + np.cos(np.pi * (epochs[warm:] - warm) / (30 - warm)))
    np.savez(folder / "lr.npz", lr=rates)
    scores, labels, smoothing = rng.normal(size=(7, 4)), rng.integers(4, size=7), 0.2
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    wanted = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    np.savez(
        folder / "ls.npz",
        x=scores,
        y=labels,
        loss=-(wanted * log_p).sum() / 7,
        **{"grad/x": (np.exp(log_p) - wanted) / 7},
    )
    conv = {"in_channels": 3, "out_channels": 6, "kernel_size": 1, "bias": False, "stride": 1, "padding": 0}
    line = {"kind": "line", "cls": "LinesConv", "conv": conv, "dtype": "torch.float64"}
    how = {"policy": "cosine_lr", "base_lr": 0.2, "epochs": 30, "warmup_length": warm, "num_models": 1}
    return [
        {"name": "conv", "family": "conv", "file": "conv.npz", **line},
        {"name": "lr", "family": "lr", "file": "lr.npz", "swa_lr": 0.05, "swa_start": 0.75, **how},
        {"name": "ls", "family": "label_smoothing", "file": "ls.npz", "smoothing": smoothing},
    ]


def test_vectors_of_subspaces_by_hand(tmp_path, capsys):
    cases = _subspaces_cases(tmp_path)
    (tmp_path / "manifest.json").write_text(
        json.dumps({"cases": [*cases, {"name": "new", "family": "sphere", "file": "lr.npz"}]})
    )
    assert golden.main(["subspaces", str(tmp_path)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("new: ")
    assert last == "3 of 4 cases agree"


@pytest.mark.parametrize(
    ("file", "key"), [("conv", "output"), ("conv", "grad/weight1"), ("lr", "lr"), ("ls", "grad/x")]
)
def test_a_wrong_number_of_subspaces_disagrees(tmp_path, capsys, file, key):
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": _subspaces_cases(tmp_path)}))
    arrays = dict(np.load(tmp_path / f"{file}.npz"))
    np.savez(tmp_path / f"{file}.npz", **arrays | {key: arrays[key] * (1 + 1e-7)})
    assert golden.main(["subspaces", str(tmp_path)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{file}: ")
    assert key in line
    assert last == "2 of 3 cases agree"


def _oialr_cases(folder):
    """An update by NumPy's SVD, stability as cosines of polar factors, and a schedule counted out."""
    rng = np.random.default_rng(8)
    u, vh = (np.linalg.qr(rng.normal(size=size))[0] for size in ((9, 5), (5, 5)))
    s = np.diag([1.0, 0.7, 0.4, 0.2, 0.1]) @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    left, sigma, right = np.linalg.svd(s)
    after = {"u1": u @ left[:, :3], "s1": np.diag(sigma[:3]), "vh1": right[:3] @ vh}
    weight = after["u1"] @ after["s1"] @ after["vh1"]
    np.savez(folder / "update.npz", u0=u, s0=s, vh0=vh, sigma_full=sigma, w1=weight, **after)
    one, other = rng.normal(size=(7, 4)), rng.normal(size=(7, 4))
    bases = [w @ np.linalg.inv(scipy.linalg.sqrtm(w.T @ w)) for w in (one, other)]
    columns = (bases[0] * bases[1]).sum(0) / np.linalg.norm(bases[0], axis=0) / np.linalg.norm(bases[1], axis=0)
    numbers = {"basis1": bases[0], "basis2": bases[1], "s1": np.linalg.svd(one)[1], "per_column": columns}
    np.savez(folder / "stability.npz", w1=one, w2=other, stability=columns.mean(), **numbers)
    events = [(3, 2), (5, 1), (5, 2), (7, 0), (7, 1), (7, 2)]
    np.savez(folder / "schedule.npz", events=events, checks=3, next_iteration=0)
    options = {"delay": 3, "stability_frequency": 2, "network_layer_perc_step": 0.99}
    update = {"layer": "linear", "shape": [9, 5], "sigma_cutoff_fraction": 0.3, "reinit_shapes": True}
    return [
        {"name": "update", "kind": "rank_update", "config": update | {"k_before": 5, "k_after": 3}},
        {"name": "stability", "kind": "stability_metric", "config": {}},
        {
            "name": "schedule",
            "kind": "check_schedule",
            "config": {"low_rank_layers": 3, "steps": 8, "options": options},
        },
    ]


def _written(folder, cases):
    cases = [{"file": f"{case['name']}.npz", "tolerance_abs": 1e-6} | case for case in cases]
    (folder / "manifest.json").write_text(json.dumps({"cases": cases}))


def test_vectors_of_oialr_by_hand(tmp_path, capsys):
    _written(tmp_path, [*_oialr_cases(tmp_path), {"name": "new", "kind": "sphere", "file": "update.npz"}])
    assert golden.main(["oialr", str(tmp_path)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line == "new: unknown kind 'sphere'"
    assert last == "3 of 4 cases agree"


@pytest.mark.parametrize(
    ("file", "key"),
    [("update", "s1"), ("update", "u1"), ("update", "w1"), ("stability", "per_column"), ("schedule", "checks")],
)
def test_a_wrong_number_of_oialr_disagrees(tmp_path, capsys, file, key):
    _written(tmp_path, _oialr_cases(tmp_path))
    arrays = dict(np.load(tmp_path / f"{file}.npz"))
    np.savez(tmp_path / f"{file}.npz", **arrays | {key: arrays[key] * 1.0001 + (key == "checks")})
    assert golden.main(["oialr", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 3 cases agree"


@pytest.mark.parametrize("words", [[], ["proxprop"], ["tract", "."], ["proxprop", "nowhere"]])
def test_wrong_words_are_refused(words, capsys):
    assert golden.main(words) == 2
    assert capsys.readouterr().out.startswith("expected ")


@pytest.mark.parametrize("method", golden.METHODS)
def test_the_originals_vectors_agree(method, capsys):
    if not (SHARED / method / "manifest.json").is_file():
        pytest.skip("no folder golden beside TRACT_DATA")
    assert golden.main([method, str(SHARED / method)]) == 0, capsys.readouterr().out
