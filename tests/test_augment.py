"""Augmentation is a function of the keys, and each operation is torchvision's on the same parameters."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import some_keys
from torchvision.transforms import InterpolationMode

from dist_train import augment as A
from dist_train import mixing, order, policies
from dist_train.augment import Augment, evaluation_pixels
from dist_train.config import AugmentConfig
from dist_train.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FILL = torch.tensor(MEAN).view(1, 3, 1, 1)
EVERYTHING = AugmentConfig(
    crop="random_resized", flip=0.5, flip_vertical=0.5, rotate_degrees=15, trivial=True, brightness=0.3, contrast=0.3,
    saturation=0.3, hue=0.1, grayscale=0.3, erase=0.5,
)  # fmt: skip
CONFIGS = {
    "plain": AugmentConfig(),
    "flip": AugmentConfig(flip=0.5),
    "flip_vertical": AugmentConfig(flip_vertical=0.5),
    "padded": AugmentConfig(crop="padded", flip=0.5, padding=3),
    "rotate": AugmentConfig(rotate_degrees=15, flip=0.5),
    "padded_rotate": AugmentConfig(crop="padded", rotate_degrees=15),
    "random_resized": AugmentConfig(crop="random_resized", flip=0.5),
    "colour": AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, grayscale=0.2, erase=0.3),
    "trivial": AugmentConfig(crop="padded", flip=0.5, trivial=True),
    "trivial_cropped": AugmentConfig(crop="random_resized", flip_vertical=0.5, trivial=True),
    "rand": AugmentConfig(crop="padded", flip=0.5, rand_ops=2),
    "rand_cropped": AugmentConfig(crop="random_resized", rotate_degrees=10, rand_ops=3, rand_magnitude=15),
    "everything": EVERYTHING,
}


def normalize(images, mean, std):
    """Of their own size: the pixels of an evaluation, which torchvision's are compared with below."""
    return evaluation_pixels(images, images.shape[2:], mean, std)


def noise(n: int, height: int = 20, width: int = 24, channels: int = 3) -> torch.Tensor:
    """uint8 (n, channels, height, width) in channels-last memory, as the decoder gives it."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2)


def smooth(n: int, height: int, width: int) -> torch.Tensor:
    """Pictures in 0..1 of slow waves, which two resamplings in a row hardly blur: float32 (n, 3, height, width)."""
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 3, width)
    waves = [torch.sin(y * (1 + i % 3) * 0.7 + c) * torch.cos(x * (1 + i % 2) * 0.6 + i) for i in range(n) for c in range(3)]
    return torch.stack(waves).view(n, 3, height, width) * 0.4 + 0.5


def denormalised(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * torch.tensor(STD).view(1, 3, 1, 1) + FILL


# Geometry


@pytest.mark.parametrize("size", [(16, 16), (20, 24), (40, 30)])
def test_sampled_boxes_are_resized_crops(size):
    pictures = noise(6).contiguous() / 255
    cuts = torch.tensor([[0, 0, 20, 24], [3, 4, 10, 12], [5, 0, 15, 20], [0, 7, 1, 1], [2, 2, 17, 3], [19, 23, 1, 1.0]])
    flipped = torch.tensor([False, True, False, True, False, True])
    upended = torch.tensor([False, False, True, True, False, True])
    found = A.sample_boxes(pictures, cuts, size, flipped, None, FILL, upended)
    for i, (top, left, height, width) in enumerate(cuts.int().tolist()):
        expected = TF.resized_crop(pictures[i], top, left, height, width, size, antialias=False)
        expected = TF.horizontal_flip(expected) if flipped[i] else expected
        expected = TF.vertical_flip(expected) if upended[i] else expected
        assert (found[i] - expected).abs().max() < 2e-5


def test_rotation_is_torchvisions_and_fills_with_the_mean():
    pictures = noise(4).contiguous() / 255
    whole = torch.tensor([[0.0, 0, 20, 24]]).expand(4, 4)
    angles = torch.tensor([15.0, -7.5, 90.0, 0.0])
    found = A.sample_boxes(pictures, whole, (20, 24), None, A.rotation(angles), FILL)
    for i, angle in enumerate(angles.tolist()):
        with_mask = torch.cat([pictures[i], torch.ones(1, 20, 24)])
        expected = TF.rotate(with_mask, angle, InterpolationMode.BILINEAR, fill=[0.0])
        # what reaches over the edge is blended with black there, and here with the mean colour
        expected = expected[:3] + (1 - expected[3]) * FILL[0]
        inside_or_out = TF.rotate(torch.ones(1, 20, 24), angle, InterpolationMode.BILINEAR, fill=[0.0])
        settled = ((inside_or_out < 1e-4) | (inside_or_out > 1 - 1e-4)).expand(3, -1, -1)
        assert settled.float().mean() > 0.8
        assert (found[i] - expected)[settled].abs().max() < 2e-4
    assert torch.allclose(found[3], pictures[3], atol=2e-5)


def test_rotation_reads_what_surrounds_the_box():
    pictures = torch.full((1, 3, 40, 40), 0.9)
    found = A.sample_boxes(pictures, torch.tensor([[12.0, 12, 16, 16]]), (16, 16), None, A.rotation(torch.tensor([45.0])), FILL)
    assert torch.allclose(found, torch.tensor(0.9), atol=1e-5)


def test_flips_copy_pixels_exactly():
    pictures, keys = noise(64), some_keys(64)
    found = Augment(CONFIGS["flip"], (20, 24), MEAN, STD)(pictures, keys)
    flipped = A.uniform(keys, A.FLIP) < 0.5
    assert 20 < flipped.sum() < 44
    expected = torch.stack([TF.horizontal_flip(p) if f else p for p, f in zip(pictures, flipped, strict=True)])
    assert torch.equal(found, normalize(expected, MEAN, STD))


def test_flips_top_to_bottom_copy_pixels_exactly_and_have_draws_of_their_own():
    pictures, keys = noise(256), some_keys(256)
    found = Augment(AugmentConfig(flip=0.5, flip_vertical=0.3), (20, 24), MEAN, STD)(pictures, keys)
    flipped, upended = A.uniform(keys, A.FLIP) < 0.5, A.uniform(keys, A.FLIP_VERTICAL) < 0.3
    assert 55 < upended.sum() < 100 and 20 < (flipped & upended).sum() < 55
    expected = [TF.horizontal_flip(p) if f else p for p, f in zip(pictures, flipped, strict=True)]
    expected = torch.stack([TF.vertical_flip(p) if u else p for p, u in zip(expected, upended, strict=True)])
    assert torch.equal(found, normalize(expected, MEAN, STD))


def test_alternating_flips_show_every_picture_and_its_mirror_image_within_two_epochs():
    pictures = noise(64)
    transform = Augment(AugmentConfig(flip=0.5, flip_alternates=True), (20, 24), MEAN, STD)
    keys = [torch.from_numpy(order.sample_keys(0, np.full(64, epoch), np.arange(64))) for epoch in (6, 7)]
    one, other = (transform(pictures, its) for its in keys)
    assert 20 < (keys[0] < 0).sum() < 44
    assert torch.equal(A.flip(one, keys[0] < 0), normalize(pictures, MEAN, STD))
    assert torch.equal(other, one.flip(3))


def test_padded_crops_copy_pixels_exactly():
    pictures = noise(8).contiguous() / 255
    top, left = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3]), torch.tensor([3, 6, 5, 4, 3, 2, 1, 3])
    found = A.shift_crop(pictures, top, left, 3, FILL)
    for i in range(8):
        centred = TF.pad(pictures[i] - FILL[0], [3])
        assert torch.equal(found[i], TF.crop(centred, int(top[i]), int(left[i]), 20, 24) + FILL[0])
    assert (found[7] - pictures[7]).abs().max() < 1e-6


def test_padded_crops_reach_every_place_evenly():
    top, left = Augment(CONFIGS["padded"], (20, 24), MEAN, STD).draw_shift(some_keys(7000))
    counts = torch.bincount(top * 7 + left, minlength=49)
    assert len(counts) == 49 and ((counts - 7000 / 49).abs() < 5 * (7000 / 49) ** 0.5).all()


def test_padding_has_the_mean_colour_which_is_zero_once_normalised():
    found = Augment(CONFIGS["padded"], (20, 24), MEAN, STD)(torch.full((64, 3, 20, 24), 255, dtype=torch.uint8), some_keys(64))
    assert ((found.abs() < 1e-6) | (found > 1)).all() and (found.abs() < 1e-6).any()


@pytest.mark.parametrize("degrees", [0, 1e-6])  # two ways: whole pixels copied, one sampling of all
def test_padding_counts_the_pixels_that_come_out_whatever_size_is_stored(degrees):
    transform = Augment(AugmentConfig(crop="padded", padding=3, rotate_degrees=degrees), (20, 24), (0.5,) * 3, (0.2,) * 3)
    keys = some_keys(8)
    top, left = transform.draw_shift(keys)
    bright = torch.full((8, 3, 40, 48), 255, dtype=torch.uint8)
    for stored in (bright, bright[:, :, :20, :24], bright[:, :, :10, :12]):
        shown = transform(stored, keys)[:, 0] / 2.5  # 1 in the picture, 0 in the padding; edges of enlarged pixels are soft
        torch.testing.assert_close(shown[:, :, 12].sum(1), 20.0 - (top - 3).abs(), rtol=0, atol=0.51)
        torch.testing.assert_close(shown[:, 10].sum(1), 24.0 - (left - 3).abs(), rtol=0, atol=0.51)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 24), (10, 12), (33, 30)])
def test_whole_pictures_are_resized_with_antialias_and_no_pixel_overshoots(size, interpolation):
    pictures, keys = noise(6), some_keys(6)
    expected = TF.resize(pictures / 255, list(size), InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    found = Augment(AugmentConfig(), size, MEAN, STD, interpolation=interpolation)(pictures, keys)
    assert (denormalised(found) - expected).abs().max() < 1e-5
    assert (denormalised(evaluation_pixels(pictures, size, MEAN, STD, interpolation)) - expected).abs().max() < 1e-5


def test_what_is_sampled_by_a_grid_is_reduced_as_is_asked_before():
    pictures, config = noise(6, 60, 72), AugmentConfig(rotate_degrees=1e-6)
    expected = TF.resize(pictures / 255, [20, 24], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    found = Augment(config, (20, 24), MEAN, STD, interpolation="bicubic")(pictures, some_keys(6))
    assert (denormalised(found) - expected)[:, :, 1:-1, 1:-1].abs().max() < 1e-4


@pytest.mark.parametrize("stored, size", [((48, 60), (40, 40)), ((48, 60), (64, 48)), ((96, 120), (40, 40))])
def test_one_sampling_equals_torchvisions_chain(stored, size):
    config = AugmentConfig(crop="random_resized", flip=0.5, rotate_degrees=15)
    pictures, keys = (smooth(16, *stored) * 255).to(torch.uint8), some_keys(16)
    transform = Augment(config, size, MEAN, STD)
    found = transform.transform_geometry(pictures, keys, [])
    cuts, flipped = transform.draw_boxes(keys, stored), A.uniform(keys, A.FLIP) < 0.5
    angles = A.uniform(keys, A.ROTATE) * 30 - 15
    assert 0 < flipped.sum() < 16
    for i in range(16):
        chain = TF.resized_crop(pictures[i] / 255, *cuts[i].int().tolist(), list(size), antialias=True)
        chain = TF.horizontal_flip(chain) if flipped[i] else chain
        # two pixels from the crop's edge on: there the chain has lost what lies beyond, one sampling still sees it
        inner = torch.nn.functional.pad(torch.ones(1, size[0] - 4, size[1] - 4), [2] * 4)
        chain = TF.rotate(torch.cat([chain, inner]), float(angles[i]), InterpolationMode.BILINEAR)
        inside = (chain[3] > 0.999).expand(3, -1, -1)
        assert inside.float().mean() > 0.6
        difference = (found[i] - chain[:3])[inside].abs()
        assert difference.mean() < 0.002 and difference.max() < 0.01


def test_strong_reduction_does_not_alias():
    stripes = torch.zeros(4, 3, 96, 96, dtype=torch.uint8)
    stripes[..., ::2] = 255  # finer than any output below can show: all must come out grey
    for config in (AugmentConfig(rotate_degrees=10), AugmentConfig(crop="random_resized"), AugmentConfig()):
        found = Augment(config, (24, 24), (0.5, 0.5, 0.5), (1, 1, 1))(stripes, some_keys(4))
        assert found[..., 4:-4, 4:-4].abs().max() < 0.1, config


# Colour and normalising


def test_jitter_is_applied_in_the_documented_order_with_the_drawn_strengths():
    pictures, keys = noise(5), some_keys(5)
    found = denormalised(Augment(dataclasses.replace(CONFIGS["colour"], erase=0), (20, 24), MEAN, STD)(pictures, keys))
    u = [[float(A.uniform(keys, draw)[i]) for draw in range(A.BRIGHTNESS, A.GRAYSCALE + 1)] for i in range(5)]
    for i, (brightness, contrast, saturation, hue, gray) in enumerate(u):
        expected = TF.adjust_brightness(pictures[i] / 255, 0.6 + 0.8 * brightness)
        expected = TF.adjust_contrast(expected, 0.6 + 0.8 * contrast)
        expected = TF.adjust_saturation(expected, 0.6 + 0.8 * saturation)
        expected = TF.adjust_hue(expected, -0.2 + 0.4 * hue)
        expected = TF.rgb_to_grayscale(expected, 3) if gray < 0.2 else expected
        assert (found[i] - expected).abs().max() < 1e-5


def test_normalising_is_torchvisions():
    pictures = noise(3)
    for found in (normalize(pictures, MEAN, STD), Augment(AugmentConfig(), (20, 24), MEAN, STD)(pictures, some_keys(3))):
        assert torch.equal(found, TF.normalize(pictures / 255, MEAN, STD))


# Erasing


def test_erasing_sets_the_drawn_box_to_the_mean():
    config = AugmentConfig(erase=0.5)
    pictures, keys = torch.full((400, 3, 40, 30), 255, dtype=torch.uint8), some_keys(400)
    transform = Augment(config, (40, 30), MEAN, STD)
    found, plain = transform(pictures, keys), normalize(pictures, MEAN, STD)
    cuts, erased = transform.draw_erasing(keys)
    assert 150 < erased.sum() < 250
    for i in range(400):
        top, left, height, width = cuts[i].int().tolist()
        expected = TF.erase(plain[i], top, left, height, width, torch.zeros(3, 1, 1)) if erased[i] else plain[i]
        assert torch.equal(found[i], expected)
    top, left, height, width = cuts[erased].unbind(1)
    assert (height < 40).all() and (width < 30).all() and (top + height <= 40).all() and (left + width <= 30).all()
    area, aspect = height * width / 1200, width / height
    assert area.min() > 0.01 and area.max() < 0.36 and area.max() > 0.28 and area.min() < 0.05
    assert aspect.min() > 0.24 and aspect.max() < 4


# The whole


@pytest.mark.parametrize("size", [(20, 24), (12, 16)])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_sample_is_augmented_alike_in_any_batch(name, size):
    transform = Augment(CONFIGS[name], size, MEAN, STD)
    pictures, keys = noise(8), some_keys(8)
    whole = transform(pictures, keys)
    parts = [transform(pictures[i : i + 4], keys[i : i + 4]) for i in (4, 0)]
    assert torch.equal(whole, torch.cat(parts[::-1]))
    assert torch.equal(whole[3], transform(pictures[[3, 3]], keys[[3, 3]])[1])
    assert whole.dtype == torch.float32 and whole.shape == (8, 3, *size)
    assert whole.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "plain"])
def test_samples_of_a_batch_and_epochs_differ(name):
    transform = Augment(CONFIGS[name], (20, 24), MEAN, STD)
    same = noise(1).expand(16, -1, -1, -1)
    found = transform(same, some_keys(16))
    assert len(found.flatten(1).unique(dim=0)) >= (2 if name in ("flip", "flip_vertical") else 8)
    next_epoch = torch.from_numpy(order.sample_keys(0, np.ones(16, np.int64), np.arange(16)))
    assert not torch.equal(found, transform(same, next_epoch))


def test_the_pictures_given_are_left_as_they_are():
    pictures = noise(4).contiguous()
    before = pictures.clone()
    for config in CONFIGS.values():
        Augment(config, (20, 24), MEAN, STD)(pictures, some_keys(4))
    assert torch.equal(pictures, before)


def test_grey_pictures_are_augmented_too():
    found = Augment(EVERYTHING, (16, 16), (0.5,), (0.25,))(noise(4, channels=1), some_keys(4))
    assert found.shape == (4, 1, 16, 16) and found.isfinite().all()


class _Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes float64 results and operations that read a value or a size back to the host."""

    def __init__(self):
        super().__init__()
        self.wide, self.reads = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in (out if isinstance(out, tuple) else (out,))):
            self.wide.append(str(function))
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")):
            self.reads.append(str(function))
        return out


@pytest.mark.parametrize("name", ["padded", "trivial", "rand", "everything"])
def test_no_float64_and_no_host_read_on_the_device(name, monkeypatch):
    monkeypatch.setattr(policies, "picks_pictures", lambda device: False)  # as on a GPU
    transform, pictures, keys = Augment(CONFIGS[name], (16, 16), MEAN, STD), noise(4), some_keys(4)
    config = AugmentConfig(mixup=0.2, cutmix=1.0)
    with _Operations() as seen:
        mixing.mix(transform(pictures, keys), torch.arange(4), keys, config, 4)
        evaluation_pixels(pictures, (16, 16), MEAN, STD)
    assert seen.wide == [] and seen.reads == []
    with _Operations() as seen:
        keys.double()[0].item()
    assert len(seen.wide) == 2 and len(seen.reads) == 1


@pytest.mark.parametrize("name, backend", [
    ("padded", "eager"), ("trivial", "eager"), ("rand", "eager"),
    # the real one generates C++ here, from the same graph as a GPU's kernels
    pytest.param("everything", "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")),
])  # fmt: skip
def test_it_compiles_into_one_graph(name, backend):
    transform, pictures, keys = Augment(CONFIGS[name], (16, 16), MEAN, STD), noise(64), some_keys(64)  # every operation
    config, labels = AugmentConfig(mixup=0.2, cutmix=1.0), torch.arange(64)

    def whole(pictures, keys):
        return mixing.mix(transform(pictures, keys), labels, keys, config, 64)

    compiled = torch.compile(whole, backend=backend, fullgraph=True, dynamic=False)
    for found, expected in zip(compiled(pictures, keys), whole(pictures, keys), strict=True):
        differs = (found - expected).abs() > (1e-6 if backend == "eager" else 5e-5)
        assert differs.float().mean() < 0.02  # between two levels a pixel may become either, which alters its table


def test_settings_out_of_range_are_all_named_at_once():
    config = AugmentConfig(
        flip=1.5, flip_vertical=-0.1, hue=0.7, scale=(0.5, 0.2), ratio=(0.0, 1.0), padding=-1, rotate_degrees=-3, mixup=-1
    )
    with pytest.raises(UserError) as caught:
        Augment(config, (8, 8), MEAN, STD)
    lines = str(caught.value).splitlines()
    assert len(lines) == 8 and lines[0] == "augment.flip is 1.5; expected a probability, 0 to 1."
    names = ("flip", "flip_vertical", "hue", "scale", "ratio", "padding", "rotate_degrees", "mixup")
    assert {line.split()[0] for line in lines} == {f"augment.{name}" for name in names}
    with pytest.raises(UserError, match="augment.flip is 0.3; expected 0.5 beside augment.flip_alternates"):
        Augment(AugmentConfig(flip=0.3, flip_alternates=True), (8, 8), MEAN, STD)
