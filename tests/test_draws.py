"""Draws follow from the key alone, have the distribution they claim, and are never used twice."""

import numpy as np
import pytest
import torch
from conftest import some_keys
from scipy.special import betaincinv

from dist_train import augment as A
from dist_train import boxes, draws, mixing, order, policies


def test_device_and_loader_draw_the_same_bits():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 5000)
    for draw in (0, 1, 39, 1000):
        assert np.array_equal(A.uniform(torch.from_numpy(keys), draw).numpy(), order.uniform(keys, draw))
    together = draws.uniforms(torch.from_numpy(keys), 7, 5)
    assert all(torch.equal(together[:, i], A.uniform(torch.from_numpy(keys), 7 + i)) for i in range(5))


def test_draws_are_even_and_independent():
    values = draws.uniforms(some_keys(20_000), 0, 48).double()
    assert values.min() >= 0 and values.max() < 1
    histogram = torch.stack([torch.histc(column, 16, 0, 1) for column in values.unbind(1)])
    chi2 = ((histogram - 1250) ** 2 / 1250).sum(1)  # 15 degrees of freedom: mean 15, 99.99% below 44
    assert chi2.max() < 44 and 12 < chi2.mean() < 18
    correlation = torch.corrcoef(values.T) - torch.eye(48)
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_no_two_uses_share_a_draw():
    assert A.CROP == 0  # where the decoder's box draws
    constants = {name: value for name, value in vars(A).items() if name.isupper() and isinstance(value, int)}
    assert {"FLIP", "HUE", "ERASE", "FLIP_VERTICAL"} <= constants.keys()
    used = [value for name, value in constants.items() if name not in ("CROP", "ERASE_BOX")]
    used += range(boxes.CROP_DRAWS)
    used += range(A.ERASE_BOX, A.ERASE_BOX + boxes.CROP_DRAWS)
    used += [mixing.CHOICE, mixing.SHARE, mixing.CENTRE_Y, mixing.CENTRE_X]
    used += [policies.OPERATION, policies.STRENGTH, policies.SIGN]
    used += range(policies.RAND, policies.RAND + 3 * policies.MAX_ROUNDS)
    assert len(used) == len(set(used))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 1.0, 3.0, 10.0])
def test_beta_draws_are_the_quantiles_of_the_draw(alpha):
    keys = some_keys(2000)
    expected = betaincinv(alpha, alpha, A.uniform(keys, 5).double().numpy())
    assert np.abs(draws.betas(keys, 5, (alpha,))[0].numpy() - expected).max() < 1e-5
