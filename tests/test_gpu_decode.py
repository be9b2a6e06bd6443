"""The GPU's decoder, exercised on the CPU: Pillow takes nvJPEG's place, the rest is the code that runs there."""

import contextlib
import dataclasses
import io
import threading
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import lines_of, sharded, tiny_run
from PIL import Image

from dist_train import decode, decoder_choice, gpu_decode
from dist_train.config import AugmentConfig, DataConfig, RunConfig
from dist_train.data import open_stream
from dist_train.decode import _resize, decode_batch
from dist_train.errors import UserError
from dist_train.gpu_decode import GpuDecoder, resize_box
from dist_train.train import run_training

CPU = torch.device("cpu")


def pillow(encoded):
    pictures = (np.array(Image.open(io.BytesIO(e.numpy().tobytes())).convert("RGB")) for e in encoded)
    return [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in pictures]


def counting(seen: list[int]):
    """The decoder, which notes how many pictures each call brings."""
    return lambda jpegs: seen.append(len(jpegs)) or pillow(jpegs)


def not_compiled(encoded):
    raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(bytearray(file.getvalue()), np.uint8)


@pytest.fixture
def photographs(tmp_path) -> str:
    """Shards of pictures of different sizes, so that the decoder cuts the boxes."""
    for k in range(40):
        path = tmp_path / "raw" / f"class{k % 2}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(60 + k, 90 - k, seed=k).save(path, quality=95)
    return sharded(tmp_path / "set", "--path", str(tmp_path / "raw"))


@pytest.mark.parametrize("box", [(0, 0, 90, 70), (3, 5, 40, 33), (10.5, 2.25, 20.5, 61.0), (80, 60, 10, 10)])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (120, 100)])
@pytest.mark.parametrize("interpolation", decode.INTERPOLATIONS)
def test_boxes_are_resized_as_the_cpu_does(box, size, interpolation):
    hard = np.random.default_rng(1).choice(np.array([0, 255], np.uint8), (90, 70, 3))  # where a cubic overshoots most
    for pixels in (np.array(picture(90, 70)), hard):
        expected = np.empty((*size, 3), np.uint8)
        _resize(pixels, box, expected, interpolation)
        found = resize_box(torch.from_numpy(pixels).permute(2, 0, 1), box, size, interpolation).permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("interpolation, most", [("bilinear", 94), ("bicubic", 47)])
def test_what_is_reduced_further_than_the_device_can_is_left_to_the_cpu(monkeypatch, interpolation, most):
    narrow, wide = encoded(picture(most * 3, 9), quality=95), encoded(picture(9, (most + 1) * 3), quality=95)
    reduced, resize = [], gpu_decode.resize_box
    monkeypatch.setattr(gpu_decode, "resize_box", lambda pixels, *more: reduced.append(pixels.shape) or resize(pixels, *more))
    found, expected = torch.empty((2, 3, 3, 3), dtype=torch.uint8), np.empty((2, 3, 3, 3), np.uint8)
    assert GpuDecoder(CPU, pillow).decode([narrow, wide], None, found, interpolation) == []
    assert decode_batch([narrow.tobytes(), wide.tobytes()], expected, None, interpolation) == []
    assert reduced == [(3, most * 3, 9)] and np.array_equal(found[1], expected[1])


def test_what_the_gpu_does_not_take_is_decoded_by_the_cpu_and_refusals_are_its_own():
    turned = Image.Exif()
    turned[0x0112] = 6
    whole = picture(50, 40)
    payloads = [encoded(whole, quality=95), encoded(whole, "PNG"), encoded(whole.convert("CMYK")), encoded(whole.convert("L")),
                encoded(whole, exif=turned), np.frombuffer(b"no picture", np.uint8)]  # fmt: skip
    out = torch.zeros(len(payloads), 24, 24, 3, dtype=torch.uint8)
    failures = GpuDecoder(CPU, counting(seen := [])).decode(payloads, None, out)
    expected = np.zeros(out.shape, np.uint8)
    assert failures == decode_batch([p.tobytes() for p in payloads], expected)
    assert seen == [2] and [i for i, _ in failures] == [5]
    assert (out.numpy()[:5].astype(int) - expected[:5]).__abs__().max() <= 3  # decoders of JPEG differ a little


def test_a_batch_is_decoded_in_parts_that_memory_bounds(monkeypatch):
    sizes = [(50, 40), (90, 70), (50, 40), (50, 40), (90, 70), (8, 8)]
    payloads = [encoded(picture(*size, seed), quality=95) for seed, size in enumerate(sizes)]
    whole = torch.zeros(len(payloads), 24, 24, 3, dtype=torch.uint8)
    GpuDecoder(CPU, pillow).decode(payloads, None, whole)
    monkeypatch.setattr(gpu_decode, "PART_BYTES", 3 * 50 * 40 * 2)
    parts = torch.zeros_like(whole)
    assert GpuDecoder(CPU, counting(seen := [])).decode(payloads, None, parts) == []
    assert seen == [1, 1, 2, 1, 1] and torch.equal(parts, whole)


def test_a_damaged_picture_among_others_is_found_out():
    good, bad = encoded(picture(50, 40)), encoded(picture(50, 40))[:60]
    out = torch.zeros(2, 24, 24, 3, dtype=torch.uint8)

    def refusing(jpegs):
        raise RuntimeError("error while decoding")

    failures = GpuDecoder(CPU, refusing).decode([good, bad], None, out)
    assert [i for i, _ in failures] == [1] and out[0].float().std() > 10


def test_whose_pixels_the_cpu_decodes_does_not_follow_from_the_batch():
    payloads = [encoded(picture(50, 40, seed), quality=95) for seed in range(9)]
    refused = payloads[5].tobytes()

    def painting(jpegs):  # white, where the device decodes
        if any(jpeg.numpy().tobytes() == refused for jpeg in jpegs):
            raise RuntimeError("Unknown chroma subsampling")
        return [torch.full((3, 50, 40), 255, dtype=torch.uint8) for _ in jpegs]

    for some in (range(9), range(4, 6), (5,), range(3)):
        out = torch.zeros(len(some), 24, 24, 3, dtype=torch.uint8)
        assert GpuDecoder(CPU, painting).decode([payloads[i] for i in some], None, out) == []
        assert [bool((pixels == 255).all()) for pixels in out] == [i != 5 for i in some]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("16 GB"), RuntimeError("CUDA error: an illegal memory access")])
def test_a_device_in_trouble_is_not_taken_for_a_damaged_picture(error):
    def failing(jpegs):
        raise error

    with pytest.raises(type(error), match=str(error)):
        GpuDecoder(CPU, failing).decode([encoded(picture(50, 40))] * 4, None, torch.zeros(4, 8, 8, 3, dtype=torch.uint8))


def test_a_fault_of_reading_that_passes_costs_no_pixels(photographs, monkeypatch):
    def first_batch(decoder):
        stream = open_stream(photographs, batch_size=8, image_size=32, crop="random_resized", threads=1, gpu_decoder=decoder)
        with contextlib.closing(stream):
            return next(stream).images.clone()

    def flickering(*args):
        source, starts, status = decode.read_from_files(*args)
        status[3] = 1
        return source, starts, status

    monkeypatch.setattr(gpu_decode, "read_from_files", flickering)
    assert torch.equal(first_batch(GpuDecoder(CPU, pillow)), first_batch(None))


@pytest.mark.parametrize("interpolation", decode.INTERPOLATIONS)
def test_the_stream_cuts_the_same_boxes_whoever_decodes(photographs, interpolation):
    def first(gpu, how=interpolation):
        wanted = {"image_size": 32, "crop": "random_resized", "interpolation": how}
        return next(open_stream(photographs, batch_size=8, threads=1, gpu_decoder=gpu, **wanted))

    ours, theirs = first(None), first(GpuDecoder(CPU, pillow))
    (other,) = decode.INTERPOLATIONS.keys() - {interpolation}
    assert not torch.equal(ours.images, first(None, other).images)
    assert ours.keys == theirs.keys and theirs.images.shape == (8, 3, 32, 32)
    assert theirs.images.is_contiguous(memory_format=torch.channels_last)
    assert (ours.images.int() - theirs.images.int()).abs().float().mean() < 2


def test_a_broken_shard_ends_the_stream_by_name(photographs, tmp_path):
    path = next((tmp_path / "set").glob("train-*.tar"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        for _ in open_stream(photographs, batch_size=8, image_size=32, crop="random_resized", threads=1, stop_step=8,
                             gpu_decoder=GpuDecoder(CPU, pillow)):  # fmt: skip
            pass


def test_both_decoders_are_timed_where_pictures_are_cut(photographs, digits, tmp_path):
    data = DataConfig(shards=photographs, image_size=32, threads=1)
    config = RunConfig(data=data, augment=AugmentConfig(crop="random_resized"))
    found = decoder_choice.rates(config, GpuDecoder(CPU, pillow), 1)
    assert decoder_choice.rates(config, GpuDecoder(CPU, not_compiled)).keys() == {"cpu"}
    assert found["cpu"] > 0 and found["gpu"] > 0
    assert decoder_choice.rates(dataclasses.replace(config, data=DataConfig(shards=digits)), GpuDecoder(CPU, pillow)) is None
    with pytest.raises(UserError, match="the pictures differ in size, so a size is needed"):
        unsized = dataclasses.replace(config, data=DataConfig(shards=photographs))
        decoder_choice.rates(unsized, GpuDecoder(CPU, pillow))
    iris = sharded(tmp_path / "iris", "--source", "sklearn", "--dataset", "iris")
    table = dataclasses.replace(config, data=DataConfig(shards=iris, crop="random_resized"))
    assert decoder_choice.rates(table, GpuDecoder(CPU, pillow)) is None


def test_the_cpus_speed_is_that_of_its_threads_together(photographs, monkeypatch):
    cores = threading.Semaphore(2)

    def decode_on_two_cores(fds, offsets, sizes, checksums, boxes, out, how):
        assert len(fds) == len(offsets) == len(sizes) == len(boxes) == len(out)
        with cores:
            time.sleep(0.001 * len(out))

    monkeypatch.setattr(decoder_choice, "decode_from_files", decode_on_two_cores)
    config = RunConfig(data=DataConfig(shards=photographs, image_size=32), augment=AugmentConfig(crop="random_resized"))
    speed = {n: decoder_choice.rates(config, GpuDecoder(CPU, pillow), n)["cpu"] for n in (1, 8)}
    assert 400 < speed[1] <= 1000 and 800 < speed[8] <= 2000  # eight threads on two cores are two times as fast as one


def test_the_threads_of_a_rank_are_those_that_are_measured(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(decoder_choice, "rates", lambda config, gpu, num_threads: asked.append(num_threads))
    decoder_choice.choose_decoder(RunConfig(), tmp_path, torch.device("cuda"), 6)
    decoder_choice.choose_decoder(RunConfig(), tmp_path, torch.device("cuda"))
    assert asked == [6, 0]


def test_the_choice_is_recorded_and_kept(tmp_path, monkeypatch):
    auto, gpu = RunConfig(), torch.device("cuda")
    monkeypatch.setattr(decoder_choice, "is_there", lambda: True)
    assert decoder_choice.choose_decoder(auto, tmp_path, CPU).data.decode == "cpu"
    for rates, expected in (({"cpu": 100, "gpu": 200}, "gpu"), ({"cpu": 100, "gpu": 105}, "cpu"), (None, "cpu")):
        monkeypatch.setattr(decoder_choice, "rates", lambda *_, rates=rates: rates)
        assert decoder_choice.choose_decoder(auto, tmp_path, gpu).data.decode == expected
    monkeypatch.setattr(decoder_choice, "is_there", lambda: False)
    assert decoder_choice.choose_decoder(auto, tmp_path, gpu).data.decode == "cpu"
    asked = RunConfig(data=DataConfig(decode="gpu"))
    with pytest.raises(UserError, match="this torchvision has no decode_jpeg"):
        decoder_choice.choose_decoder(asked, tmp_path, gpu)
    monkeypatch.setattr(decoder_choice, "is_there", lambda: True)
    assert decoder_choice.choose_decoder(asked, tmp_path, gpu).data.decode == "gpu"
    with pytest.raises(UserError, match="data.decode is gpu, and this machine computes on the cpu"):
        decoder_choice.choose_decoder(asked, tmp_path, CPU)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"decode": "gpu"}}))
    assert decoder_choice.choose_decoder(auto, tmp_path, gpu).data.decode == "cpu"  # a start that came to nothing decides nothing
    (tmp_path / "checkpoints").mkdir()
    assert decoder_choice.choose_decoder(auto, tmp_path, gpu).data.decode == "gpu"  # measured or not
    with pytest.raises(UserError, match="go on where there is one"):
        decoder_choice.choose_decoder(auto, tmp_path, CPU)
    (tmp_path / "config.yaml").write_text("seed: 0\n")  # a run from before there was a choice
    assert decoder_choice.choose_decoder(auto, tmp_path, gpu).data.decode == "cpu"


def test_a_run_does_not_change_its_decoder(digits, tmp_path):
    argv = tiny_run(digits, tmp_path / "run", "--train.max_steps", "1")
    assert run_training(argv) == 0
    config = tmp_path / "run/config.yaml"
    assert yaml.safe_load(config.read_text())["data"]["decode"] == "cpu"
    assert run_training([*argv[:-1], "2", "--resume"]) == 0
    config.write_text(config.read_text().replace("decode: cpu", "decode: gpu"))
    with pytest.raises(UserError, match="data.decode: 'gpu' in the run, 'cpu' now"):
        run_training([*argv[:-1], "3", "--resume", "--data.decode", "cpu"])
    assert [line["step"] for line in lines_of(tmp_path / "run", "train")] == [1, 2]
