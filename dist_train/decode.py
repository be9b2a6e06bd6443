"""Picture bytes -> uint8 RGB pixels: the crop's box cut out, resized and written straight into the batch.

Two paths give the same pixels, bit for bit. The native core (_native.c, built where libjpeg-turbo's header is found)
decodes only the rows and columns the box needs, a whole batch a call: plain baseline JPEGs by itself where the
processor has AVX2 (_baseline.c), the others by libjpeg-turbo. The portable one (simplejpeg, torch and Pillow, from wheels)
decodes the rows down to the box's end. What the native core does not take (PNG, WebP, BMP, rotated or
damaged JPEGs) goes down the portable path, which also words every refusal, so that a bad sample is named alike on both.
Of damage below a crop they may judge differently: neither decodes what lies there as long as it need not.
"""

import math
import os
import re
import struct
import threading
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import numpy as np
import simplejpeg
import xxhash
from PIL import BmpImagePlugin, Image, PngImagePlugin, WebPImagePlugin

from dist_train.core import missing, native
from dist_train.picture_header import DecodeError, Header, png_chunks, read_header
from dist_train.store import CHECKSUM_DIFFERS, READ_FAILED, SHORT_READ

REDUCED_BEFORE_SCALING = 4  # the resize still halves a scaled picture at least, which keeps it above 45 dB, bicubic or not
SPARE_ROWS = 8  # below the last one needed: the decoder's upsampling of colour looks at most two ahead
KEPT_BYTES = 1 << 24  # of a thread, so that pictures up to 5 megapixels take no fresh memory
SCALED_FROM = 512  # pixels of the longer side; smaller pictures gain nothing from it

SHARD_FAULTS = (SHORT_READ, CHECKSUM_DIFFERS, READ_FAILED)  # so begin the reasons that are not the picture's fault

_FAULTS = [None, None, SHORT_READ, READ_FAILED, CHECKSUM_DIFFERS]  # by the native core's status; 0 is done
_ERRNO_FROM = 64  # statuses from here on are READ_FAILED, with the system's error number behind it
_LEFT = 1

INTERPOLATIONS = {"bilinear": 1, "bicubic": 2}  # and how far each reaches, in pixels, or of what is reduced in pixels of the result

Failures = list[tuple[int, str]]  # (place in the batch, reason)


def decode_into(payload: bytes, out: np.ndarray, box: tuple | None = None, interpolation: str = "bilinear") -> None:
    """Decode a JPEG, PNG, WebP or BMP, cut out `box`, and resize it antialiased into `out`.

    out: (h, w, 3) uint8, C-contiguous. box: (top, left, height, width) in pixels of the displayed picture, fractions
    allowed; None takes the whole picture. A box of whole pixels is cut out and resized as torchvision's crop and
    antialiased resize do it; the pixels of any other are those of Pillow's `resize((w, h), BILINEAR, box)`, or BICUBIC,
    which looks at what lies around the box. interpolation: a key of INTERPOLATIONS. A large JPEG's box is decoded at a
    half, a quarter or an eighth first, where REDUCED_BEFORE_SCALING says so. Grey is expanded, CMYK converted, 16 bits
    become 8, EXIF orientation is applied, transparency is dropped as Pillow's `convert("RGB")` drops it. Raises
    DecodeError with the reason. Heavy parts run without the GIL.
    """
    failures = decode_batch([payload], out[None], None if box is None else np.asarray(box, np.float64)[None], interpolation)
    if failures:
        raise DecodeError(failures[0][1])


def _fresh(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, np.uint8)


def _reused(num_bytes: int) -> np.ndarray:
    return _room(num_bytes, "payloads")[:num_bytes]


def decode_batch(
    payloads: list[bytes], out: np.ndarray, boxes: np.ndarray | None = None, interpolation: str = "bilinear"
) -> Failures:
    """Decode each payload into its row of `out` as `decode_into` does; return the failures, others are done.

    out: (N, h, w, 3) uint8, C-contiguous; boxes: (N, 4) float64 or None.
    """
    sizes = np.fromiter(map(len, payloads), np.uint32, len(payloads))
    status = np.zeros(len(payloads), np.uint8)
    return _decode(b"".join(payloads), _starts(sizes), sizes, boxes, out, status, interpolation)


def decode_from_files(fds, offsets, sizes, checksums, boxes, out: np.ndarray, interpolation: str = "bilinear") -> Failures:
    """Read, check and decode a batch of samples that lie in open files; return the failures, others are done.

    fds: (N,) int32 descriptors; offsets: (N,) uint64 and sizes: (N,) uint32, bytes; checksums: (N,) uint64 xxh3_64,
    or None to trust the bytes; the others: as in `decode_batch`. A reason that begins with one of SHARD_FAULTS is the shard's.
    """
    source, starts, status = read_from_files(fds, offsets, sizes, checksums, _reused)
    return _decode(source, starts, np.ascontiguousarray(sizes, np.uint32), boxes, out, status, interpolation)


def read_from_files(
    fds, offsets, sizes, checksums, memory: Callable[[int], np.ndarray] = _fresh
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first half of `decode_from_files`: (bytes one after the other, where each sample's begin, status, 0 for good).

    memory: gives the (n,) uint8 that the bytes go to.
    """
    sizes = np.ascontiguousarray(sizes, np.uint32)
    starts, status = _starts(sizes), np.zeros(len(sizes), np.uint8)
    source = memory(int(sizes.sum(dtype=np.int64)))
    files = np.ascontiguousarray(fds, np.int32), np.ascontiguousarray(offsets, np.uint64), sizes
    (native.read if native else _read)(*files, source, starts, status)
    if checksums is not None:
        found = np.zeros(len(sizes), np.uint64)
        (getattr(native, "checksum", None) or _checksum)(source, starts, sizes, found)
        status[(found != np.asarray(checksums, np.uint64)) & (status == 0)] = _FAULTS.index(CHECKSUM_DIFFERS)
    return source, starts, status


def picture_size(payload: bytes) -> tuple[int, int]:
    """(height, width) as displayed, without decoding. Raises DecodeError."""
    header = read_header(payload)
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


class NativeCore(NamedTuple):
    """The native core, or why it cannot be loaded. vectors: AVX2 where its own decoder of plain JPEGs is in use, or nothing."""

    missing: str = ""
    vectors: str = ""
    libjpeg_turbo: str = ""
    has_checksum: bool = False  # built where xxhash.h was found


def native_core() -> NativeCore:
    """The native core as it was built."""
    if not native:
        return NativeCore(missing=missing or "not used")
    vectors = "AVX2" if native.HAS_BASELINE else ""
    return NativeCore("", vectors, native.LIBJPEG_TURBO, hasattr(native, "checksum"))


def decoders() -> dict[str, str]:
    """Which decoder serves which format, and why the native core is missing where it is, with what would bring it."""
    core, pillow = native_core(), f"Pillow {Image.__version__}"
    if core.missing:
        return {
            "jpeg": f"simplejpeg {simplejpeg.__version__}, resized by torch and {pillow}",
            "png, webp, bmp": pillow,
            "checksum": "the xxhash package",
            "native": f"missing ({core.missing}); 2.5 times as fast on photographs, 4 to 15 times on small pictures: install a C "
            "compiler, Python's header and that of libjpeg-turbo 2.0.6 or newer (Debian, Ubuntu: python3-dev libjpeg-dev; "
            "Fedora: python3-devel libjpeg-turbo-devel) and run pip install again",
        }
    return {
        "jpeg": f"native core{core.vectors and f' ({core.vectors})'} and libjpeg-turbo (built with {core.libjpeg_turbo})",
        "png, webp, bmp": f"{pillow}, resized by the native core",
        "checksum": "its own" if core.has_checksum else "the xxhash package (xxhash.h 0.8 or newer was not found)",
        "native": "in use",
    }


def _decode(source, starts, sizes, boxes, out, status, interpolation: str) -> Failures:
    """Decode source[starts[i] :][: sizes[i]] into out[i] where status[i] is 0; others failed already, and say how."""
    assert out.dtype == np.uint8 and out.shape[1:] == (*out.shape[1:3], 3) and out.flags.c_contiguous, out.shape
    failures = [(int(i), _fault(int(status[i]))) for i in np.flatnonzero(status)]
    if boxes is not None:
        boxes = np.ascontiguousarray(boxes, np.float64)
    if native:
        native.decode(source, starts, sizes, boxes, out, *out.shape[1:3], status, interpolation == "bicubic")
        rest = np.flatnonzero(status == _LEFT)
    else:
        rest = np.flatnonzero(status == 0)
    for i in rest.tolist():
        try:
            start = int(starts[i])
            payload = bytes(memoryview(source)[start : start + int(sizes[i])])
            decode_portable(payload, out[i], None if boxes is None else boxes[i], interpolation)
        except DecodeError as error:
            failures.append((i, str(error)))
    return sorted(failures)


def _fault(status: int) -> str:
    return f"{READ_FAILED}: {os.strerror(status - _ERRNO_FROM)}" if status >= _ERRNO_FROM else _FAULTS[status]


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes, dtype=np.uint64) - sizes


def _read(fds, offsets, sizes, into, starts, status) -> None:
    """The native core's `read`, from the standard library."""
    rows = zip(fds.tolist(), offsets.tolist(), sizes.tolist(), starts.tolist(), strict=True)
    for i, (fd, offset, size, start) in enumerate(rows):
        room, done = memoryview(into)[start : start + size], 0
        try:
            while done < size and (got := os.preadv(fd, [room[done:]], offset + done)):
                done += got
        except OSError as error:
            status[i] = _ERRNO_FROM + error.errno if error.errno < 256 - _ERRNO_FROM else _FAULTS.index(READ_FAILED)
        except OverflowError:  # of an offset past what files can have
            status[i] = _FAULTS.index(SHORT_READ)
        else:
            status[i] = _FAULTS.index(SHORT_READ) if done < size else 0


def _checksum(source, starts, sizes, into) -> None:
    """The native core's `checksum`, from the xxhash package."""
    bounds = zip(starts.tolist(), (starts + sizes).tolist(), strict=True)
    into[:] = [xxhash.xxh3_64_intdigest(memoryview(source)[start:end]) for start, end in bounds]


def decode_portable(payload: bytes, out: np.ndarray, box=None, interpolation: str = "bilinear") -> None:
    """`decode_into` from wheels alone."""
    header = read_header(payload)
    shown = (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)
    box = _clipped(box, shown)
    scale = 1
    if header.format == "jpeg" and max(shown) >= SCALED_FROM:
        while scale < 8 and min(box[2] / out.shape[0], box[3] / out.shape[1]) >= REDUCED_BEFORE_SCALING * scale:
            scale *= 2
    area = tuple(side / scale for side in box)
    rows = header.height
    if header.frame and header.orientation == 1:
        reach = INTERPOLATIONS[interpolation] * max(area[2] / out.shape[0], 1.0) + SPARE_ROWS
        rows = min(rows, math.ceil(area[0] + area[2] + reach) * scale)
    try:
        if header.format == "jpeg":
            pixels = _jpeg(payload, header, scale, rows, "RGB" if native or _is_cut(area, out) else "RGBX")
        else:
            pixels = _PILLOW[header.format](payload)
    except (MemoryError, DecodeError):
        raise
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them to
        raise DecodeError(f"cannot be decoded as {header.format}: {error}") from None
    expected = (-(-header.height // scale), -(-header.width // scale))
    if pixels.shape[1] != expected[1] or len(pixels) not in (expected[0], -(-rows // scale)):
        raise DecodeError(f"decoded to {pixels.shape[:2]} pixels but its header says {expected}")
    pixels = _upright(pixels, header.orientation)
    if out.shape[:2] == shown and box == (0, 0, *shown):
        out[:] = pixels[:, :, :3]
    else:
        _resize(pixels, area, out, interpolation)


def _resize(pixels: np.ndarray, box: tuple[float, float, float, float], out: np.ndarray, interpolation: str = "bilinear") -> None:
    """Across, then down; rounded to 8 bits between."""
    if native and pixels.shape[2] == 3:
        native.resize(np.ascontiguousarray(pixels), *pixels.shape[:2], box, out, *out.shape[:2], interpolation == "bicubic")
    elif _is_cut(box, out):
        _resize_cut(pixels, box, out, interpolation)
    else:
        _resize_around(np.ascontiguousarray(pixels), box, out, interpolation)


def _is_cut(box: tuple[float, float, float, float], out: np.ndarray) -> bool:
    """Whether the box is cut out before the resize. torch errs in outputs one pixel wide on processors without AVX2."""
    return all(side == int(side) for side in box) and out.shape[1] > 1


def _resize_cut(pixels: np.ndarray, box: tuple[float, float, float, float], out: np.ndarray, interpolation: str) -> None:
    import torch  # only here: conversion starts many processes, and most of them never resize

    top, left, height, width = map(int, box)
    cut = torch.from_numpy(np.array(pixels[top : top + height, left : left + width, :3], order="C"))
    resized = torch.nn.functional.interpolate(cut.permute(2, 0, 1)[None], out.shape[:2], mode=interpolation, antialias=True)
    out[:] = resized[0].permute(1, 2, 0).numpy()


def _resize_around(pixels: np.ndarray, box: tuple[float, float, float, float], out: np.ndarray, interpolation: str) -> None:
    """In two steps, because Pillow 13 began to choose the order by the picture's shape."""
    top, left, height, width = box
    resample, reach = Image.Resampling[interpolation.upper()], INTERPOLATIONS[interpolation] * max(height / out.shape[0], 1.0)
    first, last = max(int(top - reach), 0), min(math.ceil(top + height + reach), len(pixels))
    rows = pixels[first:last]
    if pixels.shape[2] == 4:
        strip = Image.frombuffer("RGBX", rows.shape[1::-1], rows, "raw", "RGBX", 0, 1)  # mapped, not copied
    else:
        strip = Image.fromarray(rows)
    strip = strip.resize((out.shape[1], last - first), resample, (left, 0, left + width, last - first))
    area = (0, top - first, out.shape[1], top - first + height)
    result = strip.resize((out.shape[1], out.shape[0]), resample, area)
    out[:] = np.frombuffer(result.tobytes("raw", "RGB"), np.uint8).reshape(out.shape)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientations 2 to 8: 5 to 8 stand on their side, the others are mirrored or upside down. A view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _clipped(box, shown: tuple[int, int]) -> tuple[float, float, float, float]:
    if box is None:
        return 0.0, 0.0, float(shown[0]), float(shown[1])
    top, left, height, width = (float(side) for side in box)
    bottom, right = min(top + height, shown[0]), min(left + width, shown[1])
    top, left = max(top, 0.0), max(left, 0.0)
    if not (bottom > top and right > left):
        raise DecodeError(f"box {tuple(map(float, box))} lies outside the picture of {shown[0]} x {shown[1]} pixels")
    return top, left, bottom - top, right - left


def _jpeg(payload: bytes, header: Header, scale: int, rows: int, colours: str) -> np.ndarray:
    """Decode the upper `rows` rows at 1/scale, or all. colours: RGB, or RGBX, which Pillow maps without a copy.

    The array may lie in memory that this thread's next call uses again.
    """
    colours = "CMYK" if header.channels == 4 else colours
    room = _room(-(-header.height // scale) * -(-header.width // scale) * len(colours))
    pixels = None
    if rows < header.height:
        # a header that claims fewer rows ends the decoding there; that it then finds more bytes is no fault
        shorter = bytearray(payload)
        struct.pack_into(">H", shorter, header.frame + 5, rows)
        try:
            pixels = _decoded(shorter, rows, header.width, scale, colours, room)
        except ValueError:  # damaged above: the whole picture is tried, and words the refusal
            pass
    if pixels is None:
        pixels = _decoded(payload, header.height, header.width, scale, colours, room)
    return _cmyk_to_rgb(pixels) if header.channels == 4 else pixels


def _decoded(payload, height: int, width: int, scale: int, colours: str, room: np.ndarray) -> np.ndarray:
    height, width = -(-height // scale), -(-width // scale)
    smallest = {"min_height": height, "min_width": width} if scale > 1 else {}
    try:
        return simplejpeg.decode_jpeg(payload, colours, buffer=room, **smallest)
    except ValueError as error:
        at = bytes(payload[:_HEADER_BYTES]).find(b"JFIF\0") + 5
        if "unknown JFIF revision" in str(error) and at >= 5 and payload[at] != 1:
            # libjpeg keeps its first warning alone, and what is worse may stand behind that one
            known = bytes(payload[:at]) + b"\1" + bytes(payload[at + 1 :])
            return _decoded(known, height * scale, width * scale, scale, colours, room)
        if not _HARMLESS.search(str(error)):
            raise
    return room[: height * width * len(colours)].reshape(height, width, len(colours))  # it was written all the same


def _room(num_bytes: int, use: str = "pixels") -> np.ndarray:
    """(num_bytes or more,) uint8 of this thread's own, up to KEPT_BYTES kept for its next use: fresh memory costs a page
    fault every 4 kB."""
    if num_bytes > KEPT_BYTES:
        return np.empty(num_bytes, np.uint8)
    room = getattr(_kept, use, None)
    if room is None or len(room) < num_bytes:
        room = np.empty(num_bytes * 5 // 4, np.uint8)
        setattr(_kept, use, room)
    return room


_kept = threading.local()

# The picture is complete all the same: what the well-known dogs and cats set has by the dozen.
_HARMLESS = re.compile("extraneous bytes before marker 0xd9")
_HEADER_BYTES = 1 << 16  # where the JFIF marker is looked for


def _cmyk_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 of an inverted CMYK, as Adobe writes it and Pillow assumes -> (H, W, 3), Pillow's rounding."""
    black = pixels[:, :, 3:].astype(np.uint32)
    product = (255 - pixels[:, :, :3]) * black + 128
    return (black - ((product >> 8) + product >> 8)).astype(np.uint8)


def _png(payload: bytes) -> np.ndarray:
    """Decode without the chunks that are no pixels: Pillow warns of damage in text, profiles and animation."""
    plain, at = [payload[:8]], 8
    for name, body in png_chunks(payload):
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            plain.append(payload[at : at + 12 + len(body)])
        at += 12 + len(body)
    picture = PngImagePlugin.PngImageFile(BytesIO(b"".join(plain)))
    picture.load()
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    # a palette with transparency warns unless it goes by way of RGBA
    return np.asarray((picture.convert("RGBA") if picture.mode == "P" else picture).convert("RGB"))


def _webp(payload: bytes) -> np.ndarray:
    return np.asarray(WebPImagePlugin.WebPImageFile(BytesIO(payload)).convert("RGB"))


def _bmp(payload: bytes) -> np.ndarray:
    return np.asarray(BmpImagePlugin.BmpImageFile(BytesIO(payload)).convert("RGB"))


# The classes themselves, not Image.open: it warns of pictures of 90 MP, and would try forty other formats.
_PILLOW = {"png": _png, "webp": _webp, "bmp": _bmp}
