"""CIFAR-10 (Krizhevsky 2009) from the official python or binary files, or from JPEG copies, which it says."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from initperf.core.checks import InitPerfError, InitPerfImportError, check, fail
from initperf.experiments.data.data_set import SPLIT_SEED, DataSet, Split, permutation, sha256

TRAIN, TEST = 50_000, 10_000
VALIDATION = 5000  # Frankle & Carbin: 45K train, 5K validation, 10K test
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
_ROW = 1 + 3 * 32 * 32  # a record of the binary files: label, red, green, blue
_GET = (
    "Download cifar-10-python.tar.gz or cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
    "unpack it or not, and name its folder with --data-dir"
)
Arrays = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # train pixels (N, 3, 32, 32) uint8, labels, test pixels, labels


def cifar10(folder: str | Path | None) -> DataSet:
    """CIFAR-10 from `folder`: unpacked or packed, whichever of the layouts is there. Images are (3, 32, 32), normalized by channel."""
    if folder is None or not Path(folder).is_dir():
        fail("a folder with CIFAR-10", f"{folder}. {_GET}")
    folder = Path(folder)
    for reader in (_unpacked, _packed):
        found = reader(folder)
        if found is not None:
            return _data_set(*found)
    raise InitPerfError(f"Expected CIFAR-10 in {folder}. Got none of its files. {_GET}.")


def _data_set(arrays: Arrays, what: str) -> DataSet:
    train, labels, test, test_labels = arrays
    for pixels, answers, count, part in ((train, labels, TRAIN, "train"), (test, test_labels, TEST, "test")):
        check(len(pixels) == len(answers) == count, f"{count} {part} images", f"{len(pixels)}, {len(answers)} labels")
        check(int(answers.max()) < 10, "labels below 10", int(answers.max()))
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(train[:, c].ravel(), minlength=256) for c in range(3)]) / train[:, 0].size
    mean = counts @ values
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1))
    mean, std = mean.round(4), std.round(4)
    order = permutation(len(train), SPLIT_SEED, "cifar10").numpy()
    val, rest = order[:VALIDATION], order[VALIDATION:]

    def split(pixels: np.ndarray, answers: np.ndarray) -> Split:
        x = pixels.astype(np.float32)
        x /= np.float32(255)
        x -= mean.astype(np.float32)[:, None, None]
        x /= std.astype(np.float32)[:, None, None]
        return Split(torch.from_numpy(x), torch.from_numpy(answers.astype(np.int64)))

    about = (
        f"CIFAR-10 (Krizhevsky 2009), {what}, split {len(rest)}/{len(val)}/{len(test)}, "
        f"normalized by mean {mean.tolist()}, std {std.tolist()}"
    )
    parts = split(train[rest], labels[rest]), split(train[val], labels[val]), split(test, test_labels)
    return DataSet("cifar10", about, 10, *parts, sha256(train, labels, test, test_labels))


def _unpacked(folder: Path) -> tuple[Arrays, str] | None:
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for kind, (end, read) in _LAYOUTS.items():
            names = [f"{n}{end}" for n in (*_TRAIN, "test_batch")]
            if (place / names[0]).is_file():
                for name in names:
                    check((place / name).is_file(), f"{name} in {place}", f"no such file. {_GET}")
                return _join([read((place / name).read_bytes(), name) for name in names]), f"the official {kind} files"
    return None


def _packed(folder: Path) -> tuple[Arrays, str] | None:
    for path in sorted(folder.glob("*.tar.gz")):
        try:
            with tarfile.open(path) as archive:
                files = ((m.name, archive.extractfile(m)) for m in archive if m.isfile())
                contents = ((name, file.read()) for name, file in files if file is not None)
                if path.name.startswith("cifar-10-"):
                    return _official(contents, path)
                if "jpg" in path.name or "jpeg" in path.name:
                    return _jpeg(contents), "lossy JPEG copies: not comparable digit for digit with the official images"
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            fail(f"a readable archive {path}", f"{error} (damaged download?). {_GET}")
    return None


def _official(contents: Iterator[tuple[str, bytes]], path: Path) -> tuple[Arrays, str]:
    found = {Path(name).name: data for name, data in contents}
    for kind, (end, read) in _LAYOUTS.items():
        names = [f"{n}{end}" for n in (*_TRAIN, "test_batch")]
        if all(name in found for name in names):
            return _join([read(found[name], name) for name in names]), f"the official {kind} files"
    raise InitPerfError(
        f"Expected {', '.join(_TRAIN)} and test_batch in {path}. Got {', '.join(sorted(found))}. {_GET}."
    )


def _join(batches: list[tuple[np.ndarray, np.ndarray]]) -> Arrays:
    *train, (test, test_labels) = batches
    return np.concatenate([p for p, _ in train]), np.concatenate([y for _, y in train]), test, test_labels


class _Arrays(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, and nothing that could run code."""

    _ALLOWED = {("ndarray", "numpy"), ("dtype", "numpy")}

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (name, module) in self._ALLOWED:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of CIFAR-10")


def _python(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = _Arrays(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = np.asarray(found[b"data"], np.uint8), np.asarray(found[b"labels"], np.uint8)
        return pixels.reshape(-1, 3, 32, 32), labels
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError, AttributeError, IndexError) as error:
        fail(f"a batch of CIFAR-10 in {name}", f"{type(error).__name__}: {error}. {_GET}")


def _binary(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    check(len(data) > 0 and len(data) % _ROW == 0, f"records of {_ROW} bytes in {name}", f"{len(data)} bytes. {_GET}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, _ROW)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


_LAYOUTS: dict[str, tuple[str, Callable[[bytes, str], tuple[np.ndarray, np.ndarray]]]] = {
    "python": ("", _python),
    "binary": (".bin", _binary),
}


def _jpeg(contents: Iterator[tuple[str, bytes]]) -> Arrays:
    """train/<class>/NNNN.jpg and test/<class>/NNNN.jpg, in order of class and number."""
    try:
        from PIL import Image
    except ImportError:
        fail("Pillow, which reads JPEG (pip install pillow)", "no such package", kind=InitPerfImportError)
    found: dict[str, list[tuple[int, str, np.ndarray]]] = {"train": [], "test": []}
    for name, data in contents:
        parts = Path(name).parts[-3:]
        if len(parts) == 3 and parts[0] in found and parts[1] in CLASSES and name.endswith((".jpg", ".jpeg")):
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image.convert("RGB"), np.uint8).transpose(2, 0, 1)
            check(pixels.shape == (3, 32, 32), f"images of 32 x 32 pixels in {name}", pixels.shape[1:])
            found[parts[0]].append((CLASSES.index(parts[1]), parts[2], pixels))
    arrays = []
    for part in ("train", "test"):
        check(len(found[part]) > 0, f"JPEG images in {part}/<class>/", f"none. {_GET}")
        rows = sorted(found[part], key=lambda row: row[:2])
        arrays += [np.stack([p for _, _, p in rows]), np.array([label for label, _, _ in rows], np.uint8)]
    return arrays[0], arrays[1], arrays[2], arrays[3]
