"""The preview shows what enters the network, bit for bit; and pictures of sets and networks are what they say."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dist_train import preview, runtime
from dist_train.cli import main
from dist_train.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from dist_train.convert import convert
from dist_train.errors import UserError
from dist_train.folds import open_index
from dist_train.index import load_index
from dist_train.order import Order
from dist_train.picture_plots import (
    cell,
    draw_gallery,
    draw_histogram,
    filter_gallery,
    first_filters,
    pixel_counts,
    sample_gallery,
    some_of_each_class,
    thumbnails,
)  # fmt: skip
from dist_train.run import Run
from dist_train.shard_config import ShardConfig


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """36 JPEGs of three classes and many sizes, as shards."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (folder / "raw" / name).mkdir(parents=True)
        for i in range(12):
            height, width = rng.integers(40, 90, size=2)
            smooth = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize((int(width), int(height)))
            smooth.save(folder / "raw" / name / f"{i}.jpg")
    convert(ShardConfig(source="folder", path=str(folder / "raw"), out=str(folder / "set"), workers=1, min_shards=2))
    return str(folder / "set")


@pytest.fixture(scope="module")
def machine():
    yield runtime.start("fp32", 1, 60)
    runtime.end()


def settings(shards: str, **augment) -> RunConfig:
    crop = augment.pop("folds", 0)
    data = DataConfig(shards=shards, image_size=32, global_batch_size=10, threads=1, folds=crop)
    return RunConfig(seed=3, data=data, augment=AugmentConfig(**augment), model=ModelConfig(width=0.0625),
                     train=TrainConfig(epochs=3))  # fmt: skip


AUGMENTATIONS = {
    "boxes cut by the decoder, mixed": {"crop": "random_resized", "flip": 0.5, "mixup": 0.4, "cutmix": 1.0},
    "turned and erased": {"rotate_degrees": 20, "erase": 0.5, "hue": 0.1},
    "mirrored every other epoch": {"flip": 0.5, "flip_alternates": True},
    "one operation each": {"crop": "random_resized", "flip_vertical": 0.5, "trivial": True},
    "a fold": {"crop": "random_resized", "cutmix": 1.0, "folds": 3},
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_preview_is_what_training_puts_into_the_network(mixed, machine, tmp_path, name):
    config = settings(mixed, **AUGMENTATIONS[name])
    run = Run(config, tmp_path, *machine)
    trained = {}
    for batch in run.stream(0):
        inputs, targets = run.prepare(batch.images, batch.labels, batch.random_keys)
        rows = zip(batch.samples.tolist(), batch.epochs.tolist(), inputs, targets, strict=True)
        trained |= {(sample, epoch): (pixels, target) for sample, epoch, pixels, target in rows}
    run.close()
    index = open_index(config)
    split = index.split("train")
    some = np.array([0, 5, split.num_samples - 1])
    for epoch in (0, 2):
        seen = preview.network_inputs(config, index, some, epoch)
        for sample, (pixels, target) in zip(split.stored_numbers(some).tolist(), seen, strict=True):
            expected, its_target = trained[sample, epoch]
            assert torch.equal(pixels, expected)
            assert torch.equal(target.argmax(), its_target if its_target.ndim == 0 else its_target.argmax())
            if its_target.ndim:
                assert torch.equal(target, its_target)


def test_steps_are_those_at_which_the_samples_come():
    order = Order(np.array([7, 9, 4]), 6, seed=1)
    samples = np.array([19, 0, 8])
    for epoch in (0, 1, 5):
        for sample, step in zip(samples, preview.steps_of(order, samples, epoch), strict=True):
            batch_samples, epochs = order.global_batch(int(step))
            assert ((batch_samples == sample) & (epochs == epoch)).sum() == 1


def test_the_gallery_begins_with_the_stored_picture_and_names_what_is_mixed(mixed):
    config = settings(mixed, mixup=1.0)
    gallery = preview.preview_gallery(config, open_index(config), per_class=2, num_epochs=3)
    assert gallery.columns == ["as stored", "epoch 0", "epoch 1", "epoch 2"]
    assert [name for name, _, _ in gallery.rows] == ["ant", "ant", "bee", "bee", "cow", "cow"]
    assert all(len(cells) == 4 for _, _, cells in gallery.rows)
    notes = [shown.note for _, _, cells in gallery.rows for shown in cells[1:]]
    assert any(" + " in note for note in notes) and "mixup 1" in gallery.note
    seen = {shown.uri for _, _, cells in gallery.rows for shown in cells}
    assert len(seen) == 24  # every epoch draws anew


def test_the_gallery_says_what_is_done(mixed):
    config = settings(mixed, trivial=True, flip_vertical=0.25)
    index = open_index(config)
    note = preview.preview_gallery(config, index, num_epochs=1).note
    assert note.endswith("one operation of TrivialAugment, mirrored top to bottom (flip_vertical 0.25).")
    assert preview.is_augmented(config, index)


def test_unchanged_pictures_come_back_unchanged(digits):
    config = RunConfig(data=DataConfig(shards=digits, global_batch_size=15))
    index = open_index(config)
    gallery = preview.preview_gallery(config, index, num_epochs=2)
    assert gallery.note == "Nothing is changed." and not preview.is_augmented(config, index)
    for _, _, cells in gallery.rows:
        assert cells[0].uri == cells[1].uri == cells[2].uri


def test_the_command_writes_pictures_and_pages(digits, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(f"data: {{shards: {digits}, global_batch_size: 64}}\naugment: {{flip: 0.5}}\n")
    for out in ("a.png", "a.html"):
        argv = ["augment-preview", str(tmp_path / "r.yaml"), "--out", str(tmp_path / out), "--per-class", "2", "--epochs", "3"]
        assert main([*argv, "--augment.crop", "padded"]) == 0
        assert f"epochs 0 to 2: {tmp_path / out}" in capsys.readouterr().out
    assert main(["augment-preview", "--data.shards", digits, "--augment.flip", "0.5", "--out", str(tmp_path / "b.png")]) == 0
    page = (tmp_path / "a.html").read_text()
    assert page.count("<img") == 20 * 4 and "shifted by up to 4 pixels" in page
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (180 + 4 * 132, 22 + 20 * 132)


def test_what_cannot_be_previewed_is_refused(digits, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("x,y,kind\n" + "".join(f"{i % 7},{i * i},{'ab'[i % 2]}\n" for i in range(40)))
    convert(ShardConfig(source="csv", path=str(tmp_path / "t.csv"), target="kind", out=str(tmp_path / "set"), workers=1))
    (tmp_path / "r.yaml").write_text(f"data: {{shards: {tmp_path / 'set'}}}\nmodel: {{name: mlp}}\n")
    assert main(["augment-preview", str(tmp_path / "r.yaml")]) == 2
    assert "a table; augmentation is for pictures" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(f"data: {{shards: {digits}}}\n")
    assert main(["augment-preview", str(tmp_path / "r.yaml"), "--epochs", "0", "--out", "a.gif"]) == 2
    complaint = capsys.readouterr().err
    assert "--epochs is 0" in complaint and "a.gif" in complaint
    for fault in (["--augment.flipp", "1"], ["--data.train_split", "none"],
                  ["--augment.mixup", "1", "--data.global_batch_size", "9"]):  # fmt: skip
        assert main(["augment-preview", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "a.png"), *fault]) == 2
        assert capsys.readouterr().err


def test_galleries_show_the_stored_pixels_of_each_class(digits):
    index = load_index(digits)
    split = index.split("val")
    gallery = sample_gallery(index, split, num_classes=4, per_class=3)
    assert [name for name, _, _ in gallery.rows] == ["0", "1", "2", "3"] and "first 4 of 10" in gallery.note
    chosen = some_of_each_class(split, 4, 3)
    for (_, count, cells), members, label in zip(gallery.rows, chosen, range(4), strict=True):
        assert (split.table()["label"][members] == label).all() and count == str(split.class_counts[label])
        for shown, pixels in zip(cells, thumbnails(split, members), strict=True):
            with Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2]))) as image:
                np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)
    assert draw_gallery(gallery).size == (180 + 3 * 100, 4 * 100)
    with pytest.raises(UserError, match="dist-train verify"):
        broken = replace(split, files=["gone.tar"] * split.num_shards)
        sample_gallery(index, broken)


def test_pixel_counts_equal_numpys_histogram():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (5, 7, 3), np.uint8), rng.integers(0, 9, (3, 3, 3), np.uint8)]
    counts = pixel_counts(iter(pictures))
    for channel in range(3):
        values = np.concatenate([pixels[..., channel].ravel() for pixels in pictures])
        np.testing.assert_array_equal(counts[channel], np.histogram(values, np.arange(257))[0])
    assert "nan" not in draw_histogram(counts) + draw_histogram(np.eye(1, 256, dtype=int))  # all pixels black


def test_filters_are_the_first_layers_strongest_first(tmp_path):
    kernels = torch.randn(5, 3, 3, 3)
    kernels[2] *= 10
    weights = {"features.10.weight": torch.randn(4, 3, 3, 3), "features.2.weight": kernels, "a.weight": torch.randn(7, 5)}
    save_file(weights, tmp_path / "w.safetensors")
    found = first_filters(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(found, kernels.permute(0, 2, 3, 1).numpy())
    gallery = filter_gallery(found)
    expected = np.rint(127.5 + 127.5 * found[2] / np.abs(found[2]).max()).astype(np.uint8)
    assert gallery.rows[0][2][0] == cell(expected) and len(gallery.rows[0][2]) == 5
    save_file({"a.weight": torch.randn(4, 1, 5, 5)}, tmp_path / "grey.safetensors")
    assert filter_gallery(first_filters(tmp_path / "grey.safetensors")).rows[0][2][0].uri.startswith("data:image/png")
    save_file({"a.weight": torch.randn(4, 8)}, tmp_path / "none.safetensors")
    assert first_filters(tmp_path / "none.safetensors") is None
    (tmp_path / "w.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"w\.safetensors: the weights cannot be read"):
        first_filters(tmp_path / "w.safetensors")
