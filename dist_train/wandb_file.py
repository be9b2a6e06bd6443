"""Which figures a recording of Weights & Biases on the disk holds.

A .wandb file is 7 bytes of header and then blocks of 32 KiB, as in LevelDB's log format: fragments of (crc, length,
kind) and data, no fragment crossing a block, a record being one whole fragment or a first, middle ones and a last.
Each record is a protobuf message whose class wandb ships. wandb 0.31 itself has no public reader.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER, _BLOCK = 7, 32768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_FRAGMENT = struct.Struct("<IHB")  # crc32, length in bytes, kind


def recorded_rows(path: str | Path) -> list[dict]:
    """The rows logged to a .wandb file, {name: value}; what a killed run left half written is not among them."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in _records(Path(path).read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    if data[:4] != b":W&B":
        return
    place, parts = _HEADER, []
    while place + _FRAGMENT.size <= len(data):
        left_in_block = _BLOCK - place % _BLOCK
        if left_in_block < _FRAGMENT.size:
            place += left_in_block
            continue
        _, length, kind = _FRAGMENT.unpack_from(data, place)
        place += _FRAGMENT.size
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or place + length > len(data):
            return
        parts.append(data[place : place + length])
        place += length
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)
            parts = []
