"""JPEGs decoded by the GPU (nvJPEG, through torchvision), box and resize on it too.

Its pixels are not the CPU decoder's bit for bit, so a run keeps the one it began with (see decoder_choice). What nvJPEG does
not take (other formats, CMYK, pictures that EXIF turns, damaged files) goes through the CPU decoder, which also words every
refusal.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.decode import Failures, decode_batch, decode_from_files, read_from_files
from dist_train.picture_header import DecodeError, read_header

JpegDecoder = Callable[[list[Tensor]], list[Tensor]]  # encoded (n,) uint8 each -> (3, H, W) uint8 each


class GpuDecoder:
    """Decodes batches that lie in open files, as `decode.decode_from_files` does, but on a device.

    decode_jpegs: the library's decoder; tests give another.
    """

    def __init__(self, device: torch.device, decode_jpegs: JpegDecoder | None = None):
        self.device = device
        self.decode_jpegs = decode_jpegs or self._nvjpeg
        self._threads = threading.local()
        self.has_decoded = False  # which a torchvision without nvJPEG never does

    def __call__(self, fds, offsets, sizes, checksums, boxes, size: tuple[int, int]) -> tuple[Tensor, Failures]:
        """Read, check and decode. Returns uint8 (N, h, w, 3) on the device, and the failures as (place, reason)."""
        source, starts, status = read_from_files(fds, offsets, sizes, checksums)
        with self._own_stream():
            out = torch.empty((len(starts), *size, 3), dtype=torch.uint8, device=self.device)
            if status.any():  # a shard's fault ends the run: let the CPU's decoder word it
                rows = np.empty(out.shape, np.uint8)
                failures = decode_from_files(fds, offsets, sizes, checksums, boxes, rows)
                return out.copy_(torch.from_numpy(rows)), failures  # none, where the fault was a passing one
            ends = starts.astype(np.int64) + np.asarray(sizes, np.int64)
            payloads = [source[a:b] for a, b in zip(starts.astype(np.int64), ends, strict=True)]
            return out, self.decode(payloads, boxes, out)

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """A stream of this thread's own, on which nothing is left to do at the end.

        nvJPEG writes into fresh memory without waiting for anybody. On the stream of the training that memory may be a
        freed tensor's which queued kernels still read (pytorch/vision issue 9606), and its end would be awaited, too.
        """
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._threads.stream):
            yield
            self._threads.stream.synchronize()  # whoever takes the batch need not wait

    def decode(self, payloads: list[np.ndarray], boxes: np.ndarray | None, out: Tensor) -> Failures:
        """Decode payloads, uint8 (n,) each, into out (N, h, w, 3); boxes: (N, 4) top, left, height, width, or None."""
        jpegs = [i for i, payload in enumerate(payloads) if _is_plain_jpeg(payload)]
        pictures = self._decoded([torch.from_numpy(payloads[i]) for i in jpegs])
        here = {i: picture for i, picture in zip(jpegs, pictures, strict=True) if picture is not None}
        self.has_decoded |= bool(here)
        for i, picture in here.items():
            box = (0, 0, *picture.shape[1:]) if boxes is None else boxes[i]
            out[i] = resize_box(picture, box, tuple(out.shape[1:3])).permute(1, 2, 0)
        left = sorted(set(range(len(payloads))) - here.keys())
        failures = []
        if left:
            rows = np.empty((len(left), *out.shape[1:]), np.uint8)
            failures = decode_batch([payloads[i].tobytes() for i in left], rows, None if boxes is None else boxes[left])
            out[torch.tensor(left, device=self.device)] = torch.from_numpy(rows).to(self.device)
        return [(left[i], reason) for i, reason in failures]

    def _decoded(self, jpegs: list[Tensor]) -> list[Tensor | None]:
        """The pixels of each; None for what the decoder refuses, which the CPU's may take. One refusal fails a whole call,
        so it is sought by halves: whose pixels the CPU's are must not follow from who else is in the batch."""
        try:
            return self.decode_jpegs(jpegs) if jpegs else []
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in ("out of memory", "CUDA error")):
                raise
        half = len(jpegs) // 2
        return self._decoded(jpegs[:half]) + self._decoded(jpegs[half:]) if half else [None]

    def _nvjpeg(self, encoded: list[Tensor]) -> list[Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(encoded, ImageReadMode.RGB, device=self.device)


def is_there() -> bool:
    """Whether torchvision still has the decoder, which it has announced to hand over to torchcodec (0.29)."""
    import torchvision.io

    return hasattr(torchvision.io, "decode_jpeg")


def resize_box(picture: Tensor, box, size: tuple[int, int]) -> Tensor:
    """Cut a box out and resize it, antialiased, as `decode.decode_into` does.

    picture: (C, H, W) uint8; box: top, left, height, width in pixels, fractions allowed. Returns (C, *size) uint8, which
    differs from the CPU's by its rounding between the two directions: one level at most.
    """
    top, left, height, width = (float(side) for side in box)
    if all(side.is_integer() for side in (top, left, height, width)):
        cut = picture[:, int(top) : int(top + height), int(left) : int(left + width)]
        if cut.shape[1:] == size:
            return cut
        resized = F.interpolate(cut[None].float(), size, mode="bilinear", antialias=True)[0]
        return resized.round_().clamp_(0, 255).to(torch.uint8)
    down = _taps(top, height, size[0], picture.shape[1], picture.device)
    across = _taps(left, width, size[1], picture.shape[2], picture.device)
    with torch.autocast(picture.device.type, enabled=False):
        return (down @ picture.float() @ across.t()).round_().clamp_(0, 255).to(torch.uint8)


def _is_plain_jpeg(payload: np.ndarray) -> bool:
    if payload[:2].tobytes() != b"\xff\xd8":
        return False
    try:
        header = read_header(payload.tobytes())
    except DecodeError:
        return False
    return header.orientation == 1 and header.channels in (1, 3)


def _taps(first: float, length: float, num_out: int, num_in: int, device: torch.device) -> Tensor:
    """(num_out, num_in) float32, rows add up to 1: the triangle by which Pillow weighs the pixels around a place."""
    scale = length / num_out
    support = max(scale, 1.0)
    centres = first + (torch.arange(num_out, dtype=torch.float64) + 0.5) * scale
    places = torch.arange(num_in, dtype=torch.float64) + 0.5
    weights = (1 - (places - centres[:, None]).abs() / support).clamp_(min=0)
    return (weights / weights.sum(1, keepdim=True)).float().to(device, non_blocking=True)
