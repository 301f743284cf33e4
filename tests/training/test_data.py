"""Data sets: what is loaded, what is refused and in which words, and that no pickle runs."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import pickle
import struct
import sys
import tarfile
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_training.data import cifar10
from sparse_training.data import fashion_mnist as idx
from sparse_training.data.load import DATASETS, load_data
from sparse_training.data.splits import ImageData, Split, channel_statistics
from sparse_training.errors import UserError


@pytest.fixture(autouse=True)
def no_data_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the sets that this machine may have."""
    monkeypatch.delenv("SPARSE_TRAINING_DATA", raising=False)
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "debian")


def refuses(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """The one-line message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused_by_a_child(*arguments: Any) -> str:
    """The message with which ``load_data`` refuses, in a process that may crash or hang without harm."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def load() -> None:
        try:
            load_data(*arguments)
            theirs.send("no error")
        except UserError as error:
            theirs.send(str(error))
        except BaseException:
            theirs.send(traceback.format_exc())

    process = context.Process(target=load)
    process.start()
    process.join(20)
    hangs = process.exitcode is None
    process.kill()
    process.join()
    assert not hangs, "it never returns"
    assert process.exitcode == 0, f"it died of {process.exitcode}"
    message: str = mine.recv()
    assert "\n" not in message
    return message


def check_consistent(data: ImageData) -> None:
    for split in (data.train, data.test):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert tuple(split.images.shape[1:]) == data.shape
        assert len(split) == len(split.images) == len(split.labels) > 0
        assert split.labels.min() >= 0
        assert split.labels.max() < len(data.classes)
    scaled = data.train.images.double() / 255
    assert data.mean == pytest.approx(scaled.mean(dim=(0, 2, 3)).tolist())
    assert data.std == pytest.approx(scaled.std(dim=(0, 2, 3), correction=0).tolist())


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


# --- fashion-mnist ----------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def fashion_files(rows: int = 5) -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", rows), ("t10k", rows - 2)):
        images = generator.integers(0, 256, (count, 28, 28))
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(np.arange(count))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


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


def peak_bytes(call: Callable[..., Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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


# --- cifar10 ----------------------------------------------------------------------------------


def py2(value: Any) -> bytes:
    """Encode a value as Python 2's cPickle did at protocol 2; bytes stand for its str."""
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)
    if value is None:
        return b"N"
    if isinstance(value, bytes):
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, list):
        return b"](" + b"".join(map(py2, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(py2, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(py2(key) + py2(item) for key, item in value.items()) + b"u"
    assert isinstance(value, Raw)
    return value.code


class Raw:
    """Opcodes to put in as they are."""

    def __init__(self, code: bytes) -> None:
        self.code = code


def call(function: bytes, *arguments: Any) -> bytes:
    """Opcodes that call `function`, given as module, newline and name."""
    return b"c" + function + b"\n" + py2(arguments) + b"R"


def py2_array(
    array: np.ndarray,
    code: bytes = b"u1",
    module: bytes = b"numpy.core.multiarray",
    fortran: bool = False,
    **changes: Any,
) -> Raw:
    """A NumPy array as pickled under Python 2."""
    dtype = call(b"numpy\ndtype", code, 0, 1) + py2((3, b"|", None, None, None, -1, -1, 0)) + b"b"
    state = {
        "version": 1,
        "shape": array.shape,
        "dtype": Raw(dtype),
        "fortran": fortran,
        "raw": array.tobytes("F" if fortran else "C"),
    } | changes
    made = call(module + b"\n_reconstruct", Raw(b"cnumpy\nndarray\n"), (0,), b"b")
    return Raw(made + py2(tuple(state.values())) + b"b")


def batch(rows: int = 3, seed: int = 0, **changes: Any) -> dict[bytes, Any]:
    """The content of a batch file, in the published order."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)
    content = {
        "batch_label": b"training batch 1 of 5",
        "labels": [(seed + row) % 10 for row in range(rows)],
        "data": py2_array(pixels),
        "filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * rows,
    } | changes
    return {key.encode(): value for key, value in content.items()}


def file_of(content: Any) -> bytes:
    return b"\x80\x02" + py2(content) + b"."


def cifar_files() -> dict[str, bytes]:
    names = (*cifar10.TRAIN, cifar10.TEST)
    return {name: file_of(batch(3, seed)) for seed, name in enumerate(names)}


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def decode(raw: bytes) -> Split:
    return cifar10.decode_batch(raw, "a file")


def test_crafted_files_are_what_python_2_wrote() -> None:
    content = pickle.loads(file_of(batch(3, 1)), encoding="bytes")
    assert content[b"labels"] == [1, 2, 3]
    assert content[b"data"].dtype == np.uint8
    assert content[b"data"].shape == (3, 3072)


@pytest.mark.parametrize("place", ["folder", "its parent", "archive", "archive's folder"])
def test_cifar10(tmp_path: Path, place: str) -> None:
    files = cifar_files() | {"batches.meta": b"not read", "readme.html": b"not read"}
    if "archive" in place:
        found = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    else:
        found = write(tmp_path / "cifar-10-batches-py", files)
    before = sorted(tmp_path.rglob("*"))

    data = load_data("cifar10", found if place in ("folder", "archive") else tmp_path)

    check_consistent(data)
    assert data.shape == (3, 32, 32)
    assert (len(data.train), len(data.test)) == (15, 3)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be extracted"
    for seed in range(5):
        raw = pickle.loads(files[f"data_batch_{seed + 1}"], encoding="bytes")
        ours = data.train.images[3 * seed : 3 * seed + 3]
        np.testing.assert_array_equal(ours, raw[b"data"].reshape(3, 3, 32, 32))
        assert data.train.labels[3 * seed : 3 * seed + 3].tolist() == raw[b"labels"]
    assert data.test.labels.tolist() == [5, 6, 7]


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_array_layouts(module: bytes, fortran: bool) -> None:
    pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    pixels[1] += 7
    data = py2_array(pixels, module=module, fortran=fortran)
    images = decode(file_of(batch(2, data=data))).images
    np.testing.assert_array_equal(images.reshape(2, 3072), pixels)


PIXELS = np.zeros((3, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "must be a dict of b'data' and b'labels'"),
        ({b"data": py2_array(PIXELS)}, "must be a dict of b'data' and b'labels'"),
        (batch(data=b"pixels"), "not a NumPy array"),
        (batch(data=Raw(b"cnumpy\nndarray\n")), "not a NumPy array"),
        (batch(data=py2_array(PIXELS, code=b"f4")), "not a uint8 array"),
        (batch(data=py2_array(PIXELS, dtype=b"u1")), "not a uint8 array"),
        (batch(data=py2_array(PIXELS[:, :3071])), "not a uint8 array of shape [N, 3072]"),
        (batch(data=py2_array(PIXELS[:0]), labels=[]), "not a uint8 array of shape [N, 3072]"),
        (batch(data=py2_array(PIXELS, shape=(-3, -3072))), "not a uint8 array"),
        (batch(data=py2_array(PIXELS, raw=bytes(9215))), "3 images need 9216 pixels, got 9215"),
        (batch(data=py2_array(PIXELS, shape=(2**31 - 1, 3072))), "truncated"),
        (batch(data=Raw(call(b"numpy.core.multiarray\n_reconstruct"))), "not a uint8 array"),
        (batch(labels=[0, 1]), "must be a list of 3 labels"),
        (batch(labels=(0, 1, 2)), "must be a list of 3 labels"),
        (batch(labels=[0, 1, 10]), "labels must be integers from 0 to 9"),
        (batch(labels=[0, 1, True]), "labels must be integers from 0 to 9"),
        (batch(labels=[0, 1, -1]), "labels must be integers from 0 to 9"),
        (batch(labels=[0, 1, b"2"]), "labels must be integers from 0 to 9"),
    ],
)
def test_wrong_batch_file(content: Any, words: str) -> None:
    message = refuses(decode, file_of(content))
    assert message.startswith("a file: ")
    assert words in message


def hostile_files(canary: Path) -> dict[str, bytes]:
    """Opcodes that try to make the folder `canary`, by name."""
    command = f"mkdir {canary}".encode()
    code = f"__import__('os').mkdir({str(canary)!r})".encode()
    text = b"X" + struct.pack("<i", len(code)) + code
    system, name = b"posix\nsystem", b"X\x05\0\0\0posixX\x06\0\0\0system"
    run = py2((command,)) + b"R"
    return {
        "reduce": call(system, command),
        "os.system": call(b"os\nsystem", command),
        "eval": b"cbuiltins\neval\n(" + text + b"tR",
        "Python 2's eval": b"c__builtin__\neval\n(" + text + b"tR",
        "exec": b"cbuiltins\nexec\n(" + text + b"tR",
        "inst": b"(" + py2(command) + b"iposix\nsystem\n",
        "obj": b"(c" + system + b"\n" + py2(command) + b"o",
        "stack_global": name + b"\x93" + run,
        "newobj": b"csubprocess\nPopen\n" + py2(([b"mkdir", str(canary).encode()],)) + b"\x81",
        "dotted name": b"cnumpy\ndtype.__class__\n" + run,
        "through numpy": call(b"numpy.testing._private.utils\nrunstring", code, {}),
        "through getattr": call(b"builtins\ngetattr", Raw(b"cposix\nsystem\n"), b"__call__"),
    }


ATTACKS = tuple(hostile_files(Path("canary")))


@pytest.mark.parametrize("where", ["data", "labels", "beside"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_pickle_runs_nothing(tmp_path: Path, attack: str, where: str) -> None:
    canary = tmp_path / "canary"
    payload = Raw(hostile_files(canary)[attack])
    folder = write(tmp_path / "set", cifar_files())
    (folder / "data_batch_2").write_bytes(file_of(batch() | {where.encode(): payload}))
    message = refuses(load_data, "cifar10", folder)
    assert "data_batch_2" in message
    assert "refers to" in message
    assert not canary.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="posix.system")
@pytest.mark.parametrize("attack", ["reduce", "eval", "inst", "stack_global"])
def test_the_attacks_would_work_on_pickle(tmp_path: Path, attack: str) -> None:
    canary = tmp_path / "canary"
    pickle.loads(file_of(batch(data=Raw(hostile_files(canary)[attack]))), encoding="bytes")
    assert canary.exists()


def test_numpy_object_arrays_are_refused() -> None:
    """NumPy's own _reconstruct and dtype, given code O, would take pickled objects for pixels."""
    objects = py2_array(PIXELS, code=b"O8", raw=[b"x"] * PIXELS.size)
    assert "not a uint8 array" in refuses(decode, file_of(batch(data=objects)))


def test_state_set_on_a_name_changes_nothing() -> None:
    """BUILD can set attributes of whatever a name gives: here that is thrown away with the file."""
    build = b"cnumpy\ndtype\n" + py2((None, {b"__call__": 1, b"name": b"x"})) + b"b"
    good = file_of(batch())
    images = decode(good).images
    assert torch.equal(decode(file_of(batch(beside=Raw(build)))).images, images)
    assert torch.equal(decode(good).images, images)


def test_registered_extensions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import copyreg

    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))  # type: ignore[attr-defined]
    payload = Raw(b"\x82\x01" + py2((b"true",)) + b"R")
    assert "os.system" in refuses(decode, file_of(batch(data=payload)))


@pytest.mark.parametrize(
    "code",
    [
        b"Nr" + struct.pack("<I", 2**22) + b"0.",  # a memo index
        b"\x8e" + struct.pack("<Q", 2**40) + b"x.",  # the length of a string
        b"\x95" + struct.pack("<Q", 2**40) + b"N.",  # the length of a frame
    ],
)
def test_small_files_take_little_memory(code: bytes) -> None:
    assert peak_bytes(lambda: refuses(decode, b"\x80\x04" + code)) < 8 << 20


def test_damaged_batch_gives_one_error_or_a_batch() -> None:
    """A change of any byte outside the pixels raises no other exception."""
    good = file_of(batch(2))
    pixels = good.index(bytes(decode(good).images.flatten().tolist()))
    outside = [*range(pixels), *range(pixels + 2 * 3072, len(good))]
    generator = np.random.default_rng(0)
    refused = 0
    for position in outside:
        damaged = bytearray(good)
        damaged[position] ^= int(generator.integers(1, 256))
        try:
            split = decode(bytes(damaged))
        except UserError:
            refused += 1
        else:
            assert split.images.shape[1:] == (3, 32, 32)
    assert refused > len(outside) / 3
    for length in (0, 1, 2, pixels, len(good) - 1):
        refuses(decode, good[:length])


@pytest.mark.parametrize("archive", [False, True])
def test_missing_batch(tmp_path: Path, archive: bool) -> None:
    files = cifar_files()
    del files["data_batch_4"]
    root = write_tar(tmp_path / "a.tar.gz", files) if archive else write(tmp_path, files)
    message = refuses(load_data, "cifar10", root)
    assert str(root) in message
    assert "data_batch_4 is missing" in message


def test_damaged_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", cifar_files())
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 255
    for damaged in (raw[: len(raw) // 2], bytes(flipped), b"<html>404</html>", b""):
        path.write_bytes(damaged)
        assert str(path) in refuses(load_data, "cifar10", tmp_path)


@pytest.mark.parametrize("archive", [False, True])
def test_files_far_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool) -> None:
    monkeypatch.setattr(cifar10, "MAX_BYTES", 1000)
    files = cifar_files()
    root = write_tar(tmp_path / "a.tar.gz", files) if archive else write(tmp_path, files)
    message = refuses(load_data, "cifar10", root)
    assert "data_batch_1" in message
    assert "at most 1000 bytes" in message


def test_links_in_the_archive_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in cifar_files():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(member)
    assert "data_batch_1 is missing" in refuses(load_data, "cifar10", path)


def nested(levels: int) -> Raw:
    """Tuples in one another, whose hash overflows the stack of C; 0x85 puts the last value into a tuple."""
    return Raw(b"K\x01" + b"\x85" * levels)


@pytest.mark.parametrize("place", ["dict", "items", "item", "set", "frozenset"])
def test_a_key_of_nested_tuples_is_refused(tmp_path: Path, place: str) -> None:
    deep = nested(200_000).code
    hostile = {
        "dict": b"(" + deep + b"Nd",
        "items": b"}(" + deep + b"Nu",
        "item": b"}" + deep + b"Ns",
        "set": b"\x8f(" + deep + b"\x90",
        "frozenset": b"(" + deep + b"\x91",
    }
    folder = write(tmp_path / "set", cifar_files())
    (folder / "data_batch_2").write_bytes(b"\x80\x04" + hostile[place] + b".")
    assert "data_batch_2: not one of CIFAR-10's pickles" in refused_by_a_child("cifar10", folder)


def test_a_number_of_rows_with_a_million_digits_is_refused() -> None:
    huge = Raw(b"\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000)
    assert "not a uint8 array" in refuses(decode, file_of(batch(data=py2_array(PIXELS, shape=(huge, 3072)))))


def tar_member(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_of_four_gigabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(tar_member(kind, 4 << 30))
        for _ in range(128):
            file.write(bytes(1 << 20))
    assert peak_bytes(lambda: refuses(load_data, "cifar10", path)) < 8 << 20


def test_an_archive_that_goes_on_and_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "MAX_ARCHIVE_BYTES", 1 << 20, raising=False)
    path = tmp_path / "a.tar.gz"
    for content in (tar_member(tarfile.REGTYPE, 2 << 20) + bytes(2 << 20), bytes(4 << 20)):
        path.write_bytes(gzip.compress(content))
        assert "at most 1048576 bytes unpacked" in refuses(load_data, "cifar10", path)


def test_names_of_names_of_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress((tar_member(tarfile.GNUTYPE_LONGNAME, 1) + bytes(512)) * 20_000))
    assert "corrupt or not a tar.gz file" in refuses(load_data, "cifar10", path)


# --- imagefolder ------------------------------------------------------------------------------


def save_image(path: Path, color: Any, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; all images 12 pixels wide and 10 high."""
    save_image(tmp_path / "train/cat/b.png", (10, 20, 30))
    save_image(tmp_path / "train/cat/a.PNG", (40, 50, 60))
    save_image(tmp_path / "train/ant/z.bmp", 70, mode="L")
    save_image(tmp_path / "test/cat/x.png", (200, 0, 0, 255), mode="RGBA")
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/._b.png").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path


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
    assert load_data("imagefolder", folder).shape == (3, 32, 32)
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
