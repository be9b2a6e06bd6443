"""Read a WebDataset tar made elsewhere: which members make a sample, its label, and where its payload lies."""

import io
import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from dist_train.dali_index import Member, check_dali_index
from dist_train.errors import UserError
from dist_train.index import SAMPLE, file_checksum

_PAYLOADS = ("jpg", "jpeg", "png", "webp", "npy")
_KINDS = (*_PAYLOADS, "cls", "json")
_LABEL_KEYS = ("label", "cls", "class", "target")


@dataclass
class Parsed:
    """What a tar holds. rows: (n,) SAMPLE, labels still to be numbered; bad: (key, reason) of what is left out."""

    rows: np.ndarray
    keys: list[str]
    labels: list[int | str]
    bad: list[tuple[str, str]]
    repeated: int
    checksum: str
    num_bytes: int
    key_counts: set[int]  # what other tools may give as the number of samples: distinct keys, or runs of them
    lengths: set[int]  # of the vectors
    left_aside: list[str]  # where there are no rows, extensions of members that are neither payload nor label


@dataclass
class _Group:
    """Members of one sample as they are met."""

    key: str
    payload: tuple[str, int, int] | None = None  # extension, offset, size
    label: int | str | None = None
    unlabelled: str = "no label: neither .cls nor .json with one"
    fault: str = ""
    seen: set = field(default_factory=set)


def parse_tar(path: Path, place: str) -> Parsed:
    """Read a tar from end to end. place: where it comes from: the path itself, or a URL.

    Raises UserError where it is no tar, compressed, cut short, or differs from the .idx beside it.
    """
    groups: list[_Group] = []
    members: list[Member] = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            for member in tar:
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"member {member.name} at byte {member.offset_data:,} is cut off")
                _add_member(groups, member, file)
                members.append((member.name, member.offset_data, member.size))
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):  # tarfile takes whatever is no header for the end
                raise tarfile.ReadError(f"no header where one belongs, at byte {tar.offset:,}")
            while rest := file.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError(f"it goes on after its end at byte {tar.offset:,}, as tars do that cat has joined")
    except (tarfile.TarError, EOFError) as error:
        with open(path, "rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        why = "it is compressed; unpack it first" if packed else f"{error}; fetch it again, or remove it"
        raise UserError(f"{path}: cannot be read as a tar: {why}.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    check_dali_index(place, members)
    rows, keys, labels, bad, lengths = [], [], [], [], set()
    with open(path, "rb") as file:
        for group in _completed(groups):
            why = group.fault or _lacking(group)
            if not why:
                kind, offset, length = group.payload
                file.seek(offset)
                row, why = _row(kind, offset, file.read(length), lengths)
            if why:
                bad.append((group.key, why))
            else:
                rows.append(row)
                keys.append(group.key)
                labels.append(group.label)
    bad += [(key, "a dot before its extension, which webdataset takes for the key's end") for key in _dotted(members)]
    return Parsed(
        np.array(rows, SAMPLE), keys, labels, bad, repeated=len(keys) - len(set(keys)), checksum=file_checksum(path),
        num_bytes=size, key_counts=_key_counts(members), lengths=lengths, left_aside=[] if rows else _left_aside(members),
    )  # fmt: skip


def _dotted(members: list[Member]) -> list[str]:
    """Samples by all but their names: a.b.jpg beside a.b.cls. Alone, a.seg.png is something else of sample a."""
    kinds: dict[str, set] = {}
    for name, _, _ in members:
        key, extension = _split_name(name)
        rest, dot, last = extension.lower().rpartition(".")
        if key and dot:
            kinds.setdefault(f"{key}.{rest}", set()).add("payload" if last in _PAYLOADS else last)
    return [key for key, found in kinds.items() if {"payload", "cls"} <= found]


def _left_aside(members: list[Member]) -> list[str]:
    extensions = dict.fromkeys(extension for key, extension in (_split_name(name) for name, _, _ in members) if key)
    return [extension for extension in extensions if extension.lower() not in _KINDS]


def _key_counts(members: list[Member]) -> set[int]:
    keys = [_split_name(name)[0] for name, _, _ in members if _split_name(name)[0]]
    runs = sum(key != before for before, key in zip([None, *keys], keys, strict=False))
    return {runs, len(set(keys))}


def _split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member: at the first dot of its file name; an empty key for hidden files and those without one."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem if stem and dot else ""), extension


def _add_member(groups: list[_Group], member: tarfile.TarInfo, file) -> None:
    key, extension = _split_name(member.name)
    extension = extension.lower()
    if not key or extension not in _KINDS:
        return
    kind = "payload" if extension in _PAYLOADS else "label"
    if not groups or groups[-1].key != key or extension in groups[-1].seen:
        groups.append(_Group(key))
    group = groups[-1]
    group.seen.add(extension)
    if kind == "payload":
        if group.payload:
            group.fault = f"two payloads: .{group.payload[0]} and .{extension}"
        group.payload = (extension, member.offset_data, member.size)
        return
    file.seek(member.offset_data)
    label, why = _label(extension, file.read(member.size))
    if label is None:
        group.unlabelled = why
    elif group.label is None:
        group.label = label
    elif group.label != label:
        group.fault = f"two labels: {group.label} and {label}"


def _label(extension: str, text: bytes) -> tuple[int | str | None, str]:
    """(label, why there is none)."""
    try:
        value = text.decode().strip()
        if extension == "json":
            entries = json.loads(value)
            entries = entries if isinstance(entries, dict) else {}
            value = next((entries[name] for name in _LABEL_KEYS if name in entries), None)
            if value is None:
                return None, f".json without {', '.join(_LABEL_KEYS)}"
    except (ValueError, RecursionError):
        return None, f".{extension} cannot be read"
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    good = good or (isinstance(value, str) and value and not re.fullmatch(r"[+-]?\d+", value))
    return (value, "") if good else (None, f"label {value!r} is neither a class number nor a name")


def _completed(groups: list[_Group]) -> list[_Group]:
    """Groups with the halves of samples joined whose members do not follow each other."""
    halves: dict[str, _Group] = {}
    joined = []
    for group in groups:
        half = halves.get(group.key)
        if group.payload and group.label is not None:
            joined.append(group)
        elif half and not half.fault and not group.fault and bool(half.payload) != bool(group.payload):
            half.payload, half.label = half.payload or group.payload, group.label if half.label is None else half.label
            del halves[group.key]
        else:
            halves[group.key] = group
            joined.append(group)
    return joined


def _lacking(group: _Group) -> str:
    if not group.payload:
        return "a label without a picture or vector"
    return group.unlabelled if group.label is None else ""


def _row(kind: str, offset: int, payload: bytes, lengths: set[int]) -> tuple[tuple | None, str]:
    """(SAMPLE without its label, or why the payload cannot be used). lengths: a vector's is added."""
    height = width = 0
    if kind == "npy":
        try:
            lengths.add(len(read_vector(payload)))
        except ValueError as error:
            return None, f".npy cannot be read: {error}"
    else:
        from dist_train.decode import DecodeError, picture_size

        try:
            height, width = picture_size(payload)
        except DecodeError as error:
            return None, str(error)
        if max(height, width) > 65_535:
            return None, f"{height} x {width} pixels; at most 65,535 a side have room in the index"
    return (offset, len(payload), 0, height, width, xxhash.xxh3_64_intdigest(payload)), ""


def read_vector(payload: bytes) -> np.ndarray:
    """The (F,) float32 in the bytes of a .npy file, which end with it. Raises ValueError, also for another shape or type."""
    file = io.BytesIO(payload)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is {version[0]}.{version[1]}; expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype != np.dtype("<f4") or len(shape) != 1:
        raise ValueError(f"it holds {dtype.name} {shape}; expected a vector of float32, little-endian")
    if len(payload) != file.tell() + 4 * shape[0]:
        raise ValueError(f"it has {len(payload):,} bytes, not {file.tell() + 4 * shape[0]:,}")
    return np.frombuffer(payload, "<f4", offset=file.tell())
