"""Decoding: the same pixels as Pillow's decode, crop and antialiased resize, on both paths, and clear refusals."""

import errno
import importlib.util
import io
import os
import runpy
import shutil
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import xxhash
from conftest import ROOT
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from dist_train import core, decode
from dist_train.decode import DecodeError, decode_batch, decode_from_files, decode_into, picture_size

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_decode  # noqa: E402  a script beside the tests

SAMPLINGS = ("444", "422", "420", "440", "411")


@pytest.fixture(params=["native", "portable"])
def path(request, monkeypatch):
    """Run a test on the native core and without it."""
    if request.param == "portable":
        monkeypatch.setattr(decode, "native", None)
        monkeypatch.setattr(decode, "_native_missing", "left out by the test", raising=False)
    elif decode.native is None:
        pytest.skip(f"the native core is {decode.decoders()['native']}")
    return request.param


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 with large shapes and fine texture, as photographs have."""
    rng = np.random.default_rng(seed)
    sides = (width, height)
    large = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(sides, 3), np.float32)
    fine = Image.fromarray(rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)).resize(sides, 2)
    return np.clip(large * 0.8 + np.asarray(fine, np.float32) * 0.2, 0, 255).astype(np.uint8)


def saved(pixels: np.ndarray | Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, **{"format": "JPEG", "quality": 88} | options)
    return file.getvalue()


def reference(payload: bytes, height: int, width: int, box=None, interpolation: str = "bilinear") -> np.ndarray:
    """Decoded, turned, cropped and resized by Pillow, all at full size."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB")
    area = box and (box[1], box[0], box[1] + box[3], box[0] + box[2])
    if area and all(side == int(side) for side in area):
        picture, area = picture.crop(area), None
    return np.asarray(picture.resize((width, height), Image.Resampling[interpolation.upper()], area))


def decoded(payload: bytes, height: int, width: int, box=None, interpolation: str = "bilinear") -> np.ndarray:
    out = np.zeros((height, width, 3), np.uint8)
    decode_into(payload, out, box, interpolation)
    return out


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 1e-9)))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_whole_jpeg_is_equal_to_pillows(path, sampling, progressive):
    payload = simplejpeg.encode_jpeg(photo(83, 117), 88, "RGB", sampling)
    if progressive:
        payload = saved(photo(83, 117), progressive=True, subsampling=SAMPLINGS.index(sampling) % 3)
    assert (decoded(payload, 83, 117) == np.asarray(Image.open(io.BytesIO(payload)))).all()


@pytest.mark.skipif(not getattr(decode.native, "HAS_BASELINE", 0), reason="the native core's own decoder does not work here")
@pytest.mark.parametrize("kind", ["444", "422", "420", "grey", "440", "411", "progressive", "restarts", "cmyk"])
def test_plain_baseline_jpegs_are_decoded_without_libjpeg_and_are_equal_to_its_pixels(kind):
    rng = np.random.default_rng(11)
    for number in range(40):
        height, width, quality = *rng.integers(5, 90, 2), int(rng.choice([1, 10, 50, 75, 92, 100]))
        pixels = photo(height, width, number) if number % 4 else rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        options = {"subsampling": ("444", "422", "420").index(kind)} if kind in ("444", "422", "420") else {}
        options |= {"progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 3}}.get(kind, {})
        picture = Image.fromarray(pixels).convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
        payload = saved(picture, quality=quality, optimize=bool(number % 2), **options)
        if kind in ("440", "411"):
            payload = simplejpeg.encode_jpeg(pixels, quality, "RGB", kind)
        out, status = np.zeros((height, width, 3), np.uint8), np.zeros(1, np.uint8)
        sizes = np.array([len(payload)], np.uint32)
        num_baseline = decode.native.decode(payload, np.zeros(1, np.uint64), sizes, None, out, height, width, status, False)
        extreme = number % 4 == 0 or quality == 1  # sums of coefficients that no photograph has may be left to libjpeg
        assert num_baseline == (kind in ("444", "422", "420", "grey")) or extreme, (number, height, width, quality)
        assert (out == np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))).all(), (number, height, width, quality)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_any_box_cut_without_resizing_is_equal_to_the_whole_picture_cut(path, sampling):
    pixels = photo(150, 170)
    whole = decoded(payload := simplejpeg.encode_jpeg(pixels, 88, "RGB", sampling), 150, 170)
    rng = np.random.default_rng(3)
    for _ in range(60):
        top, left = rng.integers(0, 149), rng.integers(0, 169)
        height, width = rng.integers(1, 150 - top + 1), rng.integers(1, 170 - left + 1)
        cut = whole[top : top + height, left : left + width]
        assert (decoded(payload, height, width, (top, left, height, width)) == cut).all(), (top, left, height, width)


@pytest.mark.parametrize("interpolation, levels", [("bilinear", 1), ("bicubic", 2)])
def test_the_resize_is_pillows_within_one_grey_level_or_two(path, interpolation, levels):
    rng = np.random.default_rng(4)
    pixels = photo(140, 160)
    for _ in range(60):
        top, left, height, width = *rng.uniform(0, 60, 2), *rng.uniform(2, 80, 2)
        out = np.zeros((*rng.integers(1, 120, 2), 3), np.uint8)
        decode._resize(pixels, (top, left, height, width), out, interpolation)
        area = (left, top, left + width, top + height)
        expected = Image.fromarray(pixels).resize(out.shape[1::-1], Image.Resampling[interpolation.upper()], area)
        # Pillow rounds the box to 32 bits and may go down before across: the last bit of a few pixels
        assert np.abs(out.astype(int) - np.asarray(expected)).max() <= levels


def test_what_a_cubic_overshoots_is_cut_off_between_the_directions_as_pillow_does(path):
    rng = np.random.default_rng(9)
    pixels = rng.choice(np.array([0, 255], np.uint8), (60, 70, 3))
    for _ in range(40):
        box, out = (*rng.uniform(0, 20, 2), *rng.uniform(2, 40, 2)), np.zeros((*rng.integers(2, 90, 2), 3), np.uint8)
        decode._resize(pixels, box, out, "bicubic")
        left, right = box[1], box[1] + box[3]
        strip = Image.fromarray(pixels).resize((out.shape[1], 60), Image.Resampling.BICUBIC, (left, 0, right, 60))
        expected = strip.resize(out.shape[1::-1], Image.Resampling.BICUBIC, (0, box[0], out.shape[1], box[0] + box[2]))
        assert np.abs(out.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("interpolation", decode.INTERPOLATIONS)
def test_a_box_of_whole_pixels_is_cut_and_resized_as_torchvision_does(path, interpolation):
    rng = np.random.default_rng(8)
    pixels = photo(140, 160)
    for _ in range(150):
        top, left = rng.integers(0, 139), rng.integers(0, 159)
        height, width = rng.integers(1, 140 - top + 1), rng.integers(1, 160 - left + 1)
        out = np.zeros((rng.integers(1, 200), rng.integers(2, 200), 3), np.uint8)
        decode._resize(pixels, (top, left, height, width), out, interpolation)
        channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
        box = (int(side) for side in (top, left, height, width))
        expected = resized_crop(channels_first, *box, list(out.shape[:2]), InterpolationMode(interpolation), antialias=True)
        assert (out == expected.permute(1, 2, 0).numpy()).all(), (top, left, height, width, out.shape)


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
@pytest.mark.parametrize("size", [(150, 170), (900, 700)])
@pytest.mark.parametrize("kind", [*SAMPLINGS, "progressive", "grey", "cmyk", "restarts"])
def test_the_native_core_and_the_portable_path_give_equal_pixels(kind, size, monkeypatch):
    pixels = photo(*size)
    if kind in SAMPLINGS:
        payload = simplejpeg.encode_jpeg(pixels, 88, "RGB", kind)
    else:
        mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
        options = {"progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 3}}.get(kind, {})
        payload = saved(Image.fromarray(pixels).convert(mode), **options)
    rng = np.random.default_rng(5)
    for side in (8, 37, 200):
        for k, is_fractional in enumerate((True, True, True, True, False, False, False, False)):
            interpolation = tuple(decode.INTERPOLATIONS)[k % 2]
            height, width = rng.uniform(0.2, 1, 2) * size
            box = (rng.uniform(0, size[0] - height), rng.uniform(0, size[1] - width), height, width)
            box = box if is_fractional else tuple(np.floor(box))
            native, portable = np.zeros((2, side, side + 3, 3), np.uint8)
            status = np.zeros(1, np.uint8)
            sizes, boxes = np.array([len(payload)], np.uint32), np.array([box])
            how = native, *native.shape[:2], status, interpolation == "bicubic"
            decode.native.decode(payload, np.zeros(1, np.uint64), sizes, boxes, *how)
            with monkeypatch.context() as without:
                without.setattr(decode, "native", None)
                decode.decode_portable(payload, portable, box, interpolation)
            assert status[0] == 0, "the native core left a plain JPEG to the portable path"
            assert (native == portable).all(), (box, interpolation)


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
def test_what_lies_behind_the_end_of_a_picture_is_no_scan_of_it(monkeypatch):
    payload = PLAIN + b"\xff\xda" * 300  # a film behind a picture has such bytes, too
    assert np.array_equal(decoded(payload, 40, 40), decoded(PLAIN, 40, 40))
    monkeypatch.setattr(decode, "native", None)
    assert np.array_equal(decoded(payload, 40, 40), decoded(PLAIN, 40, 40))


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
def test_a_picture_cut_off_between_its_scans_has_equal_pixels_on_both_paths(monkeypatch):
    """libjpeg-turbo smooths what lacks bits, each version in its own way, and at the edges of a cut in another."""
    payload = saved(photo(150, 170), progressive=True)
    scans = [at for at in range(len(payload)) if payload[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for end in scans[1:]:
        cut = payload[:end] + b"\xff\xd9"
        for box in (None, (31, 40, 70, 60), (20.5, 7.25, 90, 120)):
            found = verdict(cut, box)
            assert found
            with monkeypatch.context() as without:
                without.setattr(decode, "native", None)
                assert found == verdict(cut, box), (end, box)


def verdict(payload: bytes, box=None) -> bytes | None:
    """The pixels, or nothing of a picture that is refused."""
    try:
        return decoded(payload, 33, 37, box).tobytes()
    except DecodeError:
        return None


def means_only(height: int, width: int, across: int, down: int) -> bytes:
    """A colour JPEG whose brightness is sampled `across` x `down` times as finely; each block is of one random value."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    rng, bits, last = np.random.default_rng(0), [], [0, 0, 0]
    for _ in range(-(-height // (8 * down)) * -(-width // (8 * across))):
        for component in [0] * (across * down) + [1, 2]:
            value = int(rng.integers(-60, 61))
            step, last[component] = value - last[component], value
            size = abs(step).bit_length()  # 4 bits of code, the step, and one bit that ends the block
            bits.append(f"{size:04b}" + (f"{step + (step < 0) * ((1 << size) - 1):0{size}b}" if size else "") + "0")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    sampled = bytes([1, across << 4 | down, 0, 2, 0x11, 0, 3, 0x11, 0])
    return b"".join([
        b"\xff\xd8", segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), segment(0xDB, b"\0" + b"\x10" * 64),
        segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + sampled),
        segment(0xC4, bytes([0, 0, 0, 0, 15, *[0] * 12, *range(15)])), segment(0xC4, bytes([16, 1, *[0] * 15, 0])),
        segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])),
        int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0"), b"\xff\xd9",
    ])  # fmt: skip


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
@pytest.mark.parametrize("across,down", [(4, 1), (4, 2), (2, 4)])
def test_a_cut_of_coarsely_sampled_chroma_is_equal_to_pillows(across, down):
    """Decoded at a half or a quarter, where libjpeg-turbo before 3.0 leaves a part of such chroma unwritten."""
    payload = means_only(700, 900, across, down)
    for side, scale in ((40, 4), (90, 2)):
        box = (100, 300, 500, 500)
        picture = Image.open(io.BytesIO(payload))
        picture.draft("RGB", (900 // scale, 700 // scale))
        reduced, expected = np.asarray(picture.convert("RGB")), np.zeros((side, side, 3), np.uint8)
        assert reduced.shape == (700 // scale, 900 // scale, 3)
        decode._resize(reduced, tuple(edge / scale for edge in box), expected)
        assert (decoded(payload, side, side, box) == expected).all(), scale


@pytest.mark.parametrize("interpolation", decode.INTERPOLATIONS)
def test_a_strongly_reduced_photo_stays_close_to_the_full_decode(path, interpolation):
    pixels = photo(1300, 1700)
    payload = saved(pixels, quality=90)
    rng = np.random.default_rng(6)
    found = []
    for side in (32, 64, 96, 150, 224):
        height, width = rng.uniform(0.5, 1, 2) * (1300, 1700)
        box = (rng.uniform(0, 1300 - height), rng.uniform(0, 1700 - width), height, width)
        found.append(psnr(*(of(payload, side, side, box, interpolation) for of in (decoded, reference))))
    assert min(found) >= 40 and np.mean(found) >= 45, found  # dB


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_and_the_box_is_in_the_displayed_picture(path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    payload = saved(photo(60, 90), format=form, exif=exif, **options)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(payload)))
    assert picture_size(payload) == shown.size[::-1]
    assert (decoded(payload, *shown.size[::-1]) == np.asarray(shown)).all()
    cut = np.asarray(shown)[11:41, 5:45]
    assert (decoded(payload, 30, 40, (11, 5, 30, 40)) == cut).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("entries", [1, 3, 65535])
def test_damaged_exif_is_taken_for_upright(path, order, entries):
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, entries) + b"\x01\x0f" * 3
    body = b"Exif\0\0" + tiff
    plain = saved(photo(20, 30))
    payload = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    assert (decoded(payload, 20, 30) == decoded(plain, 20, 30)).all()


MODES = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")] + [
    ("JPEG", "L"), ("JPEG", "CMYK"), ("BMP", "1"), ("BMP", "L"), ("BMP", "P"), ("BMP", "RGB"),
    ("WEBP", "RGB"), ("WEBP", "RGBA"),
]  # fmt: skip


@pytest.mark.parametrize("form,mode", MODES)
def test_every_colour_mode_becomes_rgb_as_pillow_converts_it(path, form, mode):
    payload = saved(Image.fromarray(photo(33, 47)).convert(mode), format=form)
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    assert (decoded(payload, 33, 47) == expected).all()
    assert picture_size(payload) == (33, 47)
    resized = decoded(payload, 20, 20, (3, 4, 25, 30))
    assert np.abs(resized.astype(int) - reference(payload, 20, 20, (3, 4, 25, 30))).max() <= 1


def test_the_sides_of_an_old_bmp_have_no_sign():
    assert picture_size(b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 40, 65_535, 1, 24)) == (65_535, 40)


def test_sixteen_bit_grey_keeps_its_high_byte(path):
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    payload = saved(Image.fromarray(levels), format="PNG")
    assert (decoded(payload, 64, 64) == (levels >> 8)[:, :, None]).all()


def test_a_palette_with_transparency_decodes_without_a_warning(path):
    picture = Image.fromarray(photo(20, 20)).convert("P")
    payload = saved(picture, format="PNG", transparency=bytes(range(256)))
    assert (decoded(payload, 20, 20) == np.asarray(picture.convert("RGB"))).all()


@pytest.mark.parametrize("height,width", [(1, 1), (1, 20_000), (20_000, 1), (3, 20_000), (2, 5)])
def test_pictures_of_extreme_shape(path, height, width):
    payload = saved(photo(height, width))
    assert picture_size(payload) == (height, width)
    assert (decoded(payload, height, width) == np.asarray(Image.open(io.BytesIO(payload)))).all()
    assert psnr(decoded(payload, 32, 32), reference(payload, 32, 32)) >= 40
    box = (0, width / 3, height, width / 3)
    assert psnr(decoded(payload, 7, 50, box), reference(payload, 7, 50, box)) >= 40


def jpeg_claiming(height: int, width: int) -> bytes:
    payload = saved(photo(40, 40))
    frame = payload.index(b"\xff\xc0")
    return payload[: frame + 5] + struct.pack(">HH", height, width) + payload[frame + 9 :]


def framed(payload: bytes, marker: int) -> bytes:
    """The JPEG with another marker in front of its frame header."""
    frame = payload.index(b"\xff\xc0")
    return payload[: frame + 1] + bytes([marker]) + payload[frame + 2 :]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


PLAIN = saved(photo(40, 40))
PNG = saved(photo(40, 40), format="PNG")
SCANS = saved(photo(40, 40), progressive=True)
HIDDEN = struct.pack(">H", len(PLAIN)) + framed(PLAIN, 0xC3)[2:]
LARGER = chunk(b"IHDR", struct.pack(">II", 20_000, 20_000) + PNG[24:29])
EMPTY_SCAN = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
REFUSED = {
    "nothing": (b"", "^is empty$"),
    "text": (b"hello, world", "not a JPEG, PNG"),
    "a gif": (saved(photo(9, 9), format="GIF"), "not a JPEG, PNG"),
    "a cut header": (PLAIN[:30], "cut off"),
    "a cut jpeg": (PLAIN[: len(PLAIN) // 2], "cannot be decoded|Premature|premature"),
    "a jpeg without its end": (PLAIN[:-2], "cannot be decoded"),
    "a cut png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "a jpeg bomb": (jpeg_claiming(65000, 65000) + bytes(3_000_000), "200,000,000"),
    "a png bomb": (PNG[:16] + struct.pack(">II", 20_000, 20_000) + PNG[24:], "200,000,000"),
    "a jpeg of no height": (jpeg_claiming(0, 40), "0 x 40"),
    "a jpeg larger than its bytes": (jpeg_claiming(9000, 9000), "too many for"),
    "a jpeg taller than its data": (jpeg_claiming(400, 40), "cannot be decoded"),
    "endless scans": (SCANS[:-2] + EMPTY_SCAN * 300 + SCANS[-2:], "more than 200 scans"),
    "endless scans of a baseline jpeg": (PLAIN[:-2] + EMPTY_SCAN * 300 + PLAIN[-2:], "more than 200 scans"),
    "endless scans, coded arithmetically": (framed(PLAIN, 0xC9)[:-2] + EMPTY_SCAN * 300, "more than 200 scans"),
    "garbage between segments": (PLAIN[:2] + b"\0\0\0" + PLAIN[2:], "marker"),
    "a frame behind what is no marker": (PLAIN[:2] + b"\xff\0" + HIDDEN + PLAIN[2:], "no JPEG marker"),
    "a lossless jpeg": (framed(PLAIN, 0xC3), "lossless or hierarchical .* ff c3"),
    "a hierarchical jpeg": (framed(PLAIN, 0xC5), "lossless or hierarchical .* ff c5"),
    "a png of two sizes": (PNG[:33] + LARGER + PNG[33:], "or has two"),
    "a png that begins with its text": (PNG[:8] + chunk(b"tEXt", bytes(16)) + PNG[8:], "begin with its header"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(path, name):
    payload, reason = REFUSED[name]
    with pytest.raises(DecodeError, match=reason):
        decoded(payload, 16, 16)


@pytest.mark.parametrize("marker", [0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF])
def test_only_what_is_reduced_while_decoding_is_decoded(path, marker):
    """TurboJPEG writes a lossless picture as large as it is, whatever size it was asked for."""
    with pytest.raises(DecodeError, match="lossless or hierarchical"):
        decoded(framed(saved(photo(512, 512)), marker), 16, 16)


@pytest.mark.parametrize("shape", [(40, 41), (39, 40), (41, 40)])
def test_a_decoder_that_gives_another_size_is_not_believed(monkeypatch, shape):
    monkeypatch.setitem(decode._PILLOW, "png", lambda payload: np.zeros((*shape, 3), np.uint8))
    for side in (40, 16):
        with pytest.raises(DecodeError, match="header says"):
            decode.decode_portable(PNG, np.zeros((side, side, 3), np.uint8))


BEFORE_THE_END = {
    "a restart that does not belong": b"\xff\xd3",
    "a second scan": b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0",
    "a marker that does not exist": b"\xff\x05\0\2",
}
NO_RESTARTS = list(BEFORE_THE_END)[1:]


@pytest.mark.parametrize("name,kind", [*((name, "420") for name in BEFORE_THE_END), *((name, "restarts") for name in NO_RESTARTS)])
@pytest.mark.parametrize("box", [None, (0, 0, 40, 90)], ids=["whole", "cut"])
def test_another_marker_than_the_end_behind_the_scan_is_refused(path, name, kind, box):
    payload = saved(photo(300, 90), **{"restart_marker_blocks": 5} if kind == "restarts" else {})
    at = len(payload) - (400 if kind == "420" else 2)
    with pytest.raises(DecodeError):
        decoded(payload[:at] + BEFORE_THE_END[name] + payload[at:], *((300, 90) if box is None else (40, 90)), box)


def test_a_bomb_is_refused_before_memory_is_taken(path):
    before = fuzz_decode._resident_mb()
    for payload in (jpeg_claiming(65000, 65000), jpeg_claiming(14_000, 14_000), REFUSED["a png bomb"][0]):
        with pytest.raises(DecodeError):
            decoded(payload, 16, 16)
    assert fuzz_decode._resident_mb() - before < 50


@pytest.mark.parametrize("kind", [*SAMPLINGS, "restarts", "progressive", "cmyk"])
def test_rows_below_the_box_need_not_be_there(path, kind):
    """Their bytes are left out where that is possible; what stands there changes nothing, even if it is damaged."""
    pixels = photo(300, 90)
    if kind in SAMPLINGS:
        payload = simplejpeg.encode_jpeg(pixels, 88, "RGB", kind)
    else:
        options = {"progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 5}}.get(kind, {})
        payload = saved(Image.fromarray(pixels).convert("CMYK" if kind == "cmyk" else "RGB"), **options)
    whole = decoded(payload, 300, 90)
    for bottom in (7, 64, 65, 130, 268, 284, 299):
        assert (decoded(payload, bottom, 90, (0, 0, bottom, 90)) == whole[:bottom]).all(), bottom
        assert (decoded(payload, 10, 90, (bottom - 5, 0, 10, 90))[:5] == whole[bottom - 5 : bottom]).all() or bottom > 290
    if kind != "progressive":
        damaged = payload[:-400] + b"\x00" * 398 + payload[-2:]
        assert (decoded(damaged, 60, 90, (0, 0, 60, 90)) == whole[:60]).all()


def test_bytes_between_the_last_row_and_the_end_are_harmless(path):
    assert (decoded(PLAIN[:-2] + b"\x12\x34\x56" + PLAIN[-2:], 40, 40) == decoded(PLAIN, 40, 40)).all()
    assert (decoded(PLAIN + b"trailing", 40, 40) == decoded(PLAIN, 40, 40)).all()


@pytest.mark.parametrize("box", [(50, 0, 10, 10), (0, 0, 0, 10), (float("nan"), 0, 5, 5), (0, -20, 10, 10)])
def test_a_box_outside_the_picture_is_refused(path, box):
    with pytest.raises(DecodeError, match="box .* lies outside the picture of 40 x 40"):
        decoded(PLAIN, 8, 8, box)


def test_a_box_over_the_edge_is_clipped(path):
    assert (decoded(PLAIN, 9, 9, (-5, 10, 100, 99)) == decoded(PLAIN, 9, 9, (0, 10, 40, 30))).all()


def test_a_batch_names_its_failures_and_decodes_the_rest(path):
    payloads = [PLAIN, PLAIN[:90], PNG, b"", PLAIN]
    out = np.zeros((5, 40, 40, 3), np.uint8)
    failures = decode_batch(payloads, out)
    assert [i for i, _ in failures] == [1, 3]
    assert all(reason for _, reason in failures)
    assert (out[0] == out[4]).all() and (out[0] == decoded(PLAIN, 40, 40)).all() and (out[2] == decoded(PNG, 40, 40)).all()
    assert decode_batch([], np.zeros((0, 4, 4, 3), np.uint8)) == []


def test_damage_does_not_spread_to_the_next_picture(path):
    without_tables = PLAIN[:2] + PLAIN[PLAIN.index(b"\xff\xc0") :]  # no quantisation tables of its own
    out = np.zeros((2, 40, 40, 3), np.uint8)
    assert [i for i, _ in decode_batch([PLAIN, without_tables], out)] == [1]


@pytest.fixture
def shard(tmp_path):
    """A file of three samples with bytes between them, its table, and the pictures."""
    payloads = [saved(photo(40, 40, seed)) for seed in range(2)] + [PNG]
    offsets, data = [], b""
    for payload in payloads:
        data += b"." * 7
        offsets.append(len(data))
        data += payload
    file = tmp_path / "train-000000.tar"
    file.write_bytes(data)
    fd = os.open(file, os.O_RDONLY)
    yield {
        "fds": np.full(3, fd, np.int32), "offsets": np.array(offsets, np.uint64),
        "sizes": np.array([len(p) for p in payloads], np.uint32),
        "checksums": np.array([xxhash.xxh3_64_intdigest(p) for p in payloads], np.uint64),
    }, payloads  # fmt: skip
    os.close(fd)


def test_samples_are_read_checked_and_decoded_from_files(path, shard):
    table, payloads = shard
    out, expected = np.zeros((2, 3, 24, 24, 3), np.uint8)
    boxes = np.array([[0, 0, 40, 40], [3, 5, 30, 20.5], [1, 1, 20, 20]])
    assert decode_from_files(**table, boxes=boxes, out=out) == []
    decode_batch(payloads, expected, boxes)
    assert (out == expected).all()
    assert decode_from_files(**table | {"checksums": None}, boxes=None, out=out) == []


def test_each_fault_of_a_shard_has_its_own_reason(path, shard):
    table, _ = shard
    out = np.zeros((3, 40, 40, 3), np.uint8)
    table["checksums"][0] ^= np.uint64(1)
    table["sizes"][2] += 1
    table["fds"][1] = 1_000_000
    unread = f"{decode.READ_FAILED}: {os.strerror(errno.EBADF)}"
    expected = [(0, decode.CHECKSUM_DIFFERS), (1, unread), (2, decode.SHORT_READ)]
    assert decode_from_files(**table, boxes=None, out=out) == expected
    assert all(reason.startswith(decode.SHARD_FAULTS) for _, reason in expected)
    assert not out.any()


def test_an_offset_past_what_files_can_have_is_a_truncated_shard(path, shard):
    table, _ = shard
    table["offsets"][1] = 2**63
    assert decode_from_files(**table, boxes=None, out=np.zeros((3, 40, 40, 3), np.uint8)) == [(1, decode.SHORT_READ)]


def test_threads_decode_the_same_pixels_side_by_side(path):
    payloads = [saved(photo(60 + k, 80 - k, k)) for k in range(12)]
    alone = np.zeros((12, 32, 32, 3), np.uint8)
    decode_batch(payloads, alone)
    results = [np.zeros_like(alone) for _ in range(4)]
    threads = [threading.Thread(target=lambda out=out: [decode_batch(payloads, out) for _ in range(5)]) for out in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((out == alone).all() for out in results)


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
def test_the_native_core_lets_other_threads_run():
    payload = saved(photo(1500, 2000))
    out, turns, done = np.zeros((6, 300, 300, 3), np.uint8), [], threading.Event()

    def work():
        decode_batch([payload] * 6, out)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        turns.append(time.monotonic())
        time.sleep(0.001)
    thread.join()
    assert len(turns) > 5


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
def test_the_native_core_refuses_arrays_of_the_wrong_size():
    out, status = np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.uint8)
    start, size = np.zeros(1, np.uint64), np.array([len(PLAIN)], np.uint32)
    for arguments in [
        (PLAIN, start, size + np.uint32(1), None, out, 8, 8, status), (PLAIN, start, size, None, out, 8, 9, status),
        (PLAIN, start + np.uint64(2**63), size, None, out, 8, 8, status),
        (PLAIN, start[:0], size, None, out, 8, 8, status), (PLAIN, start, size, np.zeros((1, 3)), out, 8, 8, status),
        (PLAIN, start, size, None, out, -8, -8, status),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="wrong number of bytes"):
            decode.native.decode(*arguments, False)
    with pytest.raises(ValueError, match="box lies outside"):
        decode.native.resize(out, 8, 8, (0.0, 0.0, 9.0, 8.0), out, 8, 8, False)


def test_the_decoders_in_use_are_told(path):
    told = decode.decoders()
    assert set(told) == {"jpeg", "png, webp, bmp", "checksum", "native"}
    assert ("native core" in told["jpeg"]) == (path == "native")


def test_a_mutated_picture_never_crashes_hangs_or_grows():
    found = fuzz_decode.decode_all(0, 300)
    assert found["decoded"] > 30 and found["growth_mb"] < fuzz_decode.GROWTH_LIMIT_MB


@pytest.mark.parametrize("revision", [(2, 0), (0, 0)])
def test_an_odd_jfif_revision_excuses_no_other_damage(path, revision):
    pixels = photo(60, 90)
    whole = bytearray(saved(pixels))
    whole[11:13] = revision
    assert whole[6:11] == b"JFIF\0"
    out, expected = np.empty((60, 90, 3), np.uint8), np.empty((60, 90, 3), np.uint8)
    decode_into(bytes(whole), out)
    decode_into(saved(pixels), expected)
    assert np.array_equal(out, expected)
    for bad in (whole[: len(whole) // 2], whole[: len(whole) // 2] + b"\xff\xd9"):
        with pytest.raises(DecodeError):
            decode_into(bytes(bad), out)


@pytest.mark.skipif(decode.native is None, reason="there is no native core")
def test_a_core_built_from_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(decode.native, "CORE_VERSION", core.CORE_VERSION + 1)
    other = runpy.run_path(core.__file__)
    assert other["native"] is None and "built from other sources" in other["missing"]
    monkeypatch.setattr(decode, "native", None)
    monkeypatch.setattr(decode, "missing", other["missing"])
    assert "built from other sources" in decode.decoders()["native"]


def test_the_core_is_built_anew_and_without_an_old_xxhash(tmp_path, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    build_ext = pytest.importorskip("setuptools.command.build_ext").build_ext
    compiler = compiler_or_skip()
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(build_ext, "build_extension", lambda self, extension: forced.append(self.force))
    command = runpy.run_path(str(ROOT / "setup.py"))["OptionalBuild"](setuptools.Distribution())
    command.build_temp, forced = str(tmp_path), []

    def has_checksum(number: int) -> bool:
        (tmp_path / "xxhash.h").write_text(f"#define XXH_VERSION_NUMBER {number}\n")
        extension = setuptools.Extension("core", [])
        command.build_extension(extension)
        return ("HAVE_XXHASH", "1") in extension.define_macros

    class Compiler:
        def compile(self, sources, output_dir):
            subprocess.run([*compiler, "-fsyntax-only", "-I", tmp_path, *sources], check=True, stderr=subprocess.DEVNULL)

    command.compiler = Compiler()
    assert [has_checksum(number) for number in (704, 800, 803)] == [False, True, True]
    assert all(forced) and len(forced) == 3


def compiler_or_skip() -> list[str]:
    command = (sysconfig.get_config_var("CC") or "cc").split()
    if decode.native is None or not shutil.which(command[0]):
        pytest.skip("there is no C compiler, or no native core")
    where = [f"-I{sys.prefix}/include", f"-L{sys.prefix}/lib"]  # conda's
    source = subprocess.run([*command, *where, "-E", "-include", "stdio.h", "-include", "jpeglib.h", "-x", "c", "/dev/null"],
                            capture_output=True)  # fmt: skip
    if source.returncode:
        pytest.skip("jpeglib.h lies where the compiler does not look")
    return [*command, *where]


def test_a_checksum_that_is_not_xxh3s_is_left_out_of_the_core(tmp_path):
    (tmp_path / "xxhash.h").write_text("static unsigned long XXH3_64bits(const void *at, size_t size) { return 1; }\n")
    library = tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        [*compiler_or_skip(), "-shared", "-fPIC", "-O0", "-w", "-DHAVE_XXHASH=1", "-I", tmp_path,
         "-I", sysconfig.get_path("include"), "-o", library, *ROOT.glob("dist_train/_*.c"), "-ljpeg"], check=True,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("_native", library)
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    assert built.CORE_VERSION == core.CORE_VERSION and not hasattr(built, "checksum")


def test_an_old_libjpeg_turbo_is_refused_by_the_compiler(tmp_path):
    def said(number: str) -> str:
        (tmp_path / "jpeglib.h").write_text(
            "#include_next <jpeglib.h>\n#undef LIBJPEG_TURBO_VERSION_NUMBER\n"
            f"#define LIBJPEG_TURBO_VERSION_NUMBER {number}\n"
        )
        command = [*compiler_or_skip(), "-E", "-I", tmp_path, "-I", sysconfig.get_path("include")]
        return subprocess.run([*command, ROOT / "dist_train/_native.c"], capture_output=True, text=True).stderr

    assert "2.0.6 or newer" in said("2000005") and not said("2000006")
