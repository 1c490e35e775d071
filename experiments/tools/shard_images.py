"""Pack ImageNet's folders into a few large files, resized, for data=imagenet data.root=TARGET.

python experiments/tools/shard_images.py SOURCE TARGET              shorter side 256, JPEG quality 90
python experiments/tools/shard_images.py SOURCE TARGET --size 0     the images as they are

SOURCE has train/CLASS/*.JPEG and val/CLASS/*.JPEG. TARGET gets train-00000.tar, ..., val-00000.tar, ...
(uncompressed; any tar reads them) and, last, index.npz. Images are only ever made smaller; one that is small
enough is kept byte for byte. Stopped or killed, the same command goes on with the first archive that is missing.
Until index.npz is there, TARGET/parts/ holds what is needed for that, and the copy is not taken for a whole one.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import IO

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.data.listing import Listing, list_folder, list_images
from experiments.data.pixels import UNREADABLE, as_rgb, fault
from experiments.data.shards import FIELDS, INDEX, SPLITS, read_about, write_index
from runfolder.errors import EXIT_BAD_INPUT, EXIT_BUSY, EXIT_INTERRUPTED, RunBusyError, UserError
from runfolder.files import TEMPORARY, read_json, remove_leftovers, write_atomically, write_json
from runfolder.folder import typed
from runfolder.printing import print_any_name, printable

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Archive:
    """A tar file to be made: images ``first`` to ``end`` of a split."""

    split: str
    number: int
    first: int
    end: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.split}-{self.number:05}.tar"


def main(arguments: list[str] | None = None) -> int:
    """Make or complete the copy.

    Returns:
        Exit code: 0 done, 2 bad input, 69 another process makes this copy, 130 interrupted.
    """
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python experiments/tools/shard_images.py",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=typed, metavar="SOURCE", help="folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("target", type=typed, metavar="TARGET", help="folder for the copy, new or begun")
    parser.add_argument("--size", type=int, default=256, help="shorter side in pixels, 0: as it is (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of resized JPEGs, 1 to 95 (%(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="images in an archive (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, 0: only this one (%(default)s)"
    )
    options = parser.parse_args(arguments)
    print_any_name()
    try:
        for name, least, most in (("size", 0, 10**5), ("quality", 1, 95), ("images", 1, 10**7), ("workers", 0, 10**4)):
            value = getattr(options, name)
            if not least <= value <= most:
                raise UserError(f"expected --{name} from {least} to {most}, got {value}.")
        print(shard(options.source, options.target, options.size, options.quality, options.images, options.workers))
        return 0
    except RunBusyError as error:
        return _leave(EXIT_BUSY, f"busy: {error}")
    except (UserError, OSError) as error:
        return _leave(EXIT_BAD_INPUT, f"error: {error}")
    except BrokenProcessPool:
        return _leave(1, "failed: a process was killed, perhaps for its memory; the same command goes on.")
    except KeyboardInterrupt:
        return _leave(EXIT_INTERRUPTED, "interrupted; the same command goes on")


def _leave(code: int, sentence: str) -> int:
    print(printable(sentence), file=sys.stderr)
    return code


def shard(source: Path, target: Path, size: int, quality: int, images: int, workers: int) -> str:
    """Make or complete a sharded copy.

    Args:
        source: the folder with train/ and val/.
        target: the folder of the copy.
        size: what longer shorter sides are reduced to; 0 keeps every image as it is.
        quality: of the JPEGs that are made.
        images: how many an archive holds.
        workers: processes that resize.

    Returns:
        A sentence about what was done.

    Raises:
        UserError: bad folders, unreadable images (all are named), or another copy in the target.
        RunBusyError: another process makes this copy.
    """
    listings = _listings(source)
    settings = {"size": size, "quality": quality if size else None, "images": images, "source": _digest(listings)}
    parts = target / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with _held(parts) as lock:
        if (target / INDEX).is_file():
            _require_same(target, read_about(target)["settings"], settings)
            shutil.rmtree(parts)
            return f"whole already: {target}"
        begun = read_json(parts / "settings.json")
        if begun:
            _require_same(target, begun, settings)
        write_json(parts / "settings.json", settings)
        remove_leftovers(target)
        remove_leftovers(parts)
        archives = [
            Archive(split, number, first, min(first + images, len(listing)))
            for split, listing in listings.items()
            for number, first in enumerate(range(0, len(listing), images))
        ]
        with _mapping(workers, lock) as mapping:
            contents = functools.partial(mapping, functools.partial(prepare, size=size, quality=quality))
            _make_missing(target, archives, listings, contents)
        total = _finish(target, archives, listings, settings)
        shutil.rmtree(parts)
    return f"{sum(map(len, listings.values())):,} images, {total / 1e9:.2f} GB in {len(archives)} archives: {target}"


def _listings(source: Path) -> dict[str, Listing]:
    for split in SPLITS:
        if not (source / split).is_dir():
            raise UserError(f"expected a folder {split}/ with one folder per class in {source}, got none.")
    classes, others = ({split: list_folder(source / split)[n] for split in SPLITS} for n in (0, 1))
    if classes["train"] != classes["val"] or not classes["train"]:
        only = ", ".join(sorted(set(classes["train"]) ^ set(classes["val"]))[:5]) or "none"
        raise UserError(f"expected the same class folders in train/ and val/ of {source}, got differences: {only}.")
    for split, names in others.items():
        if names:
            raise UserError(f"expected only class folders in {source / split}, got {names[0]}; move it elsewhere.")
    listings = {split: list_images(source / split, classes[split]) for split in SPLITS}
    for split, listing in listings.items():
        counts = np.bincount(listing.labels, minlength=len(listing.classes))
        if not counts.all():
            raise UserError(f"expected images in {source / split / listing.classes[int(counts.argmin())]}, got none.")
    return listings


def _digest(listings: dict[str, Listing]) -> str:
    """Tells lists of images apart; where they lie and what is in them does not count."""
    digest = hashlib.sha256()
    for listing in listings.values():
        digest.update(
            os.fsencode("\n".join(listing.classes)) + listing.labels.tobytes() + b"\n".join(listing.names.tolist())
        )
    return digest.hexdigest()[:16]


def _require_same(target: Path, there: dict, wanted: dict) -> None:
    differences = [f"{key} {there.get(key)}, not {wanted[key]}" for key in wanted if there.get(key) != wanted[key]]
    if differences:
        raise UserError(
            f"expected a new folder or the same copy in {target}, got one with {'; '.join(differences)}; "
            "give the same options and images, or another TARGET."
        )


@contextmanager
def _held(parts: Path) -> Iterator[int]:
    """One process at a time makes a copy; the kernel lets go when it ends, however it ends. Gives the lock."""
    with open(parts / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusyError(f"another process makes {parts.parent}") from None
        yield file.fileno()


# -- making --------------------------------------------------------------------------------


def _make_missing(target: Path, archives: list[Archive], listings: dict[str, Listing], contents: Callable) -> None:
    bad: list[str] = []
    images = sum(archive.end - archive.first for archive in archives)
    with tqdm(total=images, desc=target.name, unit=" images", disable=None) as bar:
        for archive in archives:
            if not _is_made(target, archive):
                paths = (listings[archive.split][index] for index in range(archive.first, archive.end))
                bad += _make(target, archive, listings[archive.split], contents(paths), bar)
            else:
                bar.update(archive.end - archive.first)
    if bad:
        (target / "parts" / "bad.txt").write_bytes(os.fsencode("\n".join(bad) + "\n"))
        raise UserError(
            f"expected readable images, got {len(bad)} that are not: {'; '.join(bad[:5])}"
            f"{f' and more in {target}/parts/bad.txt' if len(bad) > 5 else ''}; replace them (or remove them and "
            "begin in another TARGET), and the same command goes on."
        )


@contextmanager
def _mapping(workers: int, lock: int) -> Iterator[Callable]:
    """``map``, done by so many processes."""
    if workers == 0:
        yield map
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_worker, (os.getpid(), lock))
    try:
        yield functools.partial(pool.map, chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int, lock: int) -> None:
    """A worker leaves Ctrl-C to its parent, does not hold the copy, and ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(lock)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare(path: Path, size: int, quality: int) -> bytes | str:
    """The bytes to pack for an image, or what is wrong with it.

    A shorter side above ``size`` becomes ``size`` (bicubic with antialiasing); others keep their bytes.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # all of it, also where it is kept: a damaged one shows here, not in a training
            rgb = as_rgb(image)
            if size == 0 or min(image.size) <= size:
                return content
            shorter = min(image.size)
            smaller = tuple(max(size, round(side * size / shorter)) for side in image.size)
            buffer = io.BytesIO()
            rgb.resize(smaller, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
            return buffer.getvalue()
    except UNREADABLE as error:
        return f"{path} ({fault(error)})"


def _make(target: Path, archive: Archive, listing: Listing, contents: Iterator[bytes | str], bar: tqdm) -> list[str]:
    """Write one archive and its part of the index, unless images are bad, which are returned."""
    bad, fields = [], {name: [] for name in ("offset", "length", "crc32")}
    path = target / archive.name
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for index, content in zip(range(archive.first, archive.end), contents, strict=True):
                bar.update()
                if isinstance(content, str):
                    bad.append(content)
                elif not bad:
                    fields["offset"].append(_add(tar, listing[index].relative_to(listing.folder), content))
                    fields["length"].append(len(content))
                    fields["crc32"].append(zlib.crc32(content))
            tar.close()
            _flush(file)
        if not bad:
            os.replace(temporary, path)
            _write_part(target, archive, fields, path)
    finally:
        temporary.unlink(missing_ok=True)
    return bad


def _add(tar: tarfile.TarFile, name: Path, content: bytes) -> int:
    """Append a member; returns where its bytes begin."""
    member = tarfile.TarInfo(name.as_posix())
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - -(-len(content) // _BLOCK) * _BLOCK


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _part(target: Path, archive: Archive) -> Path:
    return target / "parts" / f"{archive.name}.npz"


def _write_part(target: Path, archive: Archive, fields: dict[str, list], path: Path) -> None:
    with open(path, "rb") as file:
        about = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    buffer = io.BytesIO()
    arrays = {name: np.array(values, FIELDS[name]) for name, values in fields.items()}
    np.savez(buffer, **arrays, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    write_atomically(_part(target, archive), buffer.getvalue())


def _read_part(target: Path, archive: Archive) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(_part(target, archive), allow_pickle=False) as file:
        arrays = dict(file)
    return json.loads(arrays.pop("about").tobytes()), arrays


def _is_made(target: Path, archive: Archive) -> bool:
    """Whether an archive is whole: its part of the index is written after it, both by renaming."""
    try:
        return _read_part(target, archive)[0]["bytes"] == (target / archive.name).stat().st_size
    except FileNotFoundError:
        return False


def _finish(target: Path, archives: list[Archive], listings: dict[str, Listing], settings: dict) -> int:
    """Write the index; returns the bytes of all archives."""
    parts = {archive: _read_part(target, archive) for archive in archives}
    splits = {}
    for split, listing in listings.items():
        mine = [archive for archive in archives if archive.split == split]
        fields = {name: np.concatenate([parts[a][1][name] for a in mine]) for name in ("offset", "length", "crc32")}
        fields["archive"] = np.repeat([a.number for a in mine], [a.end - a.first for a in mine])
        fields["label"], fields["name"] = listing.labels, listing.names
        splits[split] = fields | {name: fields[name].astype(kind) for name, kind in FIELDS.items()}
    about = {
        "classes": listings["train"].classes,
        "settings": settings,
        "archives": {archive.name: parts[archive][0] for archive in archives},
        "versions": {"pillow": Image.__version__},
    }
    write_index(target, about, splits)
    return sum(archive["bytes"] for archive in about["archives"].values())


if __name__ == "__main__":
    sys.exit(main())
