"""Damaged pictures against the decoder: no crash, no hang, no growth, no error but DecodeError, and one verdict.

    python tests/fuzz_decode.py --inputs 10000

Every input is a function of its number, so a failure is run again with --first. To see what the C core reads or
writes out of place, build it with AddressSanitizer into another folder and put that folder first:

    CFLAGS="-fsanitize=address -g" python setup.py build --build-lib build/asan
    LD_PRELOAD="$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \\
        PYTHONPATH=build/asan python tests/fuzz_decode.py --inputs 10000
"""

import argparse
import faulthandler
import io
import os
import time
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from dist_train import decode

TIME_LIMIT_S = 20.0  # a picture takes milliseconds; the largest a header may claim, a second
GROWTH_LIMIT_MB = 64


def seeds() -> list[bytes]:
    """Valid pictures of every kind the decoder takes."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((210, 130), 3))
    picture = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [simplejpeg.encode_jpeg(smooth, 85, "RGB", kind) for kind in ("444", "422", "420", "440", "411")]
    made.append(simplejpeg.encode_jpeg(np.ascontiguousarray(smooth[:, :, :1]), 85, "GRAY"))
    for mode, options in [
        ("RGB", {"format": "JPEG", "progressive": True}), ("RGB", {"format": "JPEG", "exif": exif}),
        ("CMYK", {"format": "JPEG"}), ("RGB", {"format": "JPEG", "restart_marker_blocks": 5}),
        ("RGB", {"format": "PNG"}), ("RGBA", {"format": "PNG", "exif": exif}),
        ("P", {"format": "PNG", "transparency": 3}),
        ("I;16", {"format": "PNG"}), ("RGB", {"format": "BMP"}), ("L", {"format": "BMP"}),
        ("RGB", {"format": "WEBP"}), ("RGBA", {"format": "WEBP", "lossless": True, "exif": exif}),
    ]:  # fmt: skip
        file = io.BytesIO()
        (picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)).save(file, **options)
        made.append(file.getvalue())
    return made


def damaged(number: int, valid: list[bytes]) -> bytes:
    """Input `number`: bit flips, a cut, lies in the header, or a splice of two pictures; some of each."""
    rng = np.random.default_rng(number)
    data = bytearray(valid[rng.integers(len(valid))])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.integers(6)
        at = int(rng.integers(len(data))) if data else 0
        if kind == 0:  # bits anywhere
            for place in rng.integers(0, max(len(data), 1), rng.integers(1, 8)):
                if place < len(data):
                    data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:  # bytes of the header, where sizes and tables are
            for place in rng.integers(0, min(len(data), 700) or 1, rng.integers(1, 6)):
                if place < len(data):
                    data[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)]))
        elif kind == 2:
            del data[at:]
        elif kind == 3:  # a piece of another picture, or of this one
            other = valid[rng.integers(len(valid))]
            begin = int(rng.integers(len(other)))
            data[at : at + int(rng.integers(400))] = other[begin : begin + int(rng.integers(400))]
        elif kind == 4:  # the frame header's size and sampling
            frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"), data.find(b"IHDR"), 0)
            for place in range(frame + 4, min(frame + 16, len(data))):
                if rng.random() < 0.3:
                    data[place] = int(rng.integers(256))
        else:
            data[at:at] = bytes(rng.integers(0, 256, rng.integers(1, 60), dtype=np.uint8))
    return bytes(data)


def decode_all(first: int, num_inputs: int, verbose: bool = False) -> dict[str, float]:
    """Decode inputs first..first+num_inputs-1 on both paths; return counts, the slowest input and the growth in MB.

    Raises whatever but DecodeError the decoder lets through, and AssertionError where a path gives no reason, or the paths other
    pixels; and where one alone refuses a whole picture. Damage below a box may go unseen.
    """
    valid = seeds()
    taken, slowest, resident = 0, 0.0, []
    out = np.zeros((1, 48, 64, 3), np.uint8)
    for number in range(first, first + num_inputs):
        payload = damaged(number, valid)
        rng = np.random.default_rng(number)
        box = None if number % 2 else (*rng.uniform(-20, 200, 2), *rng.uniform(0.01, 300, 2))
        began = time.monotonic()
        faulthandler.dump_traceback_later(TIME_LIMIT_S, exit=True)
        pixels = []
        for function in (decode.decode_into, decode.decode_portable):
            try:
                function(payload, out[0], box)
                pixels.append(out.tobytes())
            except decode.DecodeError as error:
                assert str(error), f"input {number}: no reason given"
        faulthandler.cancel_dump_traceback_later()
        taken += len(pixels)
        assert len(set(pixels)) <= 1, f"input {number}: the paths differ in their pixels"
        assert box or len(pixels) != 1, f"input {number}: one of the paths takes it, and the other does not"
        slowest = max(slowest, time.monotonic() - began)
        if number % max(num_inputs // 20, 1) == 0:
            resident.append(_resident_mb())
            if verbose:
                print(f"input {number}: {taken} decoded, slowest {slowest:.2f} s, {resident[-1]:.0f} MB", flush=True)
    settled = resident[len(resident) // 4 :]
    return {"decoded": taken, "slowest_s": slowest, "growth_mb": settled[-1] - settled[0]}


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    print("native core:", decode.decoders()["native"])
    found = decode_all(arguments.first, arguments.inputs, verbose=True)
    print(found)
    if found["growth_mb"] > GROWTH_LIMIT_MB:
        raise SystemExit(f"memory grew by {found['growth_mb']:.0f} MB")


if __name__ == "__main__":
    main()
