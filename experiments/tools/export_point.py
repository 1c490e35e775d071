"""Export a point of a finished subspace as a plain network's weights.

python experiments/tools/export_point.py RUN --alpha 0.3 --out line.pt          RUN: a run folder of a line or curve
python experiments/tools/export_point.py RUN --alpha 0.2 0.3 --out simplex.pt   of a simplex with three endpoints
python experiments/tools/export_point.py RUN --out midpoint.pt                  the midpoint

The file holds {"model": state dict}, with the keys of the plain network and batch-norm statistics of this point,
estimated from the run's training images (--no-estimate: those of training, which mix all points). `start_from=FILE`
begins a run with it.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.config import Config, build, config_hash, load_config, options_of
from experiments.models import build_model
from experiments.ranks import Ranks
from experiments.training import checkpoint
from experiments.training.assembly import build_batches, load_data
from runfolder.errors import EXIT_BAD_INPUT, Parser, UserError
from runfolder.files import write_atomically
from runfolder.folder import RunFolder, typed
from runfolder.states import State, state_of
from tract.methods.base import Method, Setting
from tract.methods.composed import Composed
from tract.methods.snapshots import SnapshotMethod
from tract.methods.subspace import SubspaceMethod
from tract.subspaces import plain_at, reestimated


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; returns the exit code."""
    try:
        options = _parser().parse(arguments)
        export(RunFolder(options.run), options.alpha, options.out, options.estimate)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"wrote {options.out}")
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=typed, metavar="RUN", help="folder of a finished run of a subspace")
    parser.add_argument("--alpha", type=float, nargs="*", metavar="NUMBER", help="the point (default: the midpoint)")
    parser.add_argument("--out", type=typed, required=True, metavar="FILE", help="where to write, a .pt file")
    parser.add_argument("--no-estimate", dest="estimate", action="store_false", help="keep training's statistics")
    return parser


def export(folder: RunFolder, alpha: Sequence[float] | None, out: Path, estimate: bool = True) -> None:
    """Write a point's weights.

    Args:
        folder: of a finished run.
        alpha: the point; None is the midpoint.
        out: the file.
        estimate: batch-norm statistics of this point.

    Raises:
        UserError: no such run, not finished, without a subspace, no such point, or a place that cannot be written to.
    """
    config = load_config(folder.config)
    if state_of(folder) != State.finished:
        raise UserError(f"expected a finished run, got {folder}, which is {state_of(folder)}; train it first.")
    method = build(config.method)
    parts = list(method.parts.values()) if isinstance(method, Composed) else [method]
    path = next((part.path for part in parts if isinstance(part, SubspaceMethod)), None)
    if path is None:
        raise UserError(f"expected a run with method=line, curve or simplex, got {config.method['name']}.")
    if any(isinstance(part, SnapshotMethod) for part in parts):
        raise UserError(f"expected a run without swa, whose snapshots are no point, got {config.method['name']}.")
    data = load_data(config, Ranks())
    model = _model(config, method, folder, len(data.classes), data.shape)
    try:
        point = plain_at(model, *(path.midpoint() if alpha is None else alpha))
    except ValueError as error:
        raise UserError(f"--alpha: {error}") from None
    if estimate:
        batches = build_batches(config, data, Ranks(), torch.device("cpu"))
        reestimated(point, (images for images, _ in batches.plain()))
        batches.close()
    content = io.BytesIO()
    torch.save({"model": point.state_dict()}, content)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content.getvalue())
    except OSError as error:
        raise UserError(f"expected --out to be a place to write to, got {out} ({error.strerror}).") from None


def _model(config: Config, method: Method, folder: RunFolder, classes: int, shape: dict) -> torch.nn.Module:
    """The run's network with its subspace and its last checkpoint's weights."""

    def network() -> torch.nn.Module:
        return build_model(config.model["name"], classes, **shape, **options_of(config.model))

    model = network()
    method.prepare(Setting(network, 0, 0))
    method.apply(model)
    path = folder.newest_checkpoint()
    if path is None:
        raise UserError(f"expected a checkpoint in {folder.checkpoints}, got none; restore it from a copy.")
    try:
        model.load_state_dict(checkpoint.load(path, config_hash(config))["model"])
    except checkpoint.CheckpointError as error:
        raise UserError(f"expected a good checkpoint, got: {error}; restore it from a copy.") from None
    return model


if __name__ == "__main__":
    sys.exit(main())
