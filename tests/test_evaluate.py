"""What an evaluation sees of a picture."""

from types import SimpleNamespace

import pytest
import torch

from dist_train.config import RunConfig, TrainConfig
from dist_train.evaluate import predict_logits, views

PICTURES = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) + 1  # no zero, which is what shifts uncover


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_views_are_shifts_and_mirror_images_and_count_as_one(flipped, shift):
    seen = list(views(PICTURES, flipped, shift))
    assert len(seen) == (1 + 2 * bool(shift)) * (1 + flipped)
    assert sum(weight for weight, _ in seen) == 1.0
    still = [weight for weight, view in seen if torch.equal(view, PICTURES)]
    assert still == [(0.5 if shift else 1.0) / (1 + flipped)]
    if flipped:  # every view has its mirror image, at the same weight
        for weight, view in seen:
            assert any(torch.equal(view.flip(3), other) and weight == its for its, other in seen)


def test_a_shift_uncovers_the_mean_colour():
    _, (_, up_left), (_, down_right) = views(PICTURES, False, 2)
    assert torch.equal(up_left[:, :, :-2, :-2], PICTURES[:, :, 2:, 2:])
    assert torch.equal(down_right[:, :, 2:, 2:], PICTURES[:, :, :-2, :-2])
    assert not up_left[:, :, -2:].any() and not up_left[:, :, :, -2:].any()
    assert not down_right[:, :, :2].any() and not down_right[:, :, :, :2].any()


def test_logits_are_the_weighted_mean_over_the_views():
    index = SimpleNamespace(features=None, image_size=(8, 8), mean=[0.5] * 3, std=[0.25] * 3)
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    corner = lambda pictures: pictures[:, :, 0, 0]  # noqa: E731 - a network whose answer is the upper left pixel
    pictures = (torch.arange(3 * 8 * 8) % 256).to(torch.uint8).view(1, 3, 8, 8)
    config = RunConfig(train=TrainConfig(flip_test=True, shift_test=2))
    normal = (pictures.float() / 255 - 0.5) / 0.25
    expected = (normal[:, :, 0, 0] + normal[:, :, 0, 7]) / 4 + normal[:, :, 2, 2] / 8  # elsewhere the mean colour, 0
    torch.testing.assert_close(predict_logits(config, index, corner, pictures, accelerator), expected)
