"""Mixup and cutmix are their definitions, pair by pair, whatever the batch is cut into."""

import numpy as np
import pytest
import torch

from dist_train import draws, mixing, order
from dist_train.config import AugmentConfig


def pairs(n: int = 400, height: int = 16, width: int = 12):
    """Pictures of noise in channels-last memory, labels 0 to 4, keys."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(n, height, width, 3, generator=generator).permute(0, 3, 1, 2)
    keys = order.sample_keys(0, np.zeros(n, np.int64), np.arange(n))
    return pictures, torch.arange(n) % 5, torch.from_numpy(keys)


def test_mixup_is_its_definition_with_the_partners_rest():
    pictures, labels, keys = pairs()
    mixed, targets = mixing.mix(pictures, labels, keys, AugmentConfig(mixup=0.4), 5)
    onehot = torch.nn.functional.one_hot(labels, 5).float()
    shares = draws.betas(keys[0::2], mixing.SHARE, (0.4,))[0]
    for i, share in enumerate(shares.tolist()):
        for one, other in ((2 * i, 2 * i + 1), (2 * i + 1, 2 * i)):
            assert torch.allclose(mixed[one], pictures[one] * share + pictures[other] * (1 - share), atol=1e-5)
            assert torch.allclose(targets[one], onehot[one] * share + onehot[other] * (1 - share), atol=1e-6)
    assert 0.3 < shares.mean() < 0.7 and shares.std() > 0.3


def test_cutmix_exchanges_a_box_and_weighs_the_labels_by_area():
    pictures, labels, keys = pairs()
    mixed, targets = mixing.mix(pictures, labels, keys, AugmentConfig(cutmix=1.0), 5)
    u_share, u_y, u_x = (draws.uniform(keys[0::2], d).tolist() for d in (mixing.SHARE, mixing.CENTRE_Y, mixing.CENTRE_X))
    for i in range(200):
        half = 0.5 * (1 - u_share[i]) ** 0.5  # Beta(1, 1) is uniform
        y, x, half_y, half_x = int(u_y[i] * 16), int(u_x[i] * 12), int(half * 16), int(half * 12)
        rows, columns = slice(max(y - half_y, 0), min(y + half_y, 16)), slice(max(x - half_x, 0), min(x + half_x, 12))
        area = (rows.stop - rows.start) * (columns.stop - columns.start) / (16 * 12)
        for one, other in ((2 * i, 2 * i + 1), (2 * i + 1, 2 * i)):
            expected = pictures[one].clone()
            expected[:, rows, columns] = pictures[other][:, rows, columns]
            assert torch.equal(mixed[one], expected)
            assert abs(float(targets[one, labels[one]]) - (1 - area)) < 1e-6
            assert abs(float(targets[one, labels[other]]) - area) < 1e-6


def test_with_both_on_each_pair_does_one_of_them():
    pictures, labels, keys = pairs()
    both, targets = mixing.mix(pictures, labels, keys, AugmentConfig(mixup=0.4, cutmix=1.0), 5)
    blended, _ = mixing.mix(pictures, labels, keys, AugmentConfig(mixup=0.4), 5)
    cut, _ = mixing.mix(pictures, labels, keys, AugmentConfig(cutmix=1.0), 5)
    is_blended = (both == blended).flatten(1).all(1)
    assert (is_blended | (both == cut).flatten(1).all(1)).all()
    assert torch.equal(is_blended[0::2], is_blended[1::2]) and 140 < is_blended.sum() < 260
    assert torch.allclose(targets.sum(1), torch.ones(400)) and targets.dtype == torch.float32


def test_mixing_is_the_same_in_any_even_share_of_the_batch():
    pictures, labels, keys = pairs(16)
    config = AugmentConfig(mixup=0.4, cutmix=1.0)
    whole = mixing.mix(pictures, labels, keys, config, 5)
    parts = [mixing.mix(pictures[i : i + 4], labels[i : i + 4], keys[i : i + 4], config, 5) for i in range(0, 16, 4)]
    assert all(torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts, strict=True), whole, strict=True))


def test_mixing_an_odd_batch_is_refused():
    pictures, labels, keys = pairs(3)
    with pytest.raises(ValueError, match="3 samples"):
        mixing.mix(pictures, labels, keys, AugmentConfig(mixup=0.2), 5)
