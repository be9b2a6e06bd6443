"""Colour operations are torchvision's on the same strengths."""

import pytest
import torch
import torchvision.transforms.v2.functional as TF

from dist_train import colour


def noise(n: int, channels: int = 3) -> torch.Tensor:
    """Pictures in 0..1: (n, channels, 20, 24) float32."""
    return torch.rand(n, channels, 20, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "ours, reference, values",
    [
        (colour.adjust_brightness, TF.adjust_brightness, [0.0, 0.5, 1.0, 1.7]),
        (colour.adjust_contrast, TF.adjust_contrast, [0.0, 0.5, 1.0, 1.7]),
        (colour.adjust_saturation, TF.adjust_saturation, [0.0, 0.5, 1.0, 1.7]),
        (colour.adjust_sharpness, TF.adjust_sharpness, [0.0, 0.5, 1.0, 1.7]),
        (colour.adjust_hue, TF.adjust_hue, [-0.5, -0.13, 0.0, 0.4]),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_colour_adjustments_are_torchvisions(ours, reference, values, channels):
    pictures = noise(4, channels)
    pictures[:, :, :4] = pictures[:, :1, :4]  # grey pixels, whose hue is undefined
    pictures[:, :, 4] = torch.tensor([0.0, 1.0]).repeat(12)  # black and white
    found = ours(pictures, torch.tensor(values))
    expected = torch.stack([reference(p, v) for p, v in zip(pictures, values, strict=True)])
    assert (found - expected).abs().max() < 1e-5


def test_greyscale_is_torchvisions():
    pictures = noise(3)
    found = colour.drop_colour(pictures, torch.tensor([True, False, True]))
    assert torch.allclose(found[[0, 2]], TF.rgb_to_grayscale(pictures[[0, 2]], 3), atol=1e-6)
    assert torch.equal(found[1], pictures[1])


def test_pictures_too_small_to_smooth_keep_their_sharpness():
    pictures = torch.rand(2, 3, 2, 9)
    assert torch.equal(colour.adjust_sharpness(pictures, torch.tensor([0.0, 2.0])), pictures)
    assert torch.equal(TF.adjust_sharpness(pictures[0], 0.0), pictures[0])
