"""Image sets: what is read is what the files say, splits never move, damage is named."""

import gzip
import re
import struct

import numpy as np
import pytest
import torch

from initperf.core.checks import InitPerfError
from initperf.experiments.data import data_set as data_set
from initperf.experiments.data import sets


def idx(array, magic=None):
    magic = magic or 0x800 + array.ndim
    return struct.pack(">i", magic) + struct.pack(f">{array.ndim}i", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A small set of MNIST's format: 5,100 train images and 30 test images of 28 x 28, in 7 classes."""
    g = np.random.default_rng(0)
    for part, count in (("train", 5100), ("t10k", 30)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(g.integers(0, 256, (count, 28, 28))), 1)
        )
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 7), 1))
    return tmp_path


def test_digits_are_embedded_and_complete():
    digits = sets.digits()
    assert [tuple(s.x.shape) for s in (digits.train, digits.val, digits.test)] == [(1097, 64), (300, 64), (400, 64)]
    labels = torch.cat([s.y for s in (digits.train, digits.val, digits.test)])
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    pixels = torch.cat([s.x for s in (digits.train, digits.val, digits.test)])
    assert abs(float(pixels.mean())) < 1e-3
    assert abs(float(pixels.std()) - 1) < 1e-3


def test_the_digits_split_never_moves():
    assert data_set.permutation(1797, data_set.SPLIT_SEED, "digits")[:5].tolist() == [413, 1110, 610, 982, 1480]


def test_splits_are_disjoint_and_every_image_is_in_one():
    order = data_set.permutation(1797, data_set.SPLIT_SEED, "digits")
    assert torch.equal(order.sort().values, torch.arange(1797))


def test_permutations_differ_by_seed_and_stream_only():
    assert torch.equal(data_set.permutation(1000, 1, 2), data_set.permutation(1000, 1, 2))
    assert not torch.equal(data_set.permutation(1000, 1, 2), data_set.permutation(1000, 1, 3))
    assert not torch.equal(data_set.permutation(1000, 1, 2), data_set.permutation(1000, 2, 2))


def test_any_set_of_mnists_format_loads_from_its_folder(folder):
    found = sets.mnist(folder)
    assert (len(found.train), len(found.val), len(found.test), found.classes) == (100, 5000, 30, 7)
    assert found.name == folder.name
    assert "not MNIST itself" in found.about
    assert "(measured on its training images)" in found.about
    assert found.train.x.shape[1] == 784
    raw = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    mean, std = (float(re.search(rf"{what} ([\d.]+\d)", found.about)[1]) for what in ("mean", "std"))
    restored = found.test.x.flatten() * std + mean
    assert torch.allclose(restored * 255, torch.from_numpy(raw.astype(np.float32)), atol=1e-3)


def test_unpacked_files_and_the_other_spelling_load_to_the_same(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("unpacked")
    for path in folder.iterdir():
        (other / path.name.removesuffix(".gz").replace("-idx", ".idx")).write_bytes(gzip.decompress(path.read_bytes()))
    assert sets.mnist(other).sha256 == sets.mnist(folder).sha256


def test_mnist_itself_is_normalized_by_the_papers_constants(shared_data):
    found = sets.mnist(shared_data / "mnist")
    assert "mean 0.1307, std 0.3081 (its published constants)" in found.about
    assert found.name == "mnist"
    assert (len(found.train), len(found.val), len(found.test), found.classes) == (55_000, 5000, 10_000, 10)
    assert int(found.train.y.bincount().sum() + found.val.y.bincount().sum()) == 60_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train-labels-idx1-ubyte.gz").unlink(), "no such file.*Download"),
        (lambda d: cut(d / "train-images-idx3-ubyte.gz", 1000), "readable IDX file"),
        (lambda d: (d / "t10k-labels-idx1-ubyte.gz").write_bytes(b""), "IDX file of labels"),
        (lambda d: (d / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>not found</html>"), "IDX file of labels"),
        (lambda d: (d / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(29))), "as many test labels"),
        (lambda d: (d / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(30))[:-1]), "as its header says"),
        (lambda d: (d / "t10k-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((30, 8, 8)))), "one size"),
    ],
)
def test_damaged_and_missing_files_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InitPerfError, match=message):
        sets.mnist(folder)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_a_missing_folder_says_where_to_get_the_files(tmp_path):
    for folder in (None, tmp_path / "nowhere"):
        with pytest.raises(InitPerfError, match="--data-dir"):
            sets.load("mnist", folder)
    with pytest.raises(InitPerfError, match="digits, mnist, cifar10"):
        sets.load("imagenet")
