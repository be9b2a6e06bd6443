"""JPEGs decoded by the GPU (nvJPEG, through torchvision), box and resize on it too.

Its pixels are not the CPU decoder's bit for bit, so a run keeps the one it began with (see decoder_choice). What nvJPEG does
not take (other formats, CMYK, pictures that EXIF turns, damaged files) goes through the CPU decoder, which also words every
refusal.
"""

import contextlib
import queue
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.decode import INTERPOLATIONS, Failures, decode_batch, decode_from_files, read_from_files
from dist_train.picture_header import DecodeError, read_header

JpegDecoder = Callable[[list[Tensor]], list[Tensor]]  # encoded (n,) uint8 each -> (3, H, W) uint8 each
NUM_STREAMS = 2  # each keeps what it once took of the memory, and the library decodes one call at a time
PART_BYTES = 64 * 2**20  # of whole pictures, decoded at once
MAX_REACH = 94  # pixels under half of the filter; CUDA's interpolate has no room for the weights of more (48 KB, float32)


class GpuDecoder:
    """Decodes batches that lie in open files, as `decode.decode_from_files` does, but on a device.

    decode_jpegs: the library's decoder; tests give another.
    """

    def __init__(self, device: torch.device, decode_jpegs: JpegDecoder | None = None):
        self.device = device
        self.decode_jpegs = decode_jpegs or self._nvjpeg
        self._streams = queue.SimpleQueue()
        for _ in range(NUM_STREAMS):
            self._streams.put(None)  # made when it is first lent
        self.has_decoded = False  # which a torchvision without nvJPEG never does

    def __call__(
        self, fds, offsets, sizes, checksums, boxes, size: tuple[int, int], interpolation: str = "bilinear"
    ) -> tuple[Tensor, Failures]:
        """Read, check and decode. Returns uint8 (N, h, w, 3) on the device, and the failures as (place, reason)."""
        source, starts, status = read_from_files(fds, offsets, sizes, checksums)
        if status.any():  # a shard's fault ends the run: let the CPU's decoder word it
            rows = np.empty((len(starts), *size, 3), np.uint8)
            failures = decode_from_files(fds, offsets, sizes, checksums, boxes, rows, interpolation)
            with self._lent_stream():
                return torch.from_numpy(rows).to(self.device), failures  # none, where the fault was a passing one
        ends = starts.astype(np.int64) + np.asarray(sizes, np.int64)
        payloads = [source[a:b] for a, b in zip(starts.astype(np.int64), ends, strict=True)]
        with self._lent_stream():
            out = torch.empty((len(starts), *size, 3), dtype=torch.uint8, device=self.device)
        return out, self.decode(payloads, boxes, out, interpolation)

    @contextlib.contextmanager
    def _lent_stream(self) -> Iterator[None]:
        """A stream that nobody else uses meanwhile, and on which nothing is left to do at the end.

        nvJPEG writes into fresh memory without waiting for anybody. On a stream of others that memory may be a freed
        tensor's which queued kernels still read (pytorch/vision issue 9606), and its end would be awaited, too. torch has
        32 streams in all: one a thread would not be its own on machines of many cores.
        """
        if self.device.type != "cuda":
            yield
            return
        stream = self._streams.get() or torch.cuda.Stream(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                try:
                    yield
                finally:
                    stream.synchronize()  # whoever takes the batch need not wait
        finally:
            self._streams.put(stream)

    def decode(
        self, payloads: list[np.ndarray], boxes: np.ndarray | None, out: Tensor, interpolation: str = "bilinear"
    ) -> Failures:
        """Decode payloads, uint8 (n,) each, into out (N, h, w, 3); boxes: (N, 4) top, left, height, width, or None."""
        here, reach = set(), INTERPOLATIONS[interpolation]
        for part in _parts({i: num_bytes for i, payload in enumerate(payloads) if (num_bytes := _decoded_bytes(payload))}):
            with self._lent_stream():
                for i, picture in zip(part, self._decoded([torch.from_numpy(payloads[i]) for i in part]), strict=True):
                    if picture is None:
                        continue
                    box = (0, 0, *picture.shape[1:]) if boxes is None else boxes[i]
                    if reach * max(box[2] / out.shape[1], box[3] / out.shape[2]) <= MAX_REACH:
                        out[i] = resize_box(picture, box, tuple(out.shape[1:3]), interpolation).permute(1, 2, 0)
                        here.add(i)
        self.has_decoded |= bool(here)
        left = sorted(set(range(len(payloads))) - here)
        failures = []
        if left:
            rows = np.empty((len(left), *out.shape[1:]), np.uint8)
            of_left = None if boxes is None else boxes[left]
            failures = decode_batch([payloads[i].tobytes() for i in left], rows, of_left, interpolation)
            with self._lent_stream():
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


def resize_box(picture: Tensor, box, size: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Cut a box out and resize it, antialiased, as `decode.decode_into` does.

    picture: (C, H, W) uint8; box: top, left, height, width in pixels, fractions allowed. Returns (C, *size) uint8, which
    differs from the CPU's by its rounding between the two directions: one level at most. What bicubic overshoots is cut off there,
    too, or at hard edges it would be many levels.
    """
    top, left, height, width = (float(side) for side in box)
    is_cubic = interpolation == "bicubic"
    if all(side.is_integer() for side in (top, left, height, width)):
        cut = picture[:, int(top) : int(top + height), int(left) : int(left + width)]
        if cut.shape[1:] == size:
            return cut
        values = cut[None].float()
        if is_cubic:
            values = F.interpolate(values, (cut.shape[1], size[1]), mode=interpolation, antialias=True).clamp_(0, 255)
        resized = F.interpolate(values, size, mode=interpolation, antialias=True)[0]
        return resized.round_().clamp_(0, 255).to(torch.uint8)
    down = _taps(top, height, size[0], picture.shape[1], picture.device, is_cubic)
    across = _taps(left, width, size[1], picture.shape[2], picture.device, is_cubic)
    with torch.autocast(picture.device.type, enabled=False):
        values = picture.float()
        resized = down @ (values @ across.t()).clamp_(0, 255) if is_cubic else down @ values @ across.t()
        return resized.round_().clamp_(0, 255).to(torch.uint8)


def _decoded_bytes(payload: np.ndarray) -> int:
    """Of a JPEG's pixels; 0 for what the decoder is not given: other formats, CMYK, pictures that EXIF turns."""
    if payload[:2].tobytes() != b"\xff\xd8":
        return 0
    try:
        header = read_header(payload.tobytes())
    except DecodeError:
        return 0
    return 3 * header.height * header.width if header.orientation == 1 and header.channels in (1, 3) else 0


def _parts(sizes: dict[int, int]) -> Iterator[list[int]]:
    """The pictures, by number -> bytes, in lists of at most PART_BYTES together, or of one alone."""
    part, held = [], 0
    for i, num_bytes in sizes.items():
        if part and held + num_bytes > PART_BYTES:
            yield part
            part, held = [], 0
        part.append(i)
        held += num_bytes
    if part:
        yield part


def _taps(first: float, length: float, num_out: int, num_in: int, device: torch.device, is_cubic: bool) -> Tensor:
    """(num_out, num_in) float32, rows add up to 1: the triangle or the cubic by which Pillow weighs the pixels around a place."""
    scale = length / num_out
    stretch = max(scale, 1.0)
    centres = first + (torch.arange(num_out, dtype=torch.float64) + 0.5) * scale
    places = torch.arange(num_in, dtype=torch.float64) + 0.5
    away = (places - centres[:, None]).abs() / stretch
    if is_cubic:  # Keys 1981, a = -0.5
        outer = ((away - 5) * away + 8) * away - 4
        weights = torch.where(away < 1, (1.5 * away - 2.5) * away * away + 1, torch.where(away < 2, -0.5 * outer, 0.0))
    else:
        weights = (1 - away).clamp_(min=0)
    return (weights / weights.sum(1, keepdim=True)).float().to(device, non_blocking=True)
