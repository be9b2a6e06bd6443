"""What is to be kept of a split, decoded: the rows and the key that they are found by."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from dist_train.errors import UserError
from dist_train.index import SplitIndex

_VERSION = 3  # part of every key: raise it when the same bytes come to be decoded to other pixels


@dataclass(frozen=True)
class Wanted:
    """What is to be kept of a split. how: by which rule samples become rows, in words: part of the key.

    shape and dtype: of one row. in_order: decodes all samples, as chunks of rows in their order.
    """

    split: SplitIndex
    shape: tuple[int, ...]
    dtype: torch.dtype
    how: str
    in_order: Callable[[], Iterable[np.ndarray]]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.split.num_samples * self.row_bytes

    @property
    def key(self) -> str:
        """A hash of all that the rows follow from."""
        text = f"{_VERSION}|{self.split.fingerprint()}|{self.split.num_samples}|{self.shape}|{self.dtype}|{self.how}"
        return xxhash.xxh3_128_hexdigest(text.encode())


def too_large(wanted: Wanted, free: int, where: str, instead: str) -> UserError:
    """The rows do not fit into the `free` bytes that `where` tells of; `instead`: what data.cache could be."""
    split = wanted.split
    return UserError(f"{split.folder}: the {split.name} split takes {wanted.num_bytes / 1e9:,.2f} GB decoded, and "
                     f"{max(0, free) / 1e9:,.2f} GB {where}.\n  Set data.cache to {instead}.")  # fmt: skip
