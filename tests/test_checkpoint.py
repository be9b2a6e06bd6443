"""Checkpoints are whole or absent, proven before use, and the one before stays until then."""

import errno
import json
import os
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import killed_at
from safetensors import safe_open
from safetensors.torch import load_file

from dist_train import checkpoint
from dist_train.checkpoint import (
    Checkpoints,
    Saved,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    write_checkpoint,
)
from dist_train.config import OptimConfig
from dist_train.errors import UserError
from dist_train.index import file_checksum
from dist_train.optim import build_optimizer


def saved(step, value=1.0):
    return Saved(step, {"model": {"weight": torch.full((3, 2), value)}, "optimizer": {}}, {"best_value": 0.5})


def two_saved(folder, best: int = 0) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(saved(step), is_best=step == best)
    checkpoints.wait()
    return checkpoints


def test_a_checkpoint_reads_back_equal(tmp_path):
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    write_checkpoint(tmp_path / "step-00000007", Saved(7, {"model": {"kernel": kernel.contiguous()}}, {"a": [1, None]}))
    back = load_checkpoint(tmp_path / "step-00000007")
    assert (back.step, back.state) == (7, {"a": [1, None]})
    assert torch.equal(back.tensors["model"]["kernel"], kernel)


def test_500_flipped_bits_are_all_found(tmp_path):
    path = tmp_path / "step-00000001"
    write_checkpoint(path, saved(1))
    files = sorted(path.iterdir())
    draw = random.Random(0)
    for _ in range(500):
        file = draw.choice(files)
        good = file.read_bytes()
        bit = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(UserError, match=str(path)):
            load_checkpoint(path)
        file.write_bytes(good)
    assert load_checkpoint(path).step == 1


def test_a_damaged_newest_checkpoint_falls_back_and_is_named(tmp_path):
    checkpoints = two_saved(tmp_path)
    newest = checkpoints.folder / "step-00000002" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    found, complaints = checkpoints.newest()
    assert found.step == 1 and len(complaints) == 1 and str(newest) in complaints[0]


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    checkpoints = two_saved(tmp_path, best=2)
    assert checkpoints.newest()[0].step == 2

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpoint, "file_checksum", fail)
    for read in (checkpoints.newest, lambda: checkpoints.has_best(Saved(2, {}, {}))):
        with pytest.raises(UserError, match="step-00000002/model.safetensors: cannot be read: Input/output error.*may be whole"):
            read()


def test_nothing_is_begun_anew_over_checkpoints_that_are_all_damaged(tmp_path):
    checkpoints = two_saved(tmp_path)
    for path in checkpoints.finished():
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="(?s)step-00000002/state.json.*step-00000001/state.json.*No whole checkpoint is left"):
        checkpoints.newest()


def test_colleagues_may_read_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "step-00000001", saved(1))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000001").iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {0o640}


def test_a_run_folder_that_a_machine_does_not_see_is_named_at_the_start(tmp_path, monkeypatch):
    later = threading.Timer(0.3, (tmp_path / "config.yaml").touch)
    later.start()
    checkpoint.wait_until_shown(tmp_path)
    later.join()
    monkeypatch.setattr(checkpoint, "_SHOWN_LATE_S", 0.0)
    with pytest.raises(UserError, match="does not see the run folder that rank zero has written.*\n.*all machines share"):
        checkpoint.wait_until_shown(tmp_path / "elsewhere")


def test_safetensors_reads_what_is_written_of_every_type(tmp_path):
    named = {f"{kind}": torch.ones(2, 3).to(kind) for kind in checkpoint._DTYPES} | {
        "kernel": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "none": torch.zeros(0, 5), "one": torch.tensor(7),
    }  # fmt: skip
    checksum = checkpoint.write_tensors(tmp_path / "x.safetensors", named, {"about": "ümlaut"})
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == named.keys() and all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in named.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"about": "ümlaut"}
    assert checksum == file_checksum(tmp_path / "x.safetensors")


def test_a_file_that_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "file_checksum", lambda path: "0" * 32)
    with pytest.raises(OSError, match="does not read back"):
        write_checkpoint(tmp_path / "step-00000001", saved(1))
    assert not list(tmp_path.iterdir())


def test_a_rank_takes_the_checkpoint_that_rank_zero_has_read_and_waits_for_it(tmp_path, monkeypatch):
    checkpoints = two_saved(tmp_path)
    monkeypatch.setattr("dist_train.checkpoint.on_main", lambda world, find: (newest, ["said"]))  # rank zero's word
    newest, elsewhere = checkpoints.folder / "step-00000002", tmp_path / "not-seen-yet"
    newest.rename(elsewhere)
    later = threading.Timer(0.5, elsewhere.rename, (newest,))
    later.start()
    found, complaints = checkpoints.agree_on_newest(SimpleNamespace(is_main=False))
    later.join()
    assert found.step == 2 and complaints == ["said"]
    newest.rename(elsewhere)
    monkeypatch.setattr("dist_train.checkpoint._SHOWN_LATE_S", 0.0)
    with pytest.raises(UserError, match=r"step-00000002.*(.|\n)*Is the run folder on a disk that all machines share\?"):
        checkpoints.agree_on_newest(SimpleNamespace(is_main=False))


def test_what_is_written_after_going_back_outlives_the_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(saved(9), is_best=False)
    checkpoints.wait()
    (checkpoints.folder / "step-00000009" / "manifest.json").unlink()
    checkpoints.save(saved(5), is_best=False)
    checkpoints.wait()
    assert [path.name for path in checkpoints.folder.glob("step-*")] == ["step-00000005"]


def test_old_ones_go_only_after_a_newer_one_and_the_best_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(saved(step), is_best=step == 2)
    checkpoints.wait()
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "best.json", "step-00000002", "step-00000004", "step-00000005"]  # fmt: skip
    assert checkpoints.best_path().name == "step-00000002"


def test_the_same_step_again_is_the_newest_and_goes_on_from(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for value in range(12):  # stopped and started again and again in one evaluation
        checkpoints.save(saved(7, float(value)), is_best=value == 5)
    checkpoints.wait()
    assert checkpoints.newest()[0].tensors["model"]["weight"][0, 0] == 11
    assert load_checkpoint(checkpoints.best_path()).tensors["model"]["weight"][0, 0] == 5
    checkpoints.save(saved(8), is_best=False)
    checkpoints.wait()
    assert checkpoints.newest()[0].step == 8
    assert sorted(p.name for p in checkpoints.folder.glob("step-*")) == ["step-00000007-11", "step-00000007-5", "step-00000008"]


def test_a_failed_write_leaves_the_previous_one_and_says_so(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(saved(1), is_best=True)
    checkpoints.wait()
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    checkpoints.save(saved(2), is_best=True)
    with pytest.raises(UserError, match="No space left on device.*\n.*previous one is untouched"):
        checkpoints.wait()
    assert [p.name for p in checkpoints.folder.glob("step-*")] == ["step-00000001"]
    assert checkpoints.newest()[0].step == 1


@pytest.mark.parametrize("step", [2, 1], ids=["the next step", "the same step again"])
def test_a_crash_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    for operation in range(1, 30):
        folder = tmp_path / str(operation)
        write_checkpoint(folder / "checkpoints" / "step-00000001", saved(1))
        with killed_at(operation, monkeypatch) as left:
            Checkpoints(folder, keep=1)._write(saved(step, 2.0), True)
        found, _ = Checkpoints(folder, keep=1).newest()
        assert (found.step, found.tensors["model"]["weight"][0, 0].item()) in ((1, 1.0), (step, 2.0))
        if left[0] > 0:
            return  # nothing left to interrupt
    raise AssertionError("the write never finished")


def test_the_copy_is_taken_before_training_goes_on(tmp_path):
    weight = torch.zeros(2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(Saved(1, {"model": {"w": weight}}, {}), is_best=False)
    weight += 1
    checkpoints.wait()
    assert checkpoints.newest()[0].tensors["model"]["w"].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamax"])
def test_an_optimizer_goes_on_as_if_never_stopped(name, tmp_path):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)).to(
            memory_format=torch.channels_last
        )

    def make(net):
        return build_optimizer(net, OptimConfig(name=name, lr=0.1))

    def step(net, optimizer, i):
        torch.manual_seed(i)
        net(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    calm = network()
    calm_optimizer = make(calm)
    for i in range(4):
        step(calm, calm_optimizer, i)

    first = network()
    first_optimizer = make(first)
    for i in range(2):
        step(first, first_optimizer, i)
    tensors, values = optimizer_tensors(first_optimizer, {id(p): n for n, p in first.named_parameters()})
    contiguous = {k: v.contiguous() for k, v in tensors.items()}
    write_checkpoint(tmp_path / "step-00000002", Saved(2, {"optimizer": contiguous}, {"optimizer": values}))
    back = load_checkpoint(tmp_path / "step-00000002")

    second = network()
    second.load_state_dict(first.state_dict())
    second_optimizer = make(second)
    restore_optimizer(second_optimizer, back.tensors["optimizer"], back.state["optimizer"], dict(second.named_parameters()))
    for i in range(2, 4):
        step(second, second_optimizer, i)
    assert all(torch.equal(a, b) for a, b in zip(calm.parameters(), second.parameters(), strict=True))


def test_a_state_of_another_network_is_refused():
    net = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="conv.weight, which this model lacks"):
        restore_optimizer(torch.optim.SGD(net.parameters()), {"conv.weight/momentum_buffer": torch.zeros(2)}, {},
                          dict(net.named_parameters()))  # fmt: skip


def test_the_manifest_lists_every_file(tmp_path):
    write_checkpoint(tmp_path / "step-00000001", saved(1))
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_best_is_named_again_where_a_kill_came_before_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    for step, is_best in ((1, True), (2, True)):
        checkpoints.save(Saved(step, {"model": {"w": torch.full((2,), float(step))}}, {}), is_best)
    checkpoints.wait()
    (tmp_path / "checkpoints/best.json").unlink()  # as if the kill had come after the rename
    again = Checkpoints(tmp_path, 1)
    saved, _ = again.newest()
    assert saved.step == 2 and saved.state["is_best"] and again.best_path() is None
    assert again.has_best(saved) and again.best_path().name == "step-00000002"


def test_a_best_that_was_damaged_with_the_newest_is_no_best_and_not_counted(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    for step, is_best in ((1, True), (2, False), (3, True)):
        checkpoints.save(Saved(step, {"model": {"w": torch.full((2,), float(step))}}, {}), is_best)
    checkpoints.wait()
    damaged = tmp_path / "checkpoints/step-00000003/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    again = Checkpoints(tmp_path, 2)
    saved, complaints = again.newest()
    assert saved.step == 2 and len(complaints) == 1
    assert not again.has_best(saved)  # of step 1, which is pruned; that of step 3 is damaged
    again.save(Saved(3, {"model": {"w": torch.zeros(2)}}, {}), is_best=True)
    again.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000003-1"]


def test_an_unreadable_best_json_stops_pruning_and_not_the_run(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    for step in (1, 2, 3):
        checkpoints.save(Saved(step, {"model": {"w": torch.zeros(2)}}, {}), is_best=step == 1)
        checkpoints.wait()
        (tmp_path / "checkpoints/best.json").write_text("{")
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 3
    with pytest.raises(UserError, match="best.json: cannot be read"):
        checkpoints.best_path()
