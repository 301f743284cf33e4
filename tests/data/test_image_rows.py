"""Image folders and WebDataset shards that are read row by row."""

# ruff: noqa: NPY002  # transforms of others draw from NumPy's global generator

from __future__ import annotations

import logging
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import refuses
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("PIL")
pytest.importorskip("webdataset")

from image_parts import CLASSES, ROWS, image_folder, jpeg, pixels, shards
from PIL import Image

from sparse_training import (
    CenterCrop,
    HistorySampler,
    ImageFiles,
    ImageShards,
    Indexed,
    RandomCropAndFlip,
    SparseTrainer,
)
from sparse_training.errors import UserError

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def made(kind: str, folder: Path, transform: Any = None, **options: Any) -> Any:
    transform = CenterCrop(16) if transform is None else transform
    if kind == "files":
        return ImageFiles(image_folder(folder / "images"), transform, **options)
    return ImageShards(shards(folder / "shards"), transform, **options)


def test_a_folder_gives_its_images_and_labels(tmp_path: Path) -> None:
    data = made("files", tmp_path, lambda image: torch.from_numpy(np.array(image)))
    assert len(data) == ROWS
    assert data.classes == ("class0", "class1", "class2")
    assert data.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    image, label = data[9]
    assert (label, tuple(image.shape)) == (1, (37, 50, 3)), "its own size: nothing shrinks it"
    assert (image.float() - torch.from_numpy(pixels(4)).float()).abs().mean() < 6, "the second file of class1"
    assert data.name(9) == str(tmp_path / "images/class1/0004.jpg")


def test_shards_give_what_the_library_streams(tmp_path: Path) -> None:
    import webdataset

    data = made("shards", tmp_path)
    stream = webdataset.WebDataset(shards(tmp_path / "shards"), shardshuffle=False)
    streamed = [(sample["jpg"], int(sample["cls"])) for sample in stream]
    assert [(data.read(row), int(data.labels[row])) for row in range(len(data))] == streamed
    assert data.name(13) == f"{tmp_path}/shards/part-1.tar: 0013.jpg"


def test_file_names_with_dots_and_long_names_are_the_librarys(tmp_path: Path) -> None:
    from webdataset import TarWriter

    name = "a" * 150 + "/b"
    with TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": name, "jpg": jpeg(1), "cls": 1, "json": {"a": 1}})
        writer.write({"__key__": "c", "JPEG": jpeg(2), "cls": 0, "txt": "words"})
    data = ImageShards(tmp_path / "x.tar", CenterCrop(8))
    assert [data.read(row) for row in range(2)] == [jpeg(1), jpeg(2)]
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_rows_that_are_left_out_are_not_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the history sampler in a user's loop, and by the trainer's default policy."""
    data, read = made(kind, tmp_path, RandomCropAndFlip(16)), list[int]()
    original = type(data).read
    monkeypatch.setattr(type(data), "read", lambda self, row: read.append(row) or original(self, row))
    sampler = HistorySampler(data, batch_size=4, rate=0.5)
    drawn = []
    for _ in range(4):
        for index, (_, _) in DataLoader(Indexed(data), batch_sampler=sampler):
            drawn += index.tolist()
            sampler.update(index, index.float() + 1)
    assert read == drawn
    assert len(read) == 4 * ROWS / 2

    read.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))
    trainer = SparseTrainer(model, optimizer=torch.optim.SGD, lr=1e-4, dense_start=0, dense_end=0)
    log = trainer.fit(DataLoader(data, batch_size=4, shuffle=True), epochs=6)
    assert len(read) < 6 * ROWS
    assert log.rows_trained <= len(read) < log.rows_trained + 5


class Random:
    """Draws from all three global generators, as transforms of others do."""

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.tensor([random.random(), np.random.random(), float(torch.rand(()))], dtype=torch.float64)


@pytest.mark.parametrize("transform", [RandomCropAndFlip(16), Random()])
def test_a_row_depends_on_seed_epoch_and_row_alone(transform: Any, tmp_path: Path) -> None:
    data = made("files", tmp_path, transform, seed=3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    data.set_epoch(2)
    forward = [data[row][0] for row in range(ROWS)]
    backward = [data[row][0] for row in reversed(range(ROWS))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    workers = DataLoader(data, batch_size=5, num_workers=2)
    assert torch.equal(torch.cat([images for images, _ in workers]), torch.stack(forward))
    for other in (made("files", tmp_path, transform, seed=4), data):
        other.set_epoch(2 if other is not data else 3)
        assert not any(torch.equal(other[row][0], forward[row]) for row in range(ROWS))
    data.set_epoch(2)
    assert not torch.equal(forward[0], forward[1])


def test_persistent_and_spawned_workers_follow_the_epoch(tmp_path: Path) -> None:
    data = made("shards", tmp_path, RandomCropAndFlip(8))
    loader = DataLoader(data, batch_size=6, num_workers=1, persistent_workers=True, multiprocessing_context="spawn")
    found = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        found.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", ["files", "shards"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_an_unreadable_image_is_named_counted_and_left_out(
    kind: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = made(kind, tmp_path)
    good = data.read(5)
    bad = {"cut": good[: len(good) // 2], "empty": b"", "text": b"<html>not here</html>"}[damage]
    if kind == "files":
        path = tmp_path / "images/class0/0015.jpg"
        assert data.name(5) == str(path)
        path.write_bytes(bad)
    else:
        path = tmp_path / "shards/part-0.tar"
        whole = path.read_bytes()
        assert whole.count(good) == 1
        path.write_bytes(whole.replace(good, bad.ljust(len(good), b"\0")))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(DataLoader(data, batch_size=ROWS))
    images, labels = batches[0]
    assert labels.tolist() == [-100 if row == 5 else int(data.labels[row]) for row in range(ROWS)]
    assert images.shape == (ROWS, 3, 16, 16)
    assert not images[5].any()
    assert data.unreadable == [data.name(5)]
    assert len(caplog.messages) == 1, "once, and not in every epoch"
    assert caplog.messages[0].startswith(f"{data.name(5)}: not an image that can be read: ")
    assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize(("on_error", "reads"), [("count", 1), ("retry", 3)])
def test_an_unreadable_image_is_tried_again_only_where_that_is_asked_for(
    on_error: str, reads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, asked = made("files", tmp_path, on_error=on_error), list[int]()
    read, good = data.read, Path(data.name(4)).read_bytes()
    data.read = lambda row: (asked.append(row), read(row))[1]
    Path(data.name(4)).write_bytes(b"")
    for _ in range(3):
        assert data[4][1] == -100
    assert asked == [4] * reads
    assert data.unreadable == [data.name(4)]
    Path(data.name(4)).write_bytes(good)
    assert data[4][1] == (-100 if on_error == "count" else 0)
    assert data.unreadable == ([data.name(4)] if on_error == "count" else [])
    assert len(caplog.messages) == (1 if on_error == "count" else 2), "lost once, and found again"


def test_workers_report_what_they_cannot_read(tmp_path: Path) -> None:
    data = made("files", tmp_path)
    Path(data.name(7)).unlink()
    Path(data.name(20)).write_bytes(b"")
    for _ in DataLoader(data, batch_size=4, num_workers=2):
        pass
    assert data.unreadable == [data.name(7), data.name(20)]


def test_training_goes_on_without_an_unreadable_image(tmp_path: Path) -> None:
    """As if its row were not there: it changes no weight and no accuracy."""
    data = made("files", tmp_path, CenterCrop(8))
    Path(data.name(2)).write_bytes(b"")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))
    start = model[1].weight.detach().clone()
    trainer = SparseTrainer(model, lr=0.01)
    log = trainer.fit(DataLoader(data, batch_size=6, shuffle=True), epochs=4)
    assert log.invalid == 0
    assert not torch.equal(start, model[1].weight)
    rows = [row for row in range(ROWS) if row != 2]
    with torch.no_grad():
        logits = model(torch.stack([data[row][0] for row in rows]))
    found = trainer.evaluate(DataLoader(data, batch_size=8))
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == data.labels[rows]).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, data.labels[rows]).item(), rel=1e-5)


def test_an_unreadable_image_is_an_error_where_that_is_asked_for(tmp_path: Path) -> None:
    data = made("files", tmp_path, on_error="raise")
    Path(data.name(2)).write_bytes(b"")
    assert refuses(lambda: data[2]).startswith(f"{data.name(2)}: not an image that can be read")
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(data.name(3), "PNG")
    assert "must have 8 bits per channel" in refuses(lambda: data[3])


@pytest.mark.parametrize("share", [0.3, 0.62, 1.0])
def test_a_shard_that_is_cut_off_is_named(share: float, tmp_path: Path) -> None:
    names = shards(tmp_path)
    path = tmp_path / "part-1.tar"
    whole = path.read_bytes().rstrip(b"\0")  # the padding may go
    for end in (int(len(whole) * share), int(len(whole) * share) // 512 * 512):
        path.write_bytes(whole[:end])
        assert f"{path}: cut off" in refuses(lambda: ImageShards(names, CenterCrop(8)))


def test_a_shard_whose_header_is_damaged_is_named(tmp_path: Path) -> None:
    names = shards(tmp_path)
    path = tmp_path / "part-0.tar"
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"0006.jpg") + 148 : raw.index(b"0006.jpg") + 156] = b"garbage!"
    path.write_bytes(raw)
    assert f"{path}: cut off" in refuses(lambda: ImageShards(names, CenterCrop(8)))


def test_a_shard_that_is_cut_off_after_a_sample_is_named(tmp_path: Path) -> None:
    """A reader of streams takes such a cut for the end of the shard, and serves the samples before it."""
    names = shards(tmp_path)
    path = tmp_path / "part-1.tar"
    with tarfile.open(path) as archive:
        end = archive.getmember("0020.jpg").offset
    path.write_bytes(path.read_bytes()[:end])
    assert f"{path}: cut off or damaged at byte" in refuses(lambda: ImageShards(names, CenterCrop(8)))


def test_a_shard_that_is_cut_off_later_is_no_end_of_the_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = made("shards", tmp_path)
    path = tmp_path / "shards/part-1.tar"
    path.write_bytes(path.read_bytes()[: data._places[20, 1] + 100])
    labels = torch.cat([labels for _, labels in DataLoader(data, batch_size=5)])
    assert (labels == -100).nonzero().squeeze(1).tolist() == [20, 21, 22, 23]
    assert data.unreadable[0] == f"{path}: 0020.jpg"
    assert f"{path}: 0020.jpg: not an image that can be read: the shard ends after 100 of its" in caplog.messages[0]


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    from webdataset import TarWriter

    crop, folder = CenterCrop(8), image_folder(tmp_path / "images")
    assert "no such shard" in refuses(lambda: ImageShards(tmp_path / "none.tar", crop))
    for place in ("pipe:cat x.tar", "https://example.org/x.tar"):
        assert f"must be a file on a disk, to be read from any place, got {place}" in refuses(
            lambda place=place: ImageShards(place, crop)
        )
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    assert "no uncompressed tar file" in refuses(lambda: ImageShards(tmp_path / "text.tar", crop))
    for sample, words in (({"jpg": jpeg(0)}, "a .cls file"), ({"cls": 0}, "an image file")):
        with TarWriter(str(tmp_path / "x.tar")) as writer:
            writer.write({"__key__": "row7", **sample})
        assert f"must have {words}" in refuses(lambda: ImageShards(tmp_path / "x.tar", crop))
    with TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "row7", "jpg": jpeg(0), "cls": "cat"})
    assert "row7.cls must hold the number of a class, got b'cat'" in refuses(
        lambda: ImageShards(tmp_path / "x.tar", crop)
    )
    with TarWriter(str(tmp_path / "y.tar")):
        pass
    assert "no images" in refuses(lambda: ImageShards(tmp_path / "y.tar", crop))
    assert "at least one shard, got none" in refuses(lambda: ImageShards([], crop))
    assert "`classes` must name all 3" in refuses(lambda: ImageShards(shards(tmp_path), crop, classes=["a"]))
    assert "`root` must be a folder" in refuses(lambda: ImageFiles(tmp_path / "none", crop))
    assert "no images in its class folders" in refuses(lambda: ImageFiles(tmp_path, crop, classes=["images"]))
    assert "no such class" in refuses(lambda: ImageFiles(folder, crop, classes=["class0", "class1"]))
    assert "`on_error` must be one of count, retry, raise, got 'skip'" in refuses(
        lambda: ImageFiles(folder, crop, on_error="skip")
    )
    assert "`transform` must be callable" in refuses(lambda: ImageFiles(folder, 224))  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="0 to 23, got 24"):
        ImageFiles(folder, crop)[24]


def test_a_validation_set_has_the_training_sets_labels(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    part = tmp_path / "val/class2"
    part.mkdir(parents=True)
    (part / "x.jpg").write_bytes(jpeg(2))
    (root / "val").rename(tmp_path.parent / f"{tmp_path.name}-val")
    train = ImageFiles(root, CenterCrop(8))
    val = ImageFiles(tmp_path.parent / f"{tmp_path.name}-val", CenterCrop(8), classes=train.classes)
    assert val.labels.tolist() == [2]


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (8, 200), (200, 8), (1, 1)])
def test_crops_have_the_size_that_was_asked_for(size: tuple[int, int]) -> None:
    image = Image.fromarray(pixels(0, *size))
    for transform in (RandomCropAndFlip(21), CenterCrop(21)):
        cropped = transform(image)
        assert cropped.shape == (3, 21, 21)
        assert cropped.dtype == torch.float32


def test_the_centre_crop_is_a_resize_and_a_crop() -> None:
    """Within a level or two of Pillow's in two steps, which rounds in between."""
    image = Image.fromarray(pixels(3, 320, 256))
    resized = image.resize((160, 128), Image.Resampling.BILINEAR).crop((24, 8, 136, 120))
    found = CenterCrop(112, **PLAIN)(image) * 255
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    assert (found - expected).abs().max() < 3
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    normalised = CenterCrop(112, mean=mean, std=std)(image)
    restored = normalised * torch.tensor(std).reshape(3, 1, 1) + torch.tensor(mean).reshape(3, 1, 1)
    torch.testing.assert_close(restored * 255, found, atol=1e-3, rtol=1e-4)


def test_random_boxes_have_the_areas_and_ratios_that_were_asked_for() -> None:
    torch.manual_seed(0)
    crop = RandomCropAndFlip(8, area=(0.2, 0.45), ratio=(0.5, 2.0))
    boxes = torch.tensor([crop._box(500, 500) for _ in range(2000)]).double()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 500
    assert boxes[:, 3].max() <= 500
    area, ratio = width * height / (500 * 500), (width / height).log2()
    assert 0.195 < area.min() < 0.22
    assert 0.42 < area.max() < 0.455
    assert ratio.abs().max() < 1.02
    assert ratio.mean().abs() < 0.08, "as often wide as tall"
    assert (boxes[:, 0] / (500 - width).clamp(min=1)).mean() == pytest.approx(0.5, abs=0.05)


def test_half_of_the_images_are_mirrored() -> None:
    torch.manual_seed(0)
    image = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    crop = RandomCropAndFlip(8, **PLAIN)
    mirrored = [bool((found := crop(image))[0, 0, 0] > found[0, 0, -1]) for _ in range(400)]
    assert 0.42 < sum(mirrored) / 400 < 0.58
    kept = [RandomCropAndFlip(8, flip=0.0)(image) for _ in range(20)]
    assert all(found[0, 0, 0] <= found[0, 0, -1] for found in kept)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RandomCropAndFlip(0), "`size` must be an integer of at least 1, got 0"),
        (lambda: CenterCrop(2.5), "`size` must be an integer"),  # type: ignore[arg-type]
        (lambda: RandomCropAndFlip(8, area=(0.0, 1.0)), "`area` must be"),
        (lambda: RandomCropAndFlip(8, area=(0.5, 0.2)), "`area` must be"),
        (lambda: RandomCropAndFlip(8, ratio=(2.0, 1.0)), "`ratio` must be"),
        (lambda: RandomCropAndFlip(8, flip=1.5), "`flip` must be in"),
        (lambda: CenterCrop(8, resize=7), "`resize` must be an integer of at least 8, got 7"),
        (lambda: CenterCrop(8, std=(1.0, 0.0, 1.0)), "`mean` and `std` must have 3 channels"),
        (lambda: CenterCrop(8, mean=(1.0,)), "`mean` and `std` must have 3 channels"),
    ],
)
def test_bad_transforms_are_refused(call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()
