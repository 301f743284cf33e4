"""A folder of images per class."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import check_consistent, fashion_files, refused_by_a_child, refuses, save_image, write

from sparse_training.data.load import load_data


def test_imagefolder(folder: Path) -> None:
    data = load_data("imagefolder", folder)
    check_consistent(data)
    assert data.classes == ("ant", "cat")
    assert data.shape == (3, 10, 12), "their own size, as they share it"
    assert data.train.labels.tolist() == [0, 1, 1]
    assert data.train.images[:, :, 0, 0].tolist() == [[70] * 3, [40, 50, 60], [10, 20, 30]]
    assert data.test.images[0, :, 9, 11].tolist() == [200, 0, 0]
    assert data.test.labels.tolist() == [1]


def test_imagefolder_keeps_rows_and_columns(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    image.fromarray(pixels).save(folder / "train/ant/z.bmp")
    data = load_data("imagefolder", folder)
    np.testing.assert_array_equal(data.train.images[0].permute(1, 2, 0), pixels)


def test_imagefolder_sizes(folder: Path) -> None:
    assert load_data("imagefolder", folder, size=16).shape == (3, 16, 16)
    save_image(folder / "test/cat/y.png", 0, size=(10, 12), mode="L")
    message = refuses(load_data, "imagefolder", folder)
    assert (
        "have sizes from 10x12 to 12x10 pixels; give the side that all are resized to, size= (--image-size), or"
        in message
    )
    assert load_data("imagefolder", folder, size=11).shape == (3, 11, 11)
    assert "got 0" in refuses(load_data, "imagefolder", folder, size=0)


def test_imagefolder_takes_val_when_there_is_no_test(folder: Path) -> None:
    save_image(folder / "val/ant/x.png", 0, mode="L")
    assert load_data("imagefolder", folder).test.labels.tolist() == [1], "test comes first"
    (folder / "test").rename(folder / "other")
    assert load_data("imagefolder", folder).test.labels.tolist() == [0]


def test_unreadable_image(folder: Path) -> None:
    path = folder / "train/cat/b.png"
    raw = path.read_bytes()
    for damaged in (b"", b"<html>", raw[: len(raw) // 2]):
        path.write_bytes(damaged)
        for size in (None, 8):
            assert str(path) in refuses(load_data, "imagefolder", folder, size=size)


def test_only_the_formats_of_the_suffixes_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow goes by content: PostScript named .png would run an interpreter."""
    plugin = pytest.importorskip("PIL.EpsImagePlugin")
    ran = []
    monkeypatch.setattr(plugin, "Ghostscript", lambda *arguments, **options: ran.append(arguments))
    path = folder / "train/cat/z.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 10\n%%EndComments\nshowpage\n%%EOF\n")
    assert f"{path}: not an image" in refuses(load_data, "imagefolder", folder)
    path.unlink()
    save_image(folder / "train/cat/z.pcx", 3, mode="L")
    (folder / "train/cat/z.pcx").rename(path)
    assert f"{path}: not an image" in refuses(load_data, "imagefolder", folder)
    assert not ran


def test_an_image_of_another_accepted_format_is_read(folder: Path) -> None:
    save_image(folder / "train/cat/z.jpg", (0, 0, 0))
    (folder / "train/cat/z.jpg").rename(folder / "train/cat/z.png")
    assert len(load_data("imagefolder", folder).train) == 4


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link to nothing", "link to a fifo"])
def test_what_is_no_file_is_refused_and_never_opened(folder: Path, kind: str) -> None:
    path = folder / "train/cat/z.png"
    if "fifo" in kind:
        os.mkfifo(folder / "fifo" if "link" in kind else path)
    if kind == "folder":
        path.mkdir()
    elif kind != "fifo":
        path.symlink_to({"device": "/dev/zero", "link to nothing": "nowhere"}.get(kind, folder / "fifo"))
    assert f"{path}: an image must be a regular file" in refused_by_a_child("imagefolder", folder)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_not_clipped(folder: Path, mode: str) -> None:
    path = folder / "train/cat/deep.tif"
    save_image(path, 1000, mode=mode)
    message = refuses(load_data, "imagefolder", folder)
    assert str(path) in message
    assert "8 bits" in message


def test_imagefolder_layout_errors(folder: Path) -> None:
    save_image(folder / "test/dog/x.png", (0, 0, 0))
    message = refuses(load_data, "imagefolder", folder)
    assert str(folder / "test/dog") in message
    assert "no such class" in message
    (folder / "test/dog").rename(folder / "dog")

    (folder / "test/cat/x.png").unlink()
    message = refuses(load_data, "imagefolder", folder)
    assert str(folder / "test") in message
    assert "no images" in message

    (folder / "train/ant").rename(folder / "ant")
    assert "must hold at least 2 class folders, got 1" in refuses(load_data, "imagefolder", folder)


def test_imagefolder_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in refuses(load_data, "imagefolder", folder)


def test_other_sets_need_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert load_data("digits").shape == (1, 8, 8)


def test_root_may_start_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    write(tmp_path / "sets", fashion_files())
    assert len(load_data("fashion-mnist", "~/sets").train) == 5


def test_a_class_whose_name_is_no_utf8_is_refused_at_the_start(folder: Path) -> None:
    (folder / "train" / "cat").rename(os.fsdecode(os.fsencode(folder / "train") + b"/caf\xe9"))
    assert "a folder's name must be UTF-8, got b'caf\\xe9'" in refuses(load_data, "imagefolder", folder)
