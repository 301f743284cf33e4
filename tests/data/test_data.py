"""Data sets: what is loaded, what is refused and in which words, and that no pickle runs."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import check_consistent, fashion_files, idx_bytes, peak_bytes, refuses, write

from sparse_training.data import fashion_mnist as idx
from sparse_training.data.load import DATASETS, load_data
from sparse_training.data.splits import Split, channel_statistics


@pytest.fixture(autouse=True)
def no_data_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the sets that this machine may have."""
    monkeypatch.delenv("SPARSE_TRAINING_DATA", raising=False)
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "debian")


# --- all sets ---------------------------------------------------------------------------------


def test_unknown_name_lists_the_known() -> None:
    message = refuses(load_data, "mnist")
    assert "'mnist'" in message
    assert all(name in message for name in DATASETS)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_missing_set_says_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    message = refuses(load_data, name, tmp_path / "nowhere")
    assert name in message
    assert str(tmp_path / "nowhere") in message


def test_missing_set_says_where_to_get_it(tmp_path: Path) -> None:
    assert "apt install dataset-fashion-mnist" in refuses(load_data, "fashion-mnist", tmp_path)
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in refuses(load_data, "cifar10", tmp_path)
    assert "train/<class>" in refuses(load_data, "imagefolder", tmp_path)
    assert "SPARSE_TRAINING_DATA unset" in refuses(load_data, "cifar10")


def test_size_is_for_imagefolder() -> None:
    assert "size=16" in refuses(load_data, "digits", size=16)


def test_split_checks_what_it_is_given() -> None:
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    assert len(Split(images, labels)) == 2
    for wrong in [(images.float(), labels), (images[:, 0], labels), (images, labels[:1])]:
        with pytest.raises(ValueError, match="must be"):
            Split(*wrong)


def test_statistics_of_a_constant_channel_can_divide() -> None:
    images = torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx([0.2])
    assert std == pytest.approx([1 / 255])


# --- digits -----------------------------------------------------------------------------------


def test_digits() -> None:
    data = load_data("digits")
    check_consistent(data)
    assert data.shape == (1, 8, 8)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    assert data.train.images.min() == 0
    assert data.train.images.max() == 255
    assert (data.test.labels.bincount(minlength=10) >= 30).all()


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    data = load_data("digits")
    images = torch.cat([data.train.images, data.test.images]).squeeze(1).numpy()
    labels = torch.cat([data.train.labels, data.test.labels]).numpy()
    np.testing.assert_array_equal(images, theirs.images * 255 // 16)
    np.testing.assert_array_equal(labels, theirs.target)


def test_digits_take_no_root(tmp_path: Path) -> None:
    assert str(tmp_path) in refuses(load_data, "digits", tmp_path)


def gzipped(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


@pytest.mark.parametrize("pack", [dict, gzipped])
@pytest.mark.parametrize("folder", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path: Path, folder: str, pack: Callable[..., dict[str, bytes]]) -> None:
    files = fashion_files()
    write(tmp_path / folder, pack(files))
    data = load_data("fashion-mnist", tmp_path)
    check_consistent(data)
    assert data.shape == (1, 28, 28)
    assert (len(data.train), len(data.test), len(data.classes)) == (5, 3, 10)
    assert data.train.images.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert str(tmp_path / folder) in data.source


def test_places_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, rows in (("given", 5), ("variable", 6), ("debian", 7)):
        write(tmp_path / place, fashion_files(rows))
    (tmp_path / "empty").mkdir()
    assert len(load_data("fashion-mnist").train) == 7
    monkeypatch.setenv("SPARSE_TRAINING_DATA", str(tmp_path / "variable"))
    assert len(load_data("fashion-mnist").train) == 6
    assert len(load_data("fashion-mnist", tmp_path / "given").train) == 5
    monkeypatch.setenv("SPARSE_TRAINING_DATA", str(tmp_path / "empty"))
    assert len(load_data("fashion-mnist").train) == 7
    # A root that is given is not silently replaced by another place.
    assert str(tmp_path / "empty") in refuses(load_data, "fashion-mnist", tmp_path / "empty")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (IMAGES, lambda raw: b"", "not an IDX file"),
        (IMAGES, lambda raw: b"<htm" + raw[4:], "it must begin with two zero bytes, got b'<h'"),
        (IMAGES, lambda raw: raw[:2] + b"\x0d" + raw[3:], "the type code must be 0x08 (uint8), got 0x0d"),
        (IMAGES, lambda raw: raw[:3] + b"\x01" + raw[4:], "must have 3 dimensions, got 1"),
        (IMAGES, lambda raw: raw[:10], "truncated: the header ends after 10 bytes"),
        (IMAGES, lambda raw: raw[:-1], "truncated: [5, 28, 28] needs 3920 bytes, got 3919"),
        (IMAGES, lambda raw: raw + b"\0", "too long: [5, 28, 28] needs 3920 bytes"),
        (IMAGES, lambda raw: idx_bytes(np.zeros((5, 32, 32))), "got [5, 32, 32]"),
        (IMAGES, lambda raw: idx_bytes(np.zeros((0, 28, 28))), "got [0, 28, 28]"),
        (IMAGES, lambda raw: gzip.compress(raw)[:-20], "truncated"),
        (IMAGES, lambda raw: gzip.compress(raw)[:-8] + bytes(8), "cannot be read: CRC"),
        (LABELS, lambda raw: idx_bytes(np.zeros(4)), "5 images need as many labels, got 4"),
        (LABELS, lambda raw: idx_bytes(np.full(5, 10)), "labels must be 0 to 9, got 10"),
    ],
)
def test_damaged_idx_file(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], words: str) -> None:
    files = fashion_files()
    files[name] = damage(files[name])
    write(tmp_path, files)
    message = refuses(load_data, "fashion-mnist", tmp_path)
    assert str(tmp_path / name) in message
    assert words in message


def test_missing_idx_file(tmp_path: Path) -> None:
    files = fashion_files()
    del files["t10k-labels-idx1-ubyte"]
    message = refuses(load_data, "fashion-mnist", write(tmp_path, files))
    assert str(tmp_path / "t10k-labels-idx1-ubyte") in message
    assert "missing" in message


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_header_that_promises_terabytes(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "images"
    path.write_bytes(pack(b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 28, 28) + bytes(100)))
    assert peak_bytes(lambda: refuses(idx.read_idx, path, (28, 28))) < 8 << 20


def test_gzip_that_goes_on_and_on(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(5)) + bytes(32 << 20)))
    assert peak_bytes(lambda: refuses(idx.read_idx, path, ())) < 8 << 20


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_more_pixels_than_memory_are_refused_by_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    """The file may well hold what its header promises: a gzip file of zeros, or one with a hole in it."""
    monkeypatch.setattr(idx, "MAX_BYTES", 1 << 20, raising=False)
    files = fashion_files()
    files[IMAGES] = pack(idx_bytes(np.zeros((20_000, 28, 28))))
    message = ""

    def load() -> None:
        nonlocal message
        message = refuses(load_data, "fashion-mnist", tmp_path)

    write(tmp_path, files)
    assert peak_bytes(load) < 4 << 20
    assert "[20000, 28, 28] needs 15680000 bytes" in message


@pytest.mark.skipif(not (idx.DEBIAN / f"{IMAGES}.gz").exists(), reason="Debian's dataset-fashion-mnist is absent")
def test_debians_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = load_data("fashion-mnist", idx.DEBIAN)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.train.labels.bincount().tolist() == [6_000] * 10
    assert data.mean == pytest.approx([0.2860], abs=1e-4)
    assert data.std == pytest.approx([0.3530], abs=1e-4)
