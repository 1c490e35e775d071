"""Sort TinyImageNet's validation images into folders of their classes, for data=tiny_imagenet data.root=SOURCE.

python experiments/tools/sort_tiny_imagenet.py SOURCE

SOURCE is the download, unpacked: train/CLASS/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt. Each image
moves to val/CLASS/ by renaming, so that none is ever missing or half there. test/, whose images have no labels, becomes
unlabelled/. train/ is read as it is. Stopped or killed, the same command goes on; sorted already, it changes nothing.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import os

from tqdm import tqdm

from experiments.data.listing import list_folder
from runfolder.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError
from runfolder.folder import typed
from runfolder.printing import print_any_name, printable

_ANNOTATIONS = "val_annotations.txt"


def main(arguments: list[str] | None = None) -> int:
    """Sort the images.

    Returns:
        Exit code: 0 done, 2 bad input, 130 interrupted.
    """
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python experiments/tools/sort_tiny_imagenet.py",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=typed, metavar="SOURCE", help="folder with train/ and val/, as downloaded")
    options = parser.parse_args(arguments)
    print_any_name()
    try:
        print(printable(sort(options.source)))
        return 0
    except (UserError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def sort(source: Path) -> str:
    """Move the images in ``val/images/`` to ``val/CLASS/``; all is checked before the first one moves.

    Args:
        source: the folder with train/ and val/.

    Returns:
        A sentence about what was done.

    Raises:
        UserError: not TinyImageNet's folders, or images that the list of labels does not have once each.
    """
    labels = _labels(source)
    waiting, val = source / "val" / "images", source / "val"
    if (source / "test" / "images").is_dir() and (source / "unlabelled").exists():
        raise UserError(f"expected test/ or unlabelled/ in {source}, got both; remove one of them.")
    unsorted = _entries(waiting)
    unknown = sorted(unsorted - labels.keys())
    if unknown:
        raise UserError(
            f"expected a label in {val / _ANNOTATIONS} for every image in {waiting}, got none for "
            f"{_some(unknown)}; move them elsewhere."
        )
    placed = {label: _entries(val / label) for label in set(labels.values())}
    twice = sorted(name for name in unsorted if name in placed[labels[name]])
    if twice:
        raise UserError(
            f"expected each image once, got {_some(twice)} both in {waiting} and in a class; remove one of each."
        )
    missing = sorted(name for name, label in labels.items() if name not in unsorted and name not in placed[label])
    if missing:
        raise UserError(f"expected every image of {val / _ANNOTATIONS}, got no {_some(missing)}; unpack it again.")
    for name in tqdm(sorted(unsorted), desc="sorting", unit=" images", leave=False, disable=None):
        (val / labels[name]).mkdir(exist_ok=True)
        os.rename(waiting / name, val / labels[name] / name)
    if waiting.is_dir():
        waiting.rmdir()
    if (source / "test" / "images").is_dir():
        os.rename(source / "test", source / "unlabelled")
    return f"{len(unsorted):,} images sorted, {len(labels) - len(unsorted):,} were already: {val}"


def _labels(source: Path) -> dict[str, str]:
    """{image in val/: class}, where the classes are those of train/."""
    path = source / "val" / _ANNOTATIONS
    if not (source / "train").is_dir() or not path.is_file():
        inside = (
            ", ".join(sorted(entry.name for entry in source.iterdir())[:5]) if source.is_dir() else "no such folder"
        )
        cure = "give the folder of TinyImageNet's download, unpacked"
        raise UserError(f"expected train/ and val/{_ANNOTATIONS} in {source}, got {inside or 'nothing'}; {cure}.")
    classes, labels = set(list_folder(source / "train")[0]), {}
    for number, line in enumerate(path.read_text(errors="surrogateescape").splitlines(), start=1):
        name, label, *_ = [*line.split("\t"), "", ""]
        if label not in classes or not name or "/" in name or name in labels:
            raise UserError(
                f"expected an image of its own and a class of train/ in line {number} of {path}, got {line!r}; "
                "unpack it again."
            )
        labels[name] = label
    if set(labels.values()) != classes:
        lost = sorted(classes - set(labels.values()))
        raise UserError(
            f"expected labels in {path} of every class of train/, got none of {_some(lost)}; unpack it again."
        )
    return labels


def _entries(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}"


if __name__ == "__main__":
    sys.exit(main())
