"""CIFAR-10: every layout gives the same images, a pickle cannot run code, damage is named."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from initperf.core.checks import InitPerfError
from initperf.experiments.data import cifar

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


BATCH = 200  # images, for the 10,000 of the real files


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in (("TRAIN", 5 * BATCH), ("TEST", BATCH), ("VALIDATION", 100)):
        monkeypatch.setattr(cifar, name, value)


@pytest.fixture(scope="module")
def batches():
    """Six batches of random images."""
    g = np.random.default_rng(0)
    return [(g.integers(0, 256, (BATCH, 3072), dtype=np.uint8), np.arange(BATCH) % 10) for _ in NAMES]


def as_pickle(pixels, labels):
    return pickle.dumps({b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x"}, protocol=2)


def as_binary(pixels, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), pixels], 1).tobytes()


@pytest.fixture(scope="module")
def python_folder(batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    (folder / "cifar-10-batches-py").mkdir()
    for name, batch in zip(NAMES, batches, strict=True):
        (folder / "cifar-10-batches-py" / name).write_bytes(as_pickle(*batch))
    return folder


def test_the_python_files_load(python_folder, batches):
    found = cifar.cifar10(python_folder)
    assert (len(found.train), len(found.val), len(found.test)) == (900, 100, 200)
    assert found.test.x.shape[1:] == (3, 32, 32)
    raw = found.test.x[7].numpy() * 0.2898 + 0.5  # uniform pixels: mean 1/2, std sqrt((256^2 - 1) / 12) / 255
    assert np.allclose(raw.reshape(-1) * 255, batches[5][0][7], atol=2)
    assert found.test.y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert "official python files" in found.about


def test_binary_files_and_archives_give_the_same_images(python_folder, batches, tmp_path):
    binary, packed = tmp_path / "binary", tmp_path / "packed"
    binary.mkdir()
    packed.mkdir()
    with tarfile.open(packed / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as archive:
        for name, batch in zip(NAMES, batches, strict=True):
            data = as_binary(*batch)
            (binary / f"{name}.bin").write_bytes(data)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    expected = cifar.cifar10(python_folder).sha256
    assert cifar.cifar10(binary).sha256 == expected
    assert cifar.cifar10(packed).sha256 == expected


def test_a_pickle_that_would_run_code_is_refused(python_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    with pytest.raises(InitPerfError, match="is not part of CIFAR-10"):
        cifar._python(pickle.dumps({b"data": Evil()}), "data_batch_1")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("damage", [b"", b"\x80\x02", pickle.dumps({b"data": 1}), pickle.dumps([1, 2]), b"garbage"])
def test_damaged_batches_are_named(damage):
    with pytest.raises(InitPerfError, match="data_batch_1"):
        cifar._python(damage, "data_batch_1")


def test_damaged_binary_files_are_named():
    with pytest.raises(InitPerfError, match="records of 3073 bytes"):
        cifar._binary(b"\x00" * 5000, "data_batch_1.bin")


def test_a_set_of_another_size_is_refused(python_folder, monkeypatch):
    monkeypatch.setattr(cifar, "TEST", BATCH + 1)
    with pytest.raises(InitPerfError, match="test images"):
        cifar.cifar10(python_folder)


def test_missing_files_say_where_to_get_them(python_folder, tmp_path):
    for folder in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(InitPerfError, match=r"cs\.toronto\.edu"):
            cifar.cifar10(folder)
    (tmp_path / "data_batch_1").write_bytes(b"x")
    with pytest.raises(InitPerfError, match="data_batch_2"):
        cifar.cifar10(tmp_path)


def test_a_cut_archive_is_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b\x08\x00" + b"\x00" * 20)
    with pytest.raises(InitPerfError, match="readable archive"):
        cifar.cifar10(tmp_path)


def test_jpeg_copies_are_read_in_order_of_class_and_number():
    image = pytest.importorskip("PIL.Image")
    contents = []
    for part, label, number, grey in (
        ("train", "truck", 1, 9),
        ("train", "cat", 0, 90),
        ("test", "dog", 0, 200),
        ("train", "cat", 1, 30),
    ):
        buffer = io.BytesIO()
        image.new("RGB", (32, 32), (grey,) * 3).save(buffer, "JPEG")
        contents.append((f"{part}/{label}/{number:04d}.jpg", buffer.getvalue()))
    train, labels, test, test_labels = cifar._jpeg(iter(contents))
    assert labels.tolist() == [3, 3, 9]
    assert [int(p.mean().round()) for p in train] == [90, 30, 9]
    assert (test_labels.tolist(), int(test.mean().round())) == ([5], 200)
