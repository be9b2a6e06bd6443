"""The box of a crop is torchvision's, and the decoder and the device take the same one."""

import numpy as np
import pytest
import torch
from conftest import some_keys
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from dist_train import augment, boxes, order
from dist_train.config import AugmentConfig


def torchvision_box(height, width, scale, ratio, key):
    """RandomResizedCrop's rule written as it is published, with our draws and our steps of area and ratio."""
    u = [order.uniform(np.array([key]), draw)[0] for draw in range(boxes.CROP_DRAWS)]
    steps = [(np.floor(value * boxes.TABLE) + 0.5) / boxes.TABLE for value in u[:20]]
    for i in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * steps[2 * i])
        aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * steps[2 * i + 1])
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        h, w = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        h, w = height, round(height * ratio[1])
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def test_random_boxes_follow_torchvisions_rule_on_pictures_of_all_shapes():
    rng = np.random.default_rng(3)
    heights, widths = rng.integers(1, 600, 600), rng.integers(1, 600, 600)
    heights[:60], widths[60:120] = 12, 12  # panoramas, where often no try fits
    keys = some_keys(600).numpy()
    for scale, ratio in (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.35, 1.0), (1.0, 1.0))):
        found = boxes.random_resized_boxes(keys, heights, widths, scale, ratio)
        expected = [torchvision_box(*row, scale, ratio, key) for *row, key in zip(heights, widths, keys, strict=True)]
        assert found.dtype == np.float64
        assert (found == expected).all(1).mean() > 0.998  # a side that is a half to the seventh digit may round the other way
        assert np.abs(found - expected).max() <= 1
        top, left, height, width = found.T
        assert (found[:, 2:] >= 1).all() and (found >= 0).all()
        assert (top + height <= heights).all() and (left + width <= widths).all()


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (37, 91), (30, 300), (1, 7), (500, 375)])
def test_device_and_loader_draw_the_same_box(size):
    keys = some_keys(3000)
    for scale, ratio in (((0.35, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.5, 2.0))):
        config = AugmentConfig(crop="random_resized", scale=scale, ratio=ratio)
        found = augment.Augment(config, (8, 8), (0.5,) * 3, (0.2,) * 3).draw_boxes(keys, size)
        heights, widths = (np.full(len(keys), side) for side in size)
        assert np.array_equal(found.numpy(), boxes.random_resized_boxes(keys.numpy(), heights, widths, scale, ratio))


@pytest.mark.parametrize("height, width", [(300, 400), (500, 375), (256, 256), (61, 90), (640, 333)])
@pytest.mark.parametrize("size", [64, 224])
def test_central_box_is_torchvisions_resize_and_centre_crop(height, width, size):
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 3, width)
    picture = (torch.sin(y) * torch.cos(x) * 100 + 128).expand(1, 3, -1, -1)
    expected = Compose([Resize(round(size / 0.875), antialias=False), CenterCrop(size)])(picture)
    box = torch.from_numpy(boxes.central_boxes(np.array([height]), np.array([width]), (size, size), 0.875))
    found = augment.sample_boxes(picture, box.float(), (size, size), None, None, torch.zeros(1, 3, 1, 1))
    edge = 1 + size // min(height, width)  # there torchvision sees beyond the box, for it cuts after resizing
    assert (found - expected)[..., edge:-edge, edge:-edge].abs().max() < 0.02  # of 255


def test_central_box_of_the_whole_side_keeps_the_whole_side():
    assert boxes.central_boxes(np.array([50, 80]), np.array([70, 80]), (32, 32), 1.0)[:, 2].tolist() == [50, 80]
