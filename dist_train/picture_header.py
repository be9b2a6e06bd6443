"""What the first bytes of a picture say: format, size and orientation, without decoding; and what is refused at once."""

import re
import struct
from typing import NamedTuple

MAX_PIXELS = 200_000_000  # larger pictures are refused as decompression bombs; a 20,000 x 10,000 scan still passes
MAX_PIXELS_PER_BYTE = 2048  # Huffman coding spends a bit on 64 pixels at the very least, so 512 is the true limit
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)  # coded data have none but restarts, D0 to D7
MAX_SCANS = 200  # progressive pictures have about 10; thousands of empty ones keep a decoder busy for hours


class DecodeError(ValueError):
    """A picture that cannot be used; the message is the reason and names no file, for only the caller knows it."""


class Header(NamedTuple):
    """What a picture says of itself before any pixel is decoded. height and width are as stored, before rotation.

    frame: the byte where the frame header of a JPEG whose rows come one after the other (baseline) begins; else 0.
    """

    format: str
    height: int
    width: int
    orientation: int = 1  # EXIF: 1 upright, 2 to 8 mirrored or turned
    channels: int = 3
    frame: int = 0


def read_header(payload: bytes) -> Header:
    """Format, stored size and orientation. Raises DecodeError on what is no picture, or one too large to decode."""
    try:
        if payload[:2] == b"\xff\xd8":
            header = _jpeg_header(payload)
        elif payload[:8] == b"\x89PNG\r\n\x1a\n":
            header = _png_header(payload)
        elif payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
            header = _webp_header(payload)
        elif payload[:2] == b"BM":
            header = _bmp_header(payload)
        else:
            begins = bytes(payload[:8]).hex(" ")
            raise DecodeError(f"not a JPEG, PNG, WebP or BMP: begins with {begins}" if begins else "is empty")
    except (struct.error, IndexError):
        raise DecodeError("the header is cut off") from None
    if header.height < 1 or header.width < 1:
        raise DecodeError(f"the header says {header.height} x {header.width} pixels")
    if header.height * header.width > MAX_PIXELS:
        raise DecodeError(f"the header says {header.height} x {header.width} pixels; more than {MAX_PIXELS:,} are refused")
    return header


def _jpeg_header(payload: bytes) -> Header:
    orientation, at = 1, 2
    while True:
        if payload[at] != 0xFF or payload[at + 1] == 0:  # what decoders look for behind a zero need not be what is read here
            raise DecodeError(f"no JPEG marker where one belongs, at byte {at}")
        marker = payload[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
            continue
        (length,) = struct.unpack_from(">H", payload, at + 2)
        if marker in (0xDA, 0xD9) or length < 2:
            raise DecodeError("no frame header in the JPEG")
        if marker == 0xE1 and orientation == 1 and payload[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(payload[at + 10 : at + 2 + length])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            break
        at += 2 + length
    if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):  # a lossless one is not reduced while decoding: it would outgrow its room
        raise DecodeError(
            f"a lossless or hierarchical JPEG (frame marker ff {marker:02x}): only baseline and progressive ones are taken"
        )
    height, width, channels = struct.unpack_from(">HHB", payload, at + 5)
    is_huffman = marker < 0xC8  # arithmetic coding has no such limit
    if is_huffman and height * width > MAX_PIXELS_PER_BYTE * len(payload):
        raise DecodeError(f"the header says {height} x {width} pixels, too many for {len(payload)} bytes")
    if payload.count(b"\xff\xda", at) > MAX_SCANS and _num_scans(payload, at) > MAX_SCANS:
        raise DecodeError(f"a JPEG of more than {MAX_SCANS} scans")
    return Header("jpeg", height, width, orientation, channels, at if marker in (0xC0, 0xC1) else 0)


def _num_scans(payload: bytes, at: int) -> int:
    """Scans from the frame header at `at` to the end of the picture, behind which others may lie; as far as MAX_SCANS, and one."""
    num_scans = 0
    while num_scans <= MAX_SCANS and (found := _MARKER.search(payload, at)):
        marker, at = payload[found.end() - 1], found.end()
        if marker == 0xD9:
            break
        if marker not in (0x01, 0xD8) and at + 2 <= len(payload):
            at += struct.unpack_from(">H", payload, at)[0]
        num_scans += marker == 0xDA
    return num_scans


def _png_header(payload: bytes) -> Header:
    width, height = struct.unpack_from(">II", payload, 16)
    orientation, num_headers = 0, 0
    for name, body in png_chunks(payload):
        num_headers += name == b"IHDR"
        if name == b"eXIf" and not orientation:
            orientation = _exif_orientation(body)
    if payload[8:16] != b"\0\0\0\rIHDR" or num_headers > 1:  # Pillow takes the last one, wherever it stands
        raise DecodeError("a PNG that does not begin with its header, or has two")
    return Header("png", height, width, orientation or 1)


def _webp_header(payload: bytes) -> Header:
    kind, (bits,) = payload[12:16], struct.unpack_from("<I", payload, 21)
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", payload, 26))
        return Header("webp", height, width)
    if kind == b"VP8L":
        return Header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise DecodeError("no WebP picture in the RIFF file")
    width, height = (int.from_bytes(payload[at : at + 3], "little") + 1 for at in (24, 27))
    orientation, at = 1, 12
    while payload[20] & 8 and at + 8 <= len(payload):
        name, size = payload[at : at + 4], int.from_bytes(payload[at + 4 : at + 8], "little")
        if name == b"EXIF":
            orientation = _exif_orientation(payload[at + 8 : at + 8 + size].removeprefix(b"Exif\0\0"))
            break
        at += 8 + size + size % 2
    return Header("webp", height, width, orientation)


def _bmp_header(payload: bytes) -> Header:
    old = payload[14] == 12  # the 12-byte header of OS/2 has 16-bit sides
    width, height = struct.unpack_from("<HH" if old else "<ii", payload, 18)
    return Header("bmp", abs(height), width)


def _exif_orientation(tiff: bytes) -> int:
    """EXIF tag 0x0112 of the first directory, 1 where there is none or it makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for k in range(entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * k)
            if tag == 0x0112 and kind == 3:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def png_chunks(payload: bytes):
    """(name, body) of each chunk of a PNG; a body that is cut off comes short."""
    at = 8
    while at + 8 <= len(payload):
        size, name = struct.unpack_from(">I4s", payload, at)
        yield name, payload[at + 8 : at + 8 + size]
        at += 12 + size
