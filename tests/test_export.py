"""Exported files: the same predictions from the file alone, everything needed to use it inside, nothing left of a bad one."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import train_tiny
from safetensors.torch import save_file

from dist_train import export as export_module
from dist_train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dist_train.durable import replace_json
from dist_train.errors import UserError
from dist_train.export import FILES, export, load_exported, main, told
from dist_train.index import load_index
from dist_train.initial_network import build_network
from dist_train.predict import load_run
from dist_train.run_folder import inference
from dist_train.settings import to_dict
from dist_train.sizes import input_size

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    """A real run, evaluated on six views of each picture."""
    return train_tiny(digits, tmp_path_factory.mktemp("runs") / "trained", "--train.flip_test", "true", "--train.shift_test", "2")


def untrained(run: Path, shards: str, image_size: int = 0, **model) -> Path:
    """A run folder as training leaves it, with weights as drawn and BatchNorm statistics of noise."""
    config = RunConfig(
        data=DataConfig(shards=shards, image_size=image_size, threads=1, global_batch_size=100),
        model=ModelConfig(**model), train=TrainConfig(epochs=1),
    )  # fmt: skip
    index = load_index(shards)
    network, size = build_network(config, index), input_size(config, index)
    shape = (64, 3, *size) if size else (64, len(index.features))
    for module in network.modules():
        if hasattr(module, "keys"):
            module.keys = torch.arange(64)
    network.train()(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    for p in network.parameters():
        p.data += 0.01  # no bias stays zero, no logits stay small
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    replace_json(run / "inference.json", inference(config, index, size))
    save_file(network.state_dict(), run / "weights.safetensors")
    return run


@pytest.mark.parametrize("kind", FILES)
def test_the_file_has_the_runs_accuracy_over_all_its_views(trained, tmp_path, capsys, kind):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    main([str(trained), "--to", kind, "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    check = json.loads(told.out.splitlines()[-1])
    assert check["top1_run"] == check["top1_file"] > 0.2 and check["changed_predictions"] == 0
    sentence = (f"{check['samples']} test samples through the file: top-1 {check['top1_file']:.2%}, as the run's network; "
                f"no prediction differs; logits differ by {check['largest_logit_difference']:.2g} at most")  # fmt: skip
    assert told.out.splitlines()[-2] == sentence
    # of the run's own evaluation, mirror images and moved ones included: nothing is left to tell
    assert check["top1_result"] == json.loads((trained / "result.json").read_text())["test"]["top1"]
    assert check["top1_file"] == check["top1_result"] and told.err == ""
    assert check["samples"] == load_index(str(yaml.safe_load((trained / "config.yaml").read_text())["data"]["shards"])
                                          ).split("test").num_samples  # fmt: skip
    assert 0 <= check["largest_logit_difference"] < 1e-5 < check["largest_logit"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {FILES[kind], f"{FILES[kind]}.json"}
    about = json.loads((tmp_path / "out" / f"{FILES[kind]}.json").read_text())
    assert about["classes"] == [str(k) for k in range(10)] and about["check"] == check
    if kind == "onnx":
        import onnxruntime

        (out,) = onnxruntime.InferenceSession(tmp_path / "out" / FILES[kind]).get_outputs()
        assert out.shape == ["batch", 10]  # not of the six views' pictures
    views = about["preprocessing"]["views"]
    assert {**views, "rule": ""} == {"rule": "", "flip": True, "shift": 2, "count": 6, "count_of_the_run": 6,
                                     "is_in_the_file": kind != "safetensors"}  # fmt: skip
    assert "moved 2 px up" in views["rule"] and "mirror image" in views["rule"]
    # digits are 8 x 8 px, the network takes 16: a graph enlarges them itself
    shape, dtype = about["input"]["shape"], about["input"]["dtype"]
    assert (shape, dtype) == ((["batch", 3, 16, 16], "float32") if kind == "safetensors" else (["batch", 3, 8, 8], "uint8"))
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_predictions_that_differ_are_counted_in_the_sentence():
    check = {"split": "val", "samples": 2000, "top1_run": 0.8, "top1_file": 0.7995, "changed_predictions": 1,
             "largest_logit_difference": 0.00123}  # fmt: skip
    assert told(check) == ("2,000 val samples through the file: top-1 79.95%, that of the run's network 80.00%; "
                           "1 prediction differs; logits differ by 0.0012 at most")  # fmt: skip
    assert "2 predictions differ;" in told(check | {"changed_predictions": 2})


def test_one_view_is_a_single_pass_and_its_cost_in_accuracy_is_told(trained, tmp_path, capsys):
    result, evaluation = (json.loads((trained / name).read_text()) for name in ("result.json", "evaluation-test.json"))
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "inference.json", "weights.safetensors"):
        (run / name).write_bytes((trained / name).read_bytes())
    one, all_of_them = (export(run, "safetensors", tmp_path / which, which_views=which) for which in ("one", "all"))
    assert one["check"]["top1_result"] is None and capsys.readouterr().err == ""  # the run left no figures
    views = one["preprocessing"]["views"]
    assert (views["count"], views["count_of_the_run"], views["flip"], views["shift"]) == (1, 6, False, 0)
    pictures = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    of_one, of_all = (load_exported(tmp_path / which / "model.safetensors")(pictures) for which in ("one", "all"))
    loaded = load_run(run)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    normal = (pictures / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(of_one, loaded.network(normal))
        up, down = torch.zeros(2, 5, 3, 16, 16)
        up[:, :, :-2, :-2], down[:, :, 2:, 2:] = normal[:, :, 2:, 2:], normal[:, :, :-2, :-2]
        expected = sum(share * (loaded.network(view) + loaded.network(view.flip(3))) / 2
                       for share, view in ((1 / 2, normal), (1 / 4, up), (1 / 4, down)))  # fmt: skip
    torch.testing.assert_close(of_all, expected)
    assert (of_one - of_all).abs().max() > 0.01

    replace_json(run / "evaluation-test.json", evaluation)
    better = all_of_them["check"]["top1_file"] + 0.01
    replace_json(run / "result.json", result | {"test": result["test"] | {"top1": better}})
    assert export(run, "safetensors", tmp_path / "one", which_views="one")["check"]["top1_result"] == better
    told = capsys.readouterr().err
    assert f"in result.json {better:.4f}" in told and "mean over 6 views: leave out --views one" in told
    export(run, "safetensors", tmp_path / "all")
    assert f"the file's top1 is {better - 0.01:.4f}, that in result.json {better:.4f}" in capsys.readouterr().err
    replace_json(run / "evaluation-test.json", evaluation | {"fingerprint": "of another set"})
    assert export(run, "safetensors", tmp_path / "all")["check"]["top1_result"] is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_the_pool_to_a_grid_exports_where_it_is_a_matrix_product(digits, tmp_path, kind):
    run = untrained(tmp_path / "run", digits, 64, name="vgg11", width=0.0625)
    network = load_run(run).network
    assert tuple(network.features(torch.zeros(1, 3, 64, 64)).shape[2:]) == (2, 2)
    assert network.avgpool.output_size == (7, 7)  # windows of one and of two pixels
    check = export(run, kind, tmp_path / "out")["check"]
    assert check["changed_predictions"] == 0
    assert check["largest_logit_difference"] < 1e-5 * check["largest_logit"] + 1e-7


def test_torchvisions_networks_export(digits, tmp_path):
    run = untrained(tmp_path / "run", digits, 16, name="resnet18", stem="small")
    check = export(run, "onnx", tmp_path / "out")["check"]
    assert check["changed_predictions"] == 0
    assert check["largest_logit_difference"] < 1e-5 * check["largest_logit"] + 1e-7


@pytest.mark.parametrize("kind", FILES)
def test_tables_are_standardised_inside_the_graph(table, tmp_path, kind):
    run = untrained(tmp_path / "run", table, name="mlp", hidden=(16, 8), batchnorm=True, activation="selu")
    about = export(run, kind, tmp_path / "out")
    index = load_index(table)
    assert about["input"]["columns"] == index.features and about["input"]["shape"] == ["batch", 30]
    assert about["preprocessing"]["standardise"] == {
        "rule": "(value - mean) / std, and 0 where the value is missing (NaN)", "mean": index.mean, "std": index.std,
        "is_in_the_file": kind != "safetensors"}  # fmt: skip
    exported, network = load_exported(tmp_path / "out" / FILES[kind]), load_run(run).network
    rows = torch.randn(5, 30)
    with torch.no_grad():
        logits = exported(rows * torch.tensor(index.std) + torch.tensor(index.mean))
        torch.testing.assert_close(logits, network(rows), rtol=1e-4, atol=1e-4)
        filled = rows * torch.tensor(index.std) + torch.tensor(index.mean)
        missing = torch.rand(5, 30) < 0.3
        filled[missing] = torch.tensor(index.mean).expand(5, 30)[missing]
        torch.testing.assert_close(exported(filled.masked_fill(missing, torch.nan)), exported(filled), rtol=0, atol=0)


def test_pictures_of_many_sizes_come_cropped_as_described(photos, tmp_path):
    run = untrained(tmp_path / "run", photos, 32, name="alexnet_bn", width=0.0625)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["augment"]["crop"] = "random_resized"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((run / "inference.json").read_text())
    replace_json(run / "inference.json", about | {"eval_crop": 0.875})
    about = export(run, "onnx", tmp_path / "out")
    resize = about["preprocessing"]["resize"]
    assert (resize["shorter_side"], resize["size"]) == (37, [32, 32])
    assert resize["rule"] == "shorter side to 37 px, then the central 32 x 32 px"
    assert about["input"]["shape"] == ["batch", 3, 32, 32]

    # by hand, from the file and the description alone
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / about["file"])
    inside = json.loads(session.get_modelmeta().custom_metadata_map["dist_train"])
    assert inside == {key: value for key, value in about.items() if key != "check"}
    (entry,), (out,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.shape, out.name, out.shape) == ("pictures", ["batch", 3, 32, 32], "logits", ["batch", 3])
    (logits,) = session.run(None, {entry.name: np.zeros((7, 3, 32, 32), np.uint8)})
    assert logits.shape == (7, 3)


@pytest.mark.parametrize("kind", FILES)
def test_the_file_resizes_as_the_run_does(digits, tmp_path, kind):
    run = untrained(tmp_path / "run", digits, 20, name="alexnet_bn", width=0.0625)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["interpolation"] = "bicubic"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    about = export(run, kind, tmp_path / "out")
    assert about["preprocessing"]["resize"]["interpolation"] == "bicubic, antialiased"
    trained, pictures = load_run(run), torch.randint(0, 2, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) * 255
    larger = torch.nn.functional.interpolate(pictures / 255, (20, 20), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (trained.mean, trained.std))
    with torch.no_grad():
        expected = trained.network((larger - mean) / std)
        found = load_exported(tmp_path / "out" / about["file"])(pictures.to(torch.uint8))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_file_that_computes_something_else_is_not_kept(digits, tmp_path, monkeypatch):
    run = untrained(tmp_path / "run", digits, 16, name="alexnet", width=0.0625)
    out = tmp_path / "out"

    def shifted_mean(self, network, mean, *more):
        right(self, network, [m + 0.05 for m in mean], *more)

    right = export_module.Deployed.__init__
    monkeypatch.setattr(export_module.Deployed, "__init__", shifted_mean)
    with pytest.raises(UserError, match=r"logits differ by up to [\d.e-]+, where the largest is.*\n.*not kept"):
        export(run, "safetensors", out)
    assert not out.exists()
    monkeypatch.undo()
    export(run, "safetensors", out)
    good = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(export_module.Deployed, "__init__", shifted_mean)
    with pytest.raises(UserError, match="not kept"):
        export(run, "safetensors", out)
    assert (out / "model.safetensors").read_bytes() == good and len(list(out.iterdir())) == 2


def test_what_cannot_be_exported_is_said(digits, tmp_path, monkeypatch):
    run = untrained(tmp_path / "run", digits, 16, name="alexnet", width=0.0625)
    with pytest.raises(UserError, match="there is no such run folder"):
        export(tmp_path / "absent", "safetensors", tmp_path / "out")
    with pytest.raises(UserError, match="there is no split 'dev'; it has"):
        export(run, "safetensors", tmp_path / "out", "dev")
    with pytest.raises(UserError, match=r"as it was trained.*\n.*model.width: 0.0625 in the run, 1.0 now"):
        export(run, "safetensors", tmp_path / "out", overrides=["--model.width", "1"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export(run, "safetensors", tmp_path / "file" / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    with pytest.raises(UserError, match=r"onnx and onnxscript and onnxruntime.*\n.*pip install 'dist_train\[export\]'"):
        export(run, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shards_may_lie_elsewhere_and_the_default_folder_is_in_the_run(digits, tmp_path, capsys):
    run = untrained(tmp_path / "run", digits, 16, name="alexnet", width=0.0625)
    (tmp_path / "moved").symlink_to(digits)
    main([str(run), "--to", "safetensors", "--split", "val", "--data.shards", str(tmp_path / "moved")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["split"] == "val"
    assert (run / "export" / "model.safetensors").exists()
