"""What settings promise reaches the loop, which is the plain one; and the best and patience outlive a stop."""

import contextlib
import copy
import json
import math
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lines_of, sharded, tiny_run, train_tiny
from safetensors.torch import load_file

from dist_train import initial_network, plan, runtime
from dist_train.augment import Augment, evaluation_pixels
from dist_train.data import open_evaluation, open_stream
from dist_train.errors import UserError
from dist_train.evaluate import predict_logits
from dist_train.index import load_index
from dist_train.initial_network import build_network
from dist_train.layers import set_dropout_keys
from dist_train.order import Order
from dist_train.predict import eval_main, load_run
from dist_train.predict import main as predict_main
from dist_train.run import Run
from dist_train.store import Store
from dist_train.train import parse, run_training

FOUR_EVALUATIONS = ("--train.epochs", "0.4", "--train.eval_every_epochs", "0.1")  # after steps 2, 3, 5 and 6, the last


def judged_by(monkeypatch, *figures: dict) -> None:
    """Let the next evaluations of a run come out with these figures; those after them are as they are."""
    evaluate, left = Run.evaluate, list(figures)

    def evaluate_as_told(self, *args, **options):
        evaluation = evaluate(self, *args, **options)
        return replace(evaluation, result=replace(evaluation.result, **left.pop(0))) if left else evaluation

    monkeypatch.setattr(Run, "evaluate", evaluate_as_told)


def test_a_run_is_the_plain_loop_that_its_settings_describe(digits, tmp_path):
    argv = ["--train.epochs", "0.46", "--train.eval_every_epochs", "0", "--train.log_every_steps", "2", "--optim.lr", "0.06",
            "--optim.warmup_epochs", "0.2", "--optim.final_lr", "0.1", "--optim.clip_norm", "1", "--optim.ema_decay", "0.4",
            "--model.dropout", "0", "--augment.crop", "none", "--augment.rotate_degrees", "0"]  # fmt: skip
    run = train_tiny(digits, tmp_path / "run", *argv)

    config, _, _ = parse(tiny_run(digits, tmp_path, *argv))
    index = load_index(digits)
    network = build_network(config, index).train()
    parameters = list(network.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 5e-4},
              {"params": [p for p in parameters if p.dim() < 2]}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, 0.06, momentum=0.9, nesterov=True)
    average = copy.deepcopy(network)
    rates = [0.02, 0.04, 0.06, *(0.06 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2) for k in range(4))]
    losses, norms = [], []
    for step, batch in zip(range(7), open_stream(index, batch_size=96), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        loss = F.cross_entropy(network(evaluation_pixels(batch.images, (16, 16), index.mean, index.std)), batch.labels)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        keep = min(0.4, (1 + step) / (10 + step))
        for mean, now in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
            mean.copy_(keep * mean + (1 - keep) * now if mean.is_floating_point() else now)
    assert max(norms) > 1.5  # else nothing is clipped

    rows = lines_of(run, "train")
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert [row["lr"] for row in rows] == pytest.approx([rates[1], rates[3], rates[5], rates[6]], rel=1e-9)
    means = [sum(losses[first:end]) / (end - first) for first, end in ((0, 2), (2, 4), (4, 6), (6, 7))]
    assert [row["loss"] for row in rows] == pytest.approx(means, abs=1e-4)
    for kind, expected in (("model", network), ("ema", average)):
        found = load_file(run / f"checkpoints/step-00000007/{kind}.safetensors")
        torch.testing.assert_close(found, dict(expected.state_dict()), rtol=1e-3, atol=1e-5)

    (batch,) = open_evaluation(index, "val", 4096)
    judged = {}
    for kind, judge in (("model", network), ("ema", average)):
        with torch.no_grad():
            logits = judge.eval()(evaluation_pixels(batch.images, (16, 16), index.mean, index.std))
        judged[kind] = F.cross_entropy(logits, batch.labels).item(), (logits.argmax(1) == batch.labels).float().mean().item()
    assert abs(judged["model"][0] - judged["ema"][0]) > 0.01
    row = lines_of(run, "eval")[0]
    assert (row["step"], row["split"]) == (7, "val") and (row["loss"], row["top1"]) == pytest.approx(judged["ema"], abs=1e-4)


def test_the_best_and_patience_outlive_a_stop(digits, tmp_path, monkeypatch):
    told = [{"top1": top1} for top1 in (0.9, 0.8, 0.7, 0.6)]
    argv = [*FOUR_EVALUATIONS, "--train.patience", "2", "--train.keep_checkpoints", "9"]
    judged_by(monkeypatch, *told)
    calm = train_tiny(digits, tmp_path / "calm", *argv)
    judged_by(monkeypatch, *told)
    stopped = train_tiny(digits, tmp_path / "stopped", *argv, "--train.max_steps", "3")
    assert [row["step"] for row in lines_of(stopped, "eval")] == [2, 3]
    train_tiny(digits, stopped, *argv, "--resume")
    assert [(row["step"], row["top1"]) for row in lines_of(stopped, "eval")][:3] == [(2, 0.9), (3, 0.8), (5, 0.7)]
    result = json.loads((stopped / "result.json").read_text())
    assert (result["step"], result["best_step"]) == (5, 2)
    assert result == json.loads((calm / "result.json").read_text())
    of_best = (stopped / "checkpoints/step-00000002/ema.safetensors").read_bytes()
    assert all((run / "weights.safetensors").read_bytes() == of_best for run in (calm, stopped))


def test_a_layer_that_draws_by_itself_draws_anew_in_each_step_and_alike_after_a_stop(digits, tmp_path, monkeypatch):
    drawn = {}

    def built_with_torchs_dropout(config, index, *say):
        network = build_network(config, index)

        def drop(module, inputs, logits):
            kept = F.dropout(torch.ones_like(logits), 0.5, module.training)
            if module.training and len(logits) == 96:
                drawn.setdefault(run, []).append(kept)
            return logits * kept

        network.register_forward_hook(drop)
        return network

    monkeypatch.setattr(initial_network, "build_network", built_with_torchs_dropout)
    for run, halts in ((tmp_path / "whole", ("6",)), (tmp_path / "parts", ("3", "6"))):
        for halt in halts:
            train_tiny(digits, run, "--train.max_steps", halt, "--resume")
    whole, parts = drawn.values()
    assert len(whole) == 6 and torch.equal(torch.stack(whole), torch.stack(parts))
    assert not any(torch.equal(whole[i], whole[j]) for i in range(6) for j in range(i))
    files = [run / "checkpoints/step-00000006/model.safetensors" for run in drawn]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("monitor, top1s, losses, best", [
    ("top1", (0.3, 0.9, 0.9, 0.1), (1.0, 0.8, 0.7, 0.1), 5),  # of equal ones the lower loss
    ("top1", (0.3, 0.9, 0.9, 0.1), (1.0, 0.7, 0.8, 0.1), 3),
    ("loss", (0.9, 0.1, 0.2, 0.3), (math.nan, 0.3, 0.4, 0.5), 3),
    ("loss", (0.9, 0.8, 0.2, 0.1), (0.6, 0.5, 0.4, 0.3), 6),
])  # fmt: skip
def test_the_best_evaluations_averaged_weights_are_kept(digits, tmp_path, monkeypatch, monitor, top1s, losses, best):
    judged_by(monkeypatch, *({"top1": top1, "loss": loss} for top1, loss in zip(top1s, losses, strict=True)))
    run = train_tiny(digits, tmp_path / "run", *FOUR_EVALUATIONS, "--train.keep_checkpoints", "9", "--train.monitor", monitor)
    assert [(row["step"], row["top1"]) for row in lines_of(run, "eval")][:4] == list(zip((2, 3, 5, 6), top1s, strict=True))
    assert json.loads((run / "checkpoints/best.json").read_text()) == {"checkpoint": f"step-{best:08d}"}
    assert json.loads((run / "result.json").read_text())["best_step"] == best
    kept = load_file(run / "weights.safetensors")
    files = [path for path in run.glob("checkpoints/step-*/*.safetensors") if path.stem in ("ema", "model")]
    same = [path for path in files if all(torch.equal(kept[name], t) for name, t in load_file(path).items())]
    assert len(files) == 8 and same == [run / f"checkpoints/step-{best:08d}/ema.safetensors"]


def test_balanced_accuracy_picks_the_checkpoint_where_it_is_monitored(digits, tmp_path, monkeypatch):
    told = [{"top1": 0.9, "balanced": 0.5}, {"top1": 0.8, "balanced": 0.6}, {"top1": 0.7, "balanced": 0.65},
            {"top1": 0.6, "balanced": 0.4}]  # fmt: skip
    for monitor, best in (("top1", 2), ("balanced", 5)):
        judged_by(monkeypatch, *told)
        run = train_tiny(digits, tmp_path / monitor, *FOUR_EVALUATIONS, "--train.monitor", monitor)
        assert [row["balanced"] for row in lines_of(run, "eval")][:4] == [figures["balanced"] for figures in told]
        result = json.loads((run / "result.json").read_text())
        assert result["best_step"] == best and 0 < result["test"]["balanced"] < 1


@pytest.mark.parametrize("halt", [3, 4])
def test_the_rate_falls_with_each_evaluation_that_is_no_better_and_stays_low_after_a_stop(digits, tmp_path, monkeypatch, halt):
    settings = [*FOUR_EVALUATIONS, "--optim.schedule", "plateau", "--optim.plateau_patience", "0", "--optim.step_factor", "0.5"]
    run = tmp_path / "run"
    judged_by(monkeypatch, *({"top1": top1} for top1 in (0.9, 0.8, 0.7, 0.6)))
    train_tiny(digits, run, *settings, "--train.max_steps", str(halt))
    train_tiny(digits, run, *settings, "--resume")
    assert [row["lr"] for row in lines_of(run, "train")] == [0.02, 0.02, 0.02, 0.01, 0.01, 0.005]


def test_an_update_is_no_longer_than_the_clipped_gradient(digits, tmp_path):
    settings = ["--optim.momentum", "0", "--optim.weight_decay", "0", "--optim.ema_decay", "0", "--train.max_steps", "1"]
    config, _, _ = parse(tiny_run(digits, tmp_path))
    before, moved = {name: p.detach() for name, p in build_network(config, load_index(digits)).named_parameters()}, []
    for clip_norm in (0.1, 0):
        run = train_tiny(digits, tmp_path / str(clip_norm), *settings, "--optim.clip_norm", str(clip_norm))
        after = load_file(run / "checkpoints/step-00000001/model.safetensors")
        moved.append(math.sqrt(sum(float((after[name] - p).square().sum()) for name, p in before.items())))
    assert moved[0] == pytest.approx(0.02 * 0.1, rel=1e-3) and moved[1] > 2 * moved[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_logged_loss_is_the_smoothed_cross_entropy(digits, tmp_path, smoothing):
    argv = ("--optim.label_smoothing", str(smoothing), "--train.max_steps", "1")
    (row,) = lines_of(train_tiny(digits, tmp_path / "run", *argv), "train")
    config, _, _ = parse(tiny_run(digits, tmp_path, *argv))
    index = load_index(digits)
    network = build_network(config, index).train().to(memory_format=torch.channels_last)
    augment = Augment(config.augment, (16, 16), index.mean, index.std, torch.device("cpu"))
    batch = next(open_stream(index, batch_size=96))
    set_dropout_keys(network, batch.random_keys)
    with torch.no_grad():
        log_p = network(augment(batch.images, batch.random_keys)).log_softmax(1)
    plain = -log_p.gather(1, batch.labels[:, None]).mean()
    evenly = -log_p.mean()
    assert row["loss"] == pytest.approx(float((1 - smoothing) * plain + smoothing * evenly), abs=1e-4)
    assert abs(plain - evenly) > 0.01


def test_initial_weights_follow_from_the_seed(digits, tmp_path):
    def weights(seed):
        config, _, _ = parse(tiny_run(digits, tmp_path, "--seed", str(seed)))
        return [p for p in build_network(config, load_index(digits)).parameters() if p.dim() > 1]

    for first, again, other in zip(weights(1), weights(1), weights(2), strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_windows_lanes_and_seed_reach_the_stream_and_the_plan(tmp_path, capsys):
    shards = sharded(tmp_path / "many", "--source", "sklearn", "--dataset", "digits", "--min_shards", "24")
    order = ["--data.window_shards", "2", "--data.lanes", "4", "--seed", "5"]
    config, _, _ = parse(tiny_run(str(shards), tmp_path, *order))
    accelerator, world = runtime.start("fp32", 1, 60)
    with contextlib.closing(Run(config, tmp_path / "run", accelerator, world)) as run:
        batch = next(run.stream(7))
    runtime.end()
    counts = load_index(shards).split("train").shard_samples
    assert len(counts) == 24
    assert batch.samples.tolist() == Order(counts, 96, 5, 2, 4).global_batch(7)[0].tolist()
    others = [Order(counts, 96, *rest) for rest in ((5, 16, 4), (5, 2, 0), (0, 2, 4))]
    assert all(batch.samples.tolist() != other.global_batch(7)[0].tolist() for other in others)
    capsys.readouterr()
    plan.main(shlex.split(plan.command(config, 7))[2:])
    assert json.loads(capsys.readouterr().out)["samples"] == batch.keys


def test_a_run_on_cut_pictures_is_judged_and_used_by_their_middle(photos, tmp_path, capsys):
    settings = ["--augment.crop", "random_resized", "--data.image_size", "32", "--data.global_batch_size", "16"]
    run = train_tiny(photos, tmp_path / "run", *settings)
    assert json.loads((run / "inference.json").read_text())["eval_crop"] == 0.875
    capsys.readouterr()
    eval_main([str(run), "--split", "test", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told == {"split": "test", **json.loads((run / "result.json").read_text())["test"]}

    index = load_index(photos)
    store, files = Store(index.split("test")), tmp_path / "files"
    files.mkdir()
    for sample in range(index.split("test").num_samples):
        (files / f"{sample:02d}.jpg").write_bytes(store.payload(sample))
    assert predict_main([str(run), str(files), "--json", "--top", "3"]) == 0
    rows = [json.loads(line)["top"] for line in capsys.readouterr().out.splitlines()]
    predicted = np.array([[{top["class"]: top["probability"] for top in row}[name] for name in index.classes] for row in rows])
    network, accelerator = load_run(run), runtime.start("fp32", 1, 60)[0]
    of_crop = {}
    for crop in (0.875, 0.0):
        (batch,) = open_evaluation(index, "test", 64, 32, crop)
        with torch.no_grad():
            of_crop[crop] = predict_logits(network.config, network, network.network, batch.images, accelerator).softmax(1).numpy()
    runtime.end()
    assert np.abs(predicted - of_crop[0.875]).max() < 1e-5 < 1e-3 < np.abs(predicted - of_crop[0.0]).max()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_training_stops_at_a_picture_that_is_not_the_one_converted(digits, tmp_path, split):
    shards = tmp_path / "digits"
    shutil.copytree(digits, shards)
    part = load_index(shards).split(split)
    rows, on_disk = part.table(), part.shard_of(np.arange(part.num_samples))
    sample = int(next(open_stream(digits, batch_size=96)).samples[0]) if split == "train" else 0
    other = next(i for i in range(part.num_samples) if rows["size"][i] == rows["size"][sample] and i != sample)
    path = shards / part.files[on_disk[sample]]
    content, at = bytearray(path.read_bytes()), int(rows["offset"][sample])
    content[at : at + rows["size"][sample]] = Store(part).payload(other)
    path.write_bytes(content)
    argv = ["--train.epochs", "0.1", "--data.cache", "none"]
    with pytest.raises(UserError, match=f"{path.name}: .*checksum differs from the index.*{split}/{sample:08d}"):
        run_training(tiny_run(str(shards), tmp_path / "run", *argv))
    train_tiny(str(shards), tmp_path / "unproven", *argv, "--data.verify", "false")  # it can be decoded
