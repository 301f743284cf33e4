"""CIFAR-10 from its published archive, which runs nothing."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import Raw, call, check_consistent, peak_bytes, py2, refused_by_a_child, refuses, write

from sparse_training.data import cifar10
from sparse_training.data.load import load_data
from sparse_training.data.splits import Split
from sparse_training.errors import UserError


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
