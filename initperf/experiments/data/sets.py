"""Image sets for the experiments: the embedded digits, and any 28 x 28 set in MNIST's IDX format. Splits are fixed for ever."""

from __future__ import annotations

import gzip
import io
import zlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from initperf.core.checks import InitPerfError, check, fail
from initperf.experiments.data.data_set import SPLIT_SEED, DataSet, Split, permutation, sha256

DIGITS_SPLIT = 1097, 300, 400  # train, validation, test; no official split exists
MNIST_VALIDATION = 5000  # Frankle & Carbin: 55K train, 5K validation, 10K test
MNIST_NORMALIZATION = 0.1307, 0.3081
MNIST_SHA256 = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"  # of MNIST's own pixels and labels
MNIST_FILES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}
_GET_MNIST = (
    "Download train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
    "t10k-labels-idx1-ubyte.gz (for example from https://ossci-datasets.s3.amazonaws.com/mnist/) into one folder, "
    "and name it with --data-dir"
)
_LAYOUTS = {"mnist": ("train-images*",), "cifar10": ("cifar-10-*", "data_batch_1*", "*jpg*.tar.gz", "*jpeg*.tar.gz")}
_MAGIC = {"images": 0x803, "labels": 0x801}  # IDX: unsigned bytes, 3 dimensions or 1


def load(name: str, folder: str | Path | None = None) -> DataSet:
    """The set `name` ("digits", "mnist" or "cifar10"); "mnist" reads any set of 28 x 28 images in IDX files from `folder`."""
    from initperf.experiments.data.cifar import cifar10

    loaders = {"digits": digits, "mnist": lambda: mnist(folder), "cifar10": lambda: cifar10(folder)}
    check(name in loaders, f"data to be one of {', '.join(loaders)}", repr(name))
    return loaders[name]()


def kind_of(folder: str | Path) -> str:
    """What the folder's files are: "mnist" (IDX files of any image set) or "cifar10"."""
    for kind, globs in _LAYOUTS.items():
        if any(any(Path(folder).glob(glob)) for glob in globs):
            return kind
    raise InitPerfError(f"Expected IDX files or CIFAR-10 in {folder}. Got none of their names. {_GET_MNIST}.")


def digits() -> DataSet:
    """The UCI digits that ship inside the package: 1,797 images of 8 x 8, flattened to 64 values."""
    raw = gzip.decompress(files("initperf.experiments.data").joinpath("digits.csv.gz").read_bytes())
    table = np.loadtxt(io.BytesIO(raw), delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :64], table[:, 64]
    mean, std = _mean_and_std(pixels, 16)
    order = permutation(len(labels), SPLIT_SEED, "digits").split(DIGITS_SPLIT)
    train, val, test = (_split(pixels[i], labels[i], 16, mean, std) for i in map(Tensor.numpy, order))
    about = (
        f"UCI optical digits (Alpaydin and Kaynak 1998, CC BY 4.0), split {'/'.join(map(str, DIGITS_SPLIT))}, "
        f"normalized by mean {mean}, std {std}"
    )
    return DataSet("digits", about, 10, train, val, test, sha256(pixels, labels))


def mnist(folder: str | Path | None) -> DataSet:
    """MNIST, or another set of its format, from the four IDX files (packed or not) in `folder`; images flattened."""
    if folder is None:
        fail("a folder with the four MNIST files", f"none. {_GET_MNIST}")
    folder = Path(folder)
    if not folder.is_dir():
        fail("a folder with the four MNIST files", f"{folder}, which is not a folder. {_GET_MNIST}")
    arrays = {key: read_idx(_find(folder, stem), key[1]) for key, stem in MNIST_FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[part, "images"], arrays[part, "labels"]
        check(
            len(images) == len(labels),
            f"as many {part} labels as images in {folder}",
            f"{len(labels)} and {len(images)}",
        )
    train, test = arrays["train", "images"], arrays["test", "images"]
    sizes = train.shape[1:], test.shape[1:]
    check(sizes[0] == sizes[1], f"train and test images of one size in {folder}", f"{sizes[0]} and {sizes[1]}")
    check(len(train) > MNIST_VALIDATION, f"more than {MNIST_VALIDATION} train images in {folder}", len(train))
    labels, test_labels = arrays["train", "labels"], arrays["test", "labels"]
    checksum = sha256(train, labels, test, test_labels)
    if checksum == MNIST_SHA256:
        name, what = "mnist", "MNIST (LeCun, Cortes, Burges, CC BY-SA 3.0)"
        (mean, std), source = MNIST_NORMALIZATION, "its published constants"
    else:
        name, what = folder.resolve().name, f"IDX images of {folder.resolve().name}, which are not MNIST itself"
        (mean, std), source = _mean_and_std(train, 255), "measured on its training images"
    order = permutation(len(train), SPLIT_SEED, "mnist").numpy()
    val, rest = order[:MNIST_VALIDATION], order[MNIST_VALIDATION:]
    about = (
        f"{what}, {len(train):,} + {len(test):,}, "
        f"split {len(rest)}/{len(val)}/{len(test)}, normalized by mean {mean}, std {std} ({source})"
    )
    return DataSet(
        name,
        about,
        int(max(labels.max(), test_labels.max())) + 1,
        _split(train[rest], labels[rest], 255, mean, std),
        _split(train[val], labels[val], 255, mean, std),
        _split(test, test_labels, 255, mean, std),
        checksum,
    )


def read_idx(path: Path, what: str) -> np.ndarray:
    """One IDX file of unsigned bytes, .gz or not; `what` is "images" (N, rows, columns) or "labels" (N,)."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        fail(f"a readable IDX file {path}", f"{error}. {_GET_MNIST}")
    magic, dims = _MAGIC[what], _MAGIC[what] & 0xFF
    if len(data) < 4 * (1 + dims) or int.from_bytes(data[:4], "big") != magic:
        fail(f"{path} to be an IDX file of {what} (first bytes {magic:#010x})", data[:4].hex() or "an empty file")
    shape = tuple(int(v) for v in np.frombuffer(data, ">u4", dims, 4))
    body = np.frombuffer(data, np.uint8, offset=4 * (1 + dims))
    size = int(np.prod(shape, dtype=np.int64))
    check(
        body.size == size, f"{size} bytes of {what} in {path}, as its header says", f"{body.size} (damaged download?)"
    )
    return body.reshape(shape)


def _find(folder: Path, stem: str) -> Path:
    names = [stem, stem.replace("-idx", ".idx")]
    for name in (variant + end for variant in names for end in (".gz", "")):
        if (folder / name).is_file():
            return folder / name
    raise InitPerfError(f"Expected {stem}.gz (or {stem}) in {folder}. Got no such file. {_GET_MNIST}.")


def _mean_and_std(pixels: np.ndarray, scale: int) -> tuple[float, float]:
    """Of pixels / scale, to four digits: 0.1307 and 0.3081 for MNIST. Exact, from the counts of the 256 values."""
    counts = np.bincount(pixels.ravel(), minlength=256)
    values = np.arange(256) / scale
    mean = float(counts @ values) / pixels.size
    std = float(counts @ (values - mean) ** 2 / pixels.size) ** 0.5
    check(round(std, 4) > 0, "images that differ", "a constant set")
    return round(mean, 4), round(std, 4)


def _split(pixels: np.ndarray, labels: np.ndarray, scale: int, mean: float, std: float) -> Split:
    """Flat images as float32 (pixels / scale - mean) / std."""
    table = (np.arange(256, dtype=np.float32) / np.float32(scale) - np.float32(mean)) / np.float32(std)
    return Split(
        torch.from_numpy(table.take(pixels.reshape(len(pixels), -1))), torch.from_numpy(labels.astype(np.int64))
    )
