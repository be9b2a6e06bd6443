"""Pictures on their way into a shard: decoded once to prove them, encoded anew where asked, their pixels summed."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dist_train.decode import DecodeError, Header, decode_batch, decode_into, native, read_header

_MAX_SIDE = 65_535  # what the index has room for, and all that a JPEG can state
_MAX_BYTES = (1 << 32) - 1  # likewise
_PIXELS_AT_ONCE = 300_000  # decoded together where pictures of one size come often; stays in a core's cache
_ROW = 3 * 256  # bytes that are summed as columns


class Prepared(NamedTuple):
    """A picture as it is stored. kind: "jpg" or "png"; height and width in pixels as displayed."""

    payload: bytes
    kind: str
    height: int
    width: int


def prepare(
    payloads: list[bytes], sums: "PixelSums", resize: int = 0, quality: int = 90, trusted: Sequence[bool] = ()
) -> list[Prepared | DecodeError]:
    """Decode pictures to prove them, add their pixels to `sums`, and give each in the form that is stored.

    The decoder is the one that training uses: what passes here can be trained on; of the others the error is given.
    JPEG and PNG bytes are returned untouched, whatever the file was called. Other formats (WebP, BMP) become PNG,
    upright, because WebDataset's readers know those two alone; this keeps every pixel but makes WebP several times
    larger. resize > 0 brings the shorter side of a larger picture down to so many pixels, antialiased, and encodes it
    anew: PNG and BMP as PNG, the lossy formats as JPEG of this quality (1 to 100). Nothing is enlarged.

    trusted: for each picture, or for none, whether it is left undecoded, and its pixels not counted, where it would be
    returned untouched and has a sound header and an end.
    """
    done: list = [None] * len(payloads)
    untouched: dict[tuple[int, int], list[int]] = {}
    for i, payload in enumerate(payloads):
        try:
            header = read_header(payload)
            height, width = _displayed(header, len(payload))
            if header.format not in ("jpeg", "png") or 0 < resize < min(height, width):
                done[i], pixels = _encoded_anew(payload, header.format, height, width, resize, quality)
                sums.add(pixels)
                continue
        except DecodeError as error:
            done[i] = error
            continue
        done[i] = Prepared(payload, "jpg" if header.format == "jpeg" else "png", height, width)
        if trusted and trusted[i] and _has_end(payload, header.format):
            continue
        untouched.setdefault((height, width), []).append(i)
    for (height, width), members in untouched.items():
        at_once = max(1, _PIXELS_AT_ONCE // (height * width))
        for first in range(0, len(members), at_once):
            part = members[first : first + at_once]
            pixels = np.empty((len(part), height, width, 3), np.uint8)
            failures = decode_batch([payloads[i] for i in part], pixels)
            for place, reason in failures:
                done[part[place]] = DecodeError(reason)
            sums.add(np.delete(pixels, [place for place, _ in failures], axis=0) if failures else pixels)
    return done


def _displayed(header: Header, size: int) -> tuple[int, int]:
    height, width = header.height, header.width
    if max(height, width) > _MAX_SIDE or size > _MAX_BYTES:
        raise DecodeError(f"{height} x {width} pixels in {size:,} bytes; the index has room for {_MAX_SIDE:,} a side")
    return (width, height) if header.orientation >= 5 else (height, width)


def _has_end(payload: bytes, kind: str) -> bool:
    """Whether a JPEG's or PNG's last marker is there; a JPEG may hold another one, of a thumbnail, before its scan."""
    if kind == "png":
        return b"IEND" in payload[-64:]
    return payload.rfind(b"\xff\xd9") > payload.rfind(b"\xff\xda")


def _encoded_anew(payload: bytes, kind: str, height: int, width: int, resize: int, quality: int):
    """(Prepared, its pixels). Raises DecodeError."""
    smaller = 0 < resize < min(height, width)
    scale = resize / min(height, width) if smaller else 1.0
    height, width = (max(1, round(side * scale)) for side in (height, width))
    pixels = np.empty((height, width, 3), np.uint8)
    decode_into(payload, pixels)
    if not smaller or kind in ("png", "bmp"):
        return Prepared(encode_png(pixels), "png", height, width), pixels
    import simplejpeg

    payload = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420")
    decode_into(payload, pixels)  # the statistics are those of the stored picture
    return Prepared(payload, "jpg", height, width), pixels


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of (H, W) or (H, W, 3) uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class PixelSums:
    """Counts, sums and sums of squares per channel over any number of pictures, in integers.

    Exact, so that the mean of a set does not depend on how many processes shared the work.
    """

    def __init__(self):
        self._num_pixels = 0
        self._sums = np.zeros(6, np.uint64)

    def add(self, pixels: np.ndarray) -> None:
        """Add pictures. pixels: (..., 3) uint8."""
        flat = np.ascontiguousarray(pixels).reshape(-1)
        self._num_pixels += len(flat) // 3
        (native.sum_pixels if native else _sum_pixels)(flat, self._sums)

    def totals(self) -> list[int]:
        """[pixels, sums of R, G, B, sums of their squares] of everything added."""
        return [self._num_pixels, *self._sums.tolist()]


def _sum_pixels(flat: np.ndarray, totals: np.ndarray) -> None:
    """The native core's `sum_pixels`, from numpy."""
    whole = len(flat) // _ROW * _ROW
    for first in range(0, whole, _ROW << 8):  # stays in the CPU's cache, and squares of a column fit 32 bits
        rows = flat[first : min(whole, first + (_ROW << 8))].reshape(-1, _ROW)
        squares = np.multiply(rows, rows, dtype=np.uint16).sum(axis=0, dtype=np.uint32)
        for k, columns in enumerate((rows.sum(axis=0, dtype=np.uint32), squares)):
            totals[3 * k : 3 * k + 3] += columns.reshape(-1, 3).sum(axis=0, dtype=np.uint64)
    rest = flat[whole:].reshape(-1, 3).astype(np.uint64)
    totals += np.concatenate([rest.sum(axis=0), (rest * rest).sum(axis=0)])


def mean_and_std(totals: list[int]) -> tuple[list[float], list[float]]:
    """Per-channel mean and population standard deviation of pixels/255, from the added totals of `PixelSums`.

    A channel that never changes gets a deviation of 1, so that dividing by it does no harm.
    """
    count = totals[0]
    if not count:
        return [0.0] * 3, [1.0] * 3
    mean = [total / count / 255 for total in totals[1:4]]
    spread = [count * square - total * total for total, square in zip(totals[1:4], totals[4:7], strict=True)]
    return mean, [math.sqrt(s) / count / 255 if s else 1.0 for s in spread]
