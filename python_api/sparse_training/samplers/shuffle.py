"""A random order of rows that needs no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.sum_tree import uniform_double

_SHUFFLE = 3 << 48
_BLOCK = 1 << 14


class Shuffle:
    """A pass over the rows in a random order that needs no memory.

    The row at a place is the place enciphered (a Feistel network on pairs; Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002), so any part of the order is available at once. ``torch.randperm`` of 100 million rows takes
    800 MB and seconds.

    Args:
        rows: number of rows, at least 1.
        seed: seed of the order.
        epoch: number of the pass; each has an order of its own. Default 0.

    Attributes:
        position: place of the next row, 0 to ``rows``; the whole state.
    """

    ROUNDS = 6

    def __init__(self, rows: int, seed: int, epoch: int = 0) -> None:
        self.rows, self.position = rows, 0
        self.left = max(1, round(rows**0.5))
        self.right = -(-rows // self.left)  # left * right is at least rows, by less than left
        keys = uniform_double(torch.arange(self.ROUNDS, device="cpu"), seed=seed, step=epoch + _SHUFFLE)
        self.keys: list[int] = (keys * 2.0**32).long().tolist()
        self._block = torch.empty(0, dtype=torch.int64, device="cpu")
        self._begin = 0

    def peek(self) -> Tensor:
        """Next rows, at least one and at most a block of them; empty at the end."""
        if self.position >= self.rows:
            return self._block[:0]
        if not self._begin <= self.position < self._begin + len(self._block):
            self._begin = self.position
            self._block = self.at(torch.arange(self.position, min(self.position + _BLOCK, self.rows), device="cpu"))
        return self._block[self.position - self._begin :]

    def at(self, places: Tensor) -> Tensor:
        """Rows (int64) at places in [0, rows)."""
        found = self._encipher(places)
        while (outside := found >= self.rows).any():  # walk on until back inside: still one to one
            found = torch.where(outside, self._encipher(found), found)
        return found

    def _encipher(self, place: Tensor) -> Tensor:
        a, b = place // self.right, place % self.right
        for number, key in enumerate(self.keys):
            if number % 2:
                b = (b + _mix(a, key)) % self.right
            else:
                a = (a + _mix(b, key)) % self.left
        enciphered: Tensor = a * self.right + b
        return enciphered


def _mix(values: Tensor, key: int) -> Tensor:
    """Hash to 32 bits that all depend on every bit of key and values (the finaliser of MurmurHash3)."""
    x = values ^ key
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    mixed: Tensor = x ^ x >> 16
    return mixed
