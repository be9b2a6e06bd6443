"""Write one shard: the task of a worker process, a pure function of the samples it is handed.

A finished shard lies beside its notes (train-000000.tar.done), which say of which task it is the result. A conversion
that was cut short keeps what still fits and writes the rest, and the bytes are the same as of one that was not.
"""

import base64
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dist_train.durable import put_in_place, writing
from dist_train.index import SAMPLE, file_checksum
from dist_train.sources import Source
from dist_train.tars import TarWriter
from dist_train.workers import count_done

_GROUP_SAMPLES, _GROUP_BYTES = 256, 16_000_000  # read together, so that pictures of one size are decoded in one call
_VERSION = 2  # part of every fingerprint: raise it when the same task comes to give other bytes


@dataclass(frozen=True)
class ShardTask:
    """The samples of one shard, in order. first_key: number of its first sample in the split, which names members.

    resize, quality, check: as in ShardConfig.
    """

    path: Path
    first_key: int
    source: Source
    resize: int
    quality: int
    check: str

    def fingerprint(self) -> str:
        """A hash of all that the shard's bytes follow from, with the raw files' times in place of their bytes."""
        facts = (_VERSION, self.path.name, self.first_key, self.resize, self.quality, self.check)
        digest = xxhash.xxh3_128("|".join(map(str, facts)).encode())
        digest.update(np.ascontiguousarray(self.source.labels, "<i4").tobytes())
        digest.update(np.ascontiguousarray(self.source.sizes, "<i8").tobytes())
        digest.update("\n".join(self.source.store.stamps()).encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """What a shard turned out to hold. kept: places in the task, (n,) int64; rows: (n,) SAMPLE, of the same samples.

    bad: (place, reason) of the others. totals: `PixelSums` of the pictures, empty for tables.
    """

    size: int
    checksum: str
    kept: np.ndarray
    rows: np.ndarray
    bad: list[tuple[int, str]]
    totals: list[int]


def write_shard(task: ShardTask) -> ShardResult:
    """Write the shard, or find it written. Raises UserError where the disk does not take it.

    Each sample is `<key>.jpg`, `.png` or `.npy` and `<key>.cls`, the key being its planned number in the split; a
    sample that cannot be read leaves a gap in the keys, so that no other is renamed by it.
    """
    fingerprint = task.fingerprint()
    notes = task.path.with_name(f"{task.path.name}.done")
    done = _read_notes(notes, fingerprint)
    if done and task.path.exists() and task.path.stat().st_size == done.size:
        if file_checksum(task.path) == done.checksum:
            count_done(len(task.source.labels))
            return done
    notes.unlink(missing_ok=True)
    tar = TarWriter(task.path)
    try:
        result = _fill(tar, task)
    except BaseException:
        tar.abandon()
        raise
    _write_notes(notes, fingerprint, result)
    return result


def written_result(task: ShardTask) -> ShardResult | None:
    """The result of a task that another process has finished; None if it has not. The shard's bytes are not read."""
    done = _read_notes(task.path.with_name(f"{task.path.name}.done"), task.fingerprint())
    return done if done and task.path.exists() and task.path.stat().st_size == done.size else None


def _fill(tar: TarWriter, task: ShardTask) -> ShardResult:
    labels, rows, kept, bad, totals = task.source.labels.tolist(), [], [], [], []
    for group in _one_ahead(_stored(task, bad, totals)):
        members = []
        for place, payload, kind, _, _ in group:
            key = f"{task.first_key + place:08d}"
            members += ((f"{key}.{kind}", payload), (f"{key}.cls", b"%d" % labels[place]))
        for (place, payload, _, height, width), offset in zip(group, tar.extend(members)[::2], strict=True):
            rows.append((offset, len(payload), labels[place], height, width, xxhash.xxh3_64_intdigest(payload)))
            kept.append(place)
    checksum = tar.close()
    return ShardResult(tar.size, checksum, np.array(kept, np.int64), np.array(rows, SAMPLE), sorted(bad), totals)


def _one_ahead(groups: Iterator[list]) -> Iterator[list]:
    """The groups, the next one made by a thread meanwhile: reading and decoding need the interpreter for little of it."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, groups, None)
        while (group := upcoming.result()) is not None:
            upcoming = pool.submit(next, groups, None)
            yield group


def _stored(task: ShardTask, bad: list, totals: list) -> Iterator[list[tuple[int, bytes, str, int, int]]]:
    """Groups of (place, payload, kind, height, width) of every sample that can be read; others go to bad, sums to totals."""
    group, group_bytes, num_samples = [], 0, len(task.source.labels)
    if task.source.features is None:
        from dist_train.pictures import PixelSums, prepare

        sums = PixelSums()
    for place in range(num_samples):
        try:
            payload, kind = task.source.read(place)
            group.append((place, payload, kind))
            group_bytes += len(payload)
        except OSError as error:
            bad.append((place, error.strerror or str(error)))
        if len(group) < _GROUP_SAMPLES and group_bytes < _GROUP_BYTES and place < num_samples - 1:
            continue
        if task.source.features is None:
            payloads = [payload for _, payload, _ in group]
            # samples lie in a drawn order, so that every 16th is a sample of them that depends on nothing else
            trusted = [place % 16 > 0 for place, _, _ in group] if task.check == "sample" else ()
            stored, prepared = [], prepare(payloads, sums, task.resize, task.quality, trusted)
            for (place_in_task, _, _), picture in zip(group, prepared, strict=True):
                if isinstance(picture, Exception):
                    bad.append((place_in_task, str(picture)))
                else:
                    stored.append((place_in_task, *picture))
            yield stored
        else:
            yield [(*sample, 0, 0) for sample in group]
        count_done(len(group))
        group, group_bytes = [], 0
    if task.source.features is None:
        totals += sums.totals()


def _write_notes(path: Path, fingerprint: str, result: ShardResult) -> None:
    body = {
        "task": fingerprint, "size": result.size, "checksum": result.checksum, "bad": result.bad,
        "totals": result.totals, "kept": base64.b64encode(result.kept.astype("<i8").tobytes()).decode(),
        "rows": base64.b64encode(result.rows.tobytes()).decode(),
    }  # fmt: skip
    text = json.dumps(body)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        partial.write_text(f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}")
        put_in_place(partial, path)


def _read_notes(path: Path, fingerprint: str) -> ShardResult | None:
    """What the notes say, or None if there are none, they are damaged, or of another task."""
    try:
        checksum, _, text = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if xxhash.xxh3_128_hexdigest(text.encode()) != checksum or (body := json.loads(text))["task"] != fingerprint:
        return None
    return ShardResult(
        body["size"], body["checksum"], np.frombuffer(base64.b64decode(body["kept"]), "<i8"),
        np.frombuffer(base64.b64decode(body["rows"]), SAMPLE), [tuple(pair) for pair in body["bad"]], body["totals"],
    )  # fmt: skip
