"""Each operation of TrivialAugment and RandAugment is torchvision's at the same strength, and which ones are done follows from
the key alone."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import some_keys
from test_augment import FILL, MEAN, STD, smooth
from torchvision.transforms import InterpolationMode, autoaugment, v2

from dist_train import augment as A
from dist_train import mixing, policies
from dist_train.augment import Augment
from dist_train.config import AugmentConfig
from dist_train.errors import UserError

HEIGHT, WIDTH = SIZE = (20, 24)
MOVES = policies.OPERATIONS[policies.SHEAR_X : policies.ROTATE + 1]
TABLE = policies.amount_table("cpu")


def pictures_of_every_kind(n: int, channels: int = 3) -> torch.Tensor:
    """uint8 (n, channels, HEIGHT, WIDTH): noise, dark noise, few levels, one colour, by turns."""
    pixels = torch.randint(0, 256, (n, channels, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels[1::4] //= 3
    pixels[2::4] = pixels[2::4] // 80 * 70 + 20
    pixels[3::4] = pixels[3::4, :, :1, :1]
    return pixels


def strengths_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(operations, amounts): all strengths of one operation, with both signs, (62,) each."""
    amounts = TABLE[policies.OPERATIONS.index(name)].flatten()
    return torch.full((len(amounts),), policies.OPERATIONS.index(name)), amounts


def moved(picture: torch.Tensor, name: str, amount: float) -> torch.Tensor:
    """torchvision's geometry as its TrivialAugmentWide calls it, on a float picture; black comes in from outside."""
    bilinear, degrees = InterpolationMode.BILINEAR, math.degrees(math.atan(amount))
    if name == "Rotate":
        return TF.rotate(picture, amount, bilinear)
    if name.startswith("Shear"):
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        return TF.affine(picture, 0.0, [0, 0], 1.0, shear, bilinear, center=[0, 0])
    return TF.affine(picture, 0.0, [int(amount), 0] if name == "TranslateX" else [0, int(amount)], 1.0, [0.0, 0.0], bilinear)


# uint8 where torchvision's results are whole levels; else float, as it cuts off what is behind the point
REFERENCES = {
    "Identity": lambda pixels, amount: pixels / 255,
    "Color": lambda pixels, amount: TF.adjust_saturation(pixels / 255, 1 + amount),
    "Sharpness": lambda pixels, amount: TF.adjust_sharpness(pixels / 255, 1 + amount),
    "Brightness": lambda pixels, amount: TF.adjust_brightness(pixels / 255, 1 + amount),
    "Contrast": lambda pixels, amount: TF.adjust_contrast(pixels / 255, 1 + amount),
    "Posterize": lambda pixels, amount: TF.posterize(pixels, int(amount)) / 255,
    "Solarize": lambda pixels, amount: TF.solarize(pixels, amount) / 255,
    "AutoContrast": lambda pixels, amount: TF.autocontrast(pixels / 255),
    "Equalize": lambda pixels, amount: TF.equalize(pixels) / 255,
}


def test_operations_and_strengths_are_torchvisions():
    theirs = autoaugment.TrivialAugmentWide()._augmentation_space(policies.STRENGTHS)
    assert set(theirs) == set(policies.OPERATIONS) == set(REFERENCES) | set(MOVES) and len(policies.OPERATIONS) == 14
    for operation, name in enumerate(policies.OPERATIONS):
        amounts, signed = theirs[name]
        plus, minus = TABLE[operation].unbind(1)
        if name.startswith("Translate"):
            amounts = (amounts + 1e-5).trunc()  # as it does where it uses them; its 16 is 15.999999
        assert torch.allclose(plus, amounts.float().expand(policies.STRENGTHS), rtol=1e-6)
        assert torch.equal(minus, -plus if signed else plus)


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_torchvisions(name):
    operations, amounts = strengths_of(name)
    pictures = pictures_of_every_kind(len(operations)) / 255
    transform = Augment(AugmentConfig(trivial=True), SIZE, MEAN, STD)
    found = transform.move(pictures.clone(), operations, amounts)
    for i, amount in enumerate(amounts.tolist()):
        expected = moved(pictures[i] - FILL[0], name, amount) + FILL[0]
        assert (found[i] - expected).abs().max() < (1e-5 if name.startswith("Translate") else 2e-4)
    assert policies.is_moved(operations).all()
    assert torch.equal(policies.change_pixels(pictures.clone(), operations, amounts), pictures)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", REFERENCES)
def test_changes_of_pixels_are_torchvisions(name, channels):
    operations, amounts = strengths_of(name)
    pictures = pictures_of_every_kind(len(operations), channels)
    found = policies.change_pixels(pictures / 255, operations, amounts)
    for i, amount in enumerate(amounts.tolist()):
        assert (found[i] - REFERENCES[name](pictures[i], amount)).abs().max() < 1e-5
    still = torch.eye(2, 3).expand(len(operations), -1, -1)
    assert torch.equal(policies.motions(operations, amounts, SIZE), still) and not policies.is_moved(operations).any()


def test_operations_strengths_and_signs_are_drawn_evenly_and_independently():
    num_cells = len(policies.OPERATIONS) * policies.STRENGTHS * 2
    draws = torch.arange(num_cells).float().view(TABLE.shape)  # every cell of the table has a value of its own
    operations, cells = policies.draw_operations(some_keys(num_cells * 30), draws)
    assert torch.equal(operations, (cells / (policies.STRENGTHS * 2)).floor().long())
    counts = torch.bincount(cells.long(), minlength=num_cells).view(TABLE.shape).double()
    for axes in ((1, 2), (0, 2), (0, 1), ()):  # operations, strengths, signs, and all three together
        found = counts.sum(axes) if axes else counts.flatten()
        expected, freedom = counts.sum() / len(found), len(found) - 1
        chi2 = float(((found - expected) ** 2 / expected).sum())
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_draws_are_no_others_and_stay_where_they_are():
    # a number that moves changes the pixels of a run that goes on
    own = [policies.OPERATION, policies.STRENGTH, policies.SIGN]
    rand = range(policies.RAND, policies.RAND + 3 * policies.MAX_ROUNDS)
    assert own == [68, 69, 70] and A.FLIP_VERTICAL == 62 and rand == range(71, 95)
    assert [A.CROP, A.FLIP, A.ROTATE, A.BRIGHTNESS, A.CONTRAST, A.SATURATION, A.HUE, A.GRAYSCALE, A.ERASE, A.ERASE_BOX,
            mixing.CHOICE, mixing.SHARE, mixing.CENTRE_Y, mixing.CENTRE_X] == [0, *range(32, 41), *range(64, 68)]  # fmt: skip


def test_a_picture_is_changed_alike_alone_and_among_others():
    operations = torch.arange(14).repeat(4)
    amounts = TABLE[operations, torch.arange(56) % 31, torch.arange(56) % 2]
    pictures = pictures_of_every_kind(56) / 255
    transform = Augment(AugmentConfig(trivial=True), SIZE, MEAN, STD)

    def change(rows):
        images = transform.move(pictures[rows], operations[rows], amounts[rows])
        return policies.change_pixels(images, operations[rows], amounts[rows])

    together = change(torch.arange(56))
    assert sum(not torch.equal(together[i], pictures[i]) for i in range(56)) > 40
    for i in range(56):
        assert torch.equal(change(torch.tensor([i]))[0], together[i])


def test_pictures_picked_on_a_cpu_are_changed_as_all_are_on_a_gpu(monkeypatch):
    pictures, keys = pictures_of_every_kind(64), some_keys(64)
    for config in (
        AugmentConfig(trivial=True, crop="padded", flip=0.5), AugmentConfig(trivial=True, crop="random_resized"),
        AugmentConfig(rand_ops=3, crop="padded"),
    ):  # fmt: skip
        transform = Augment(config, SIZE, MEAN, STD)
        picked = transform(pictures, keys)
        with monkeypatch.context() as patch:
            patch.setattr(policies, "picks_pictures", lambda device: False)
            assert torch.equal(transform(pictures, keys), picked)


@pytest.mark.parametrize("crop", ["none", "padded", "random_resized"])
def test_pictures_that_are_not_changed_are_as_without(crop):
    pictures, keys = pictures_of_every_kind(256), some_keys(256)
    settings = {"crop": crop, "flip": 0.5, "flip_vertical": 0.5}
    plain = Augment(AugmentConfig(**settings), SIZE, MEAN, STD)(pictures, keys)
    found = Augment(AugmentConfig(**settings, trivial=True), SIZE, MEAN, STD)(pictures, keys)
    operations, _ = policies.draw_operations(keys, TABLE)
    same = operations == policies.IDENTITY
    assert 8 < same.sum() < 30
    if crop == "random_resized":  # all pass through one sampling, whose edges are handled in another way
        assert (found[same] - plain[same]).abs().max() < 2e-5
    else:
        assert torch.equal(found[same], plain[same])
    assert sum(not torch.allclose(a, b, atol=1e-3) for a, b in zip(found, plain, strict=True)) > 150


@pytest.mark.parametrize("degrees", [0, 15])
def test_moves_follow_crop_flips_and_rotation_in_one_sampling(degrees):
    config = AugmentConfig(crop="random_resized", flip=0.5, flip_vertical=0.5, rotate_degrees=degrees, trivial=True)
    stored, size = (48, 60), (40, 40)
    pictures, keys = (smooth(100, *stored) * 255).to(torch.uint8), some_keys(100)
    transform = Augment(config, size, MEAN, STD)
    operations, amounts = policies.draw_operations(keys, TABLE)
    found = transform.transform_geometry(pictures, keys, [(operations, amounts)])
    boxes = transform.draw_boxes(keys, stored)
    flipped, upended = A.uniform(keys, A.FLIP) < 0.5, A.uniform(keys, A.FLIP_VERTICAL) < 0.5
    compared = set()
    for i in range(100):
        chain = TF.resized_crop(pictures[i] / 255, *boxes[i].int().tolist(), list(size), antialias=True)
        chain = TF.horizontal_flip(chain) if flipped[i] else chain
        chain = TF.vertical_flip(chain) if upended[i] else chain
        # two pixels from the crop's edge on: there the chain has lost what lies beyond, one sampling still sees it
        chain = torch.cat([chain, torch.nn.functional.pad(torch.ones(1, size[0] - 4, size[1] - 4), [2] * 4)])
        if degrees:
            angle = float(A.uniform(keys, A.ROTATE)[i]) * 2 * degrees - degrees
            chain = TF.rotate(chain, angle, InterpolationMode.BILINEAR)
        name = policies.OPERATIONS[operations[i]]
        chain = moved(chain, name, float(amounts[i])) if name in MOVES else chain
        inside = (chain[3] > 0.999).expand(3, -1, -1)
        if inside.float().mean() > 0.1:
            compared.add((name in MOVES and name, bool(flipped[i]), bool(upended[i])))
            difference = (found[i] - chain[:3])[inside].abs()
            assert difference.mean() < 0.004 and difference.max() < 0.02
    assert len(compared) > 18 and {name for name, _, _ in compared} == {False, *MOVES}


def test_the_settings_from_brightness_on_come_after_it():
    pictures, keys = pictures_of_every_kind(42), some_keys(42)
    config = AugmentConfig(trivial=True, brightness=0.4, grayscale=0.3)
    transform = Augment(config, SIZE, MEAN, STD)
    first = policies.draw_operations(keys, TABLE)
    images = policies.change_pixels(transform.transform_geometry(pictures, keys, [first]), *first)
    images = transform.jitter(images, keys).sub(FILL).div(torch.tensor(STD).view(1, 3, 1, 1))
    assert torch.equal(transform(pictures, keys), images)


# RandAugment


@pytest.mark.parametrize("size", [SIZE, (224, 224), (331, 662), (97, 41)])
def test_rand_augments_operations_and_strengths_are_torchvisions(size):
    theirs = v2.RandAugment._AUGMENTATION_SPACE
    assert set(theirs) == set(policies.OPERATIONS)
    for magnitude in range(policies.STRENGTHS):
        table = policies.rand_table(magnitude, size, "cpu")
        assert table.shape == (14, 1, 2)
        for operation, name in enumerate(policies.OPERATIONS):
            amounts, signed = theirs[name][0](policies.STRENGTHS, *size), theirs[name][1]
            expected = 0.0 if amounts is None else float(amounts[magnitude])
            expected = int(expected) if name.startswith("Translate") else 255 * expected if name == "Solarize" else expected
            plus, minus = table[operation, 0].tolist()
            assert plus == pytest.approx(expected, rel=1e-6, abs=1e-4 if name == "Solarize" else 1e-9)
            assert minus == (-plus if signed else plus)


@pytest.mark.parametrize("rounds, magnitude", [(1, 9), (2, 9), (3, 20)])
def test_rand_augment_does_torchvisions_functions_one_after_the_other(rounds, magnitude):
    config = AugmentConfig(rand_ops=rounds, rand_magnitude=magnitude)
    transform = Augment(config, SIZE, MEAN, STD)
    pixels, keys = pictures_of_every_kind(140), some_keys(140)
    found = transform(pixels, keys) * torch.tensor(STD).view(1, 3, 1, 1) + FILL
    table, theirs, seen = policies.rand_table(magnitude, SIZE, "cpu"), v2.RandAugment(), set()
    drawn = [policies.draw_operations(keys, table, policies.RAND + 3 * i) for i in range(rounds)]
    for i in range(140):
        picture, names = pixels[i] / 255, []
        for operations, amounts in drawn:
            name, amount = policies.OPERATIONS[operations[i]], float(amounts[i])
            names.append(name)
            if name in MOVES:  # black comes in from outside, which is the mean colour here
                picture = theirs._apply_image_or_video_transform(picture - FILL[0], name, amount, "bilinear", {}) + FILL[0]
            elif name in ("Identity", "Color", "Sharpness"):
                picture = theirs._apply_image_or_video_transform(picture, name, amount, "bilinear", {})
            else:
                picture = REFERENCES[name]((picture * 255).round().to(torch.uint8), amount)
        seen.update(names)
        difference = (found[i] - picture).abs()  # after a round a pixel between two levels may become either
        assert difference.mean() < 1 / 255 and (rounds > 1 or difference.max() < 3e-4), names
    assert len(seen) == 14


def test_rand_augments_rounds_are_drawn_evenly_and_independently():
    cells = torch.arange(28).float().view(14, 1, 2)  # every operation and sign has a value of its own
    keys = some_keys(28 * 28 * 30)
    drawn = [policies.draw_operations(keys, cells, policies.RAND + 3 * i)[1].long() for i in range(policies.MAX_ROUNDS)]
    for i, one in enumerate(drawn):
        other = drawn[(i + 1) % len(drawn)]
        expected, freedom = len(keys) / 28**2, 28**2 - 1
        chi2 = float(((torch.bincount(one * 28 + other, minlength=28**2) - expected) ** 2 / expected).sum())
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_the_first_moves_of_rand_augment_ride_in_the_crops_sampling():
    pictures, keys = pictures_of_every_kind(64), some_keys(64)
    transform = Augment(AugmentConfig(crop="random_resized", rand_ops=2), (16, 16), MEAN, STD)
    first, second = transform.draw_rounds(keys)
    images = policies.change_pixels(transform.transform_geometry(pictures, keys, [first]), *first)
    images = policies.change_pixels(transform.move(images, *second), *second)
    assert torch.equal(transform(pictures, keys), images.sub(FILL).div(torch.tensor(STD).view(1, 3, 1, 1)))


@pytest.mark.parametrize("config, rounds", [
    (AugmentConfig(trivial=True, crop="padded"), 1), (AugmentConfig(trivial=True, crop="random_resized"), 1),
    (AugmentConfig(rand_ops=2), 2), (AugmentConfig(crop="padded"), 0),
])  # fmt: skip
def test_operations_are_drawn_once_a_batch(config, rounds, monkeypatch):
    draw, drawn = policies.draw_operations, []
    monkeypatch.setattr(policies, "draw_operations", lambda *args: drawn.append(args) or draw(*args))
    Augment(config, SIZE, MEAN, STD)(pictures_of_every_kind(4), some_keys(4))
    assert len(drawn) == rounds


def test_one_policy_is_taken_and_its_settings_have_ranges():
    with pytest.raises(UserError, match="augment.rand_ops is 2; expected 0 beside augment.trivial: RandAugment or TrivialAugment"):
        Augment(AugmentConfig(trivial=True, rand_ops=2), SIZE, MEAN, STD)
    with pytest.raises(UserError) as caught:
        Augment(AugmentConfig(rand_ops=9, rand_magnitude=31), SIZE, MEAN, STD)
    assert str(caught.value).splitlines() == [
        "augment.rand_ops is 9; expected 0 (off) to 8 operations.", "augment.rand_magnitude is 31; expected 0 to 30.",
    ]  # fmt: skip
