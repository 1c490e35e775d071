"""The table that drives the laws for all methods: method name -> overrides of a tiny quickstart run."""

from experiments.config import Config, compose_config

TINY = {
    "model": "vit_small",
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "epochs": 2,
    "batch_size": 128,
    "optim.lr": 0.003,
    "runtime.progress": False,
    "runtime.threads": 1,
}

METHODS = {
    "vanilla": {},
    "tract": {"method.lambda_": 0.1},
    "patchnorm": {},
    "dual_patchnorm": {},
    "proxprop": {"method.mode": "prox_cg3"},
    "line": {"method.points": 3},
    "curve": {"method.points": 3, "method.layerwise": True},
    "simplex": {"method.members": 2},
    "oialr": {"method.delay": 3, "method.stability_frequency": 2, "method.sigma_cutoff_fraction": 0.3},
    "whitening": {"method.images": 200},
    "swa": {"method.start": 0.0, "method.count": 3, "method.samples": 2, "method.points": 2},
}
# Methods that need a patch embedding, which the convolutions of resnet_small are not.
ON_PATCHES = ("patchnorm", "dual_patchnorm")
METHODS_AND_MODELS = [
    (method, model)
    for method in METHODS
    for model in ("vit_small", "resnet_small")
    if model != "resnet_small" or method not in ON_PATCHES
]


def tiny_config(folder, method="vanilla", **overrides) -> Config:
    """A run of seconds under ``folder``; ``__`` in a keyword stands for a dot."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    model = {key: value for key, value in TINY.items() if not key.startswith("model.") or "model" not in changes}
    runs = {"runtime.runs": str(folder), "method": method}
    return compose_config("quickstart", model | METHODS[method] | runs | changes)
