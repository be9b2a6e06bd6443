"""Start-up guards, stop requests, the run folder's lock: what stands between a wrong launch and a wrong result."""

import contextlib
import errno
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, wait_for

from dist_train import runtime
from dist_train.errors import UserError


@pytest.fixture
def job(monkeypatch):
    """The environment of a launcher's rank, on a machine whose GPUs can be set."""

    def set_environment(num_gpus=0, **values):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU",
                     "ACCELERATE_MIXED_PRECISION"):  # fmt: skip
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)

    return set_environment


@pytest.mark.parametrize("num_gpus, values, precision, complaint", [
    (0, {"WORLD_SIZE": "4", "RANK": "1"}, "fp32", "WORLD_SIZE is 4 but this process would be alone"),
    (2, {"WORLD_SIZE": "4", "RANK": "1"}, "fp32", "4 processes on this machine, but 2 GPUs are visible"),
    (2, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "fp32", "4 processes on this machine, but 2 GPUs are visible"),
    (0, {}, "fp16", "train.precision is fp16, which needs a GPU"),
    (0, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "fp32", "asks for mixed precision bf16, the recipe for .* fp32"),
])  # fmt: skip
def test_a_wrong_launch_is_refused(job, num_gpus, values, precision, complaint):
    job(num_gpus, **values)
    with pytest.raises(UserError, match=complaint):
        runtime.start(precision, threads=1, timeout_s=5)


def launcher_in(folder: Path) -> Path:
    """Stands for accelerate's launcher, whose command line is what counts: starts child.py and waits for it."""
    launcher = folder / "accelerate"
    launcher.write_text("import subprocess, sys\nsys.exit(subprocess.call([sys.executable, 'child.py']))\n")
    return launcher


@pytest.mark.parametrize("options, refused", [
    (["--cpu", "--num_processes", "2"], True),
    (["--num_processes=3"], True),
    (["--config_file", "cpu.yaml"], True),
    (["--config_file", "cpu.yaml", "--num_processes", "1"], False),
    (["--num_processes", "1"], False),
    ([], True),  # accelerate's own file, in Hugging Face's folder
])  # fmt: skip
def test_accelerate_starting_one_process_for_several_is_refused(tmp_path, options, refused):
    (tmp_path / "cpu.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    own = tmp_path / "home/accelerate/default_config.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((tmp_path / "cpu.yaml").read_text())
    launcher = launcher_in(tmp_path)
    (tmp_path / "child.py").write_text(
        "from dist_train import runtime\nfrom dist_train.errors import UserError\n"
        "try:\n    runtime._refuse_lonely_launch(1)\nexcept UserError as error:\n    print(error)\n"
    )
    command = [sys.executable, str(launcher), "launch", *options, "-m", "dist_train.train", "--num_processes", "9"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert ("and started one" in out) == refused, out


def test_a_package_that_is_not_installed_is_no_hindrance():
    assert runtime.version_of("no-such-package") is None and runtime.version_of("torch")


def test_signals_are_noted_and_harmless_when_repeated(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    requests = runtime.StopRequests(tmp_path)
    assert not requests
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests and requests.reason == "SIGUSR1"
    requests.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_at_once(tmp_path):
    requests = runtime.StopRequests(tmp_path)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        requests.close()


@pytest.mark.parametrize("words, env, ends", [
    (["launch", "-m"], {"WORLD_SIZE": "1"}, True),  # accelerate's launcher leaves its single process running
    (["-m"], {"WORLD_SIZE": "2"}, True),
    (["-m"], {"WORLD_SIZE": "1"}, False),  # a shell may end before what it started in the background
])  # fmt: skip
def test_a_process_whose_launcher_is_gone_is_asked_to_stop(tmp_path, words, env, ends):
    launcher = launcher_in(tmp_path)
    (tmp_path / "child.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom dist_train import runtime\nparent = os.getppid()\n"
        "requests = runtime.StopRequests(Path('.'))\nPath('ready').touch()\ngone_at = None\n"
        "while not requests and (gone_at is None or time.monotonic() < gone_at + 2):\n    time.sleep(0.02)\n"
        "    gone_at = gone_at or (time.monotonic() if os.getppid() != parent else None)\n"
        "Path('reason.partial').write_text(requests.reason or 'none')\nos.rename('reason.partial', 'reason')\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    process = subprocess.Popen([sys.executable, str(launcher), *words], cwd=tmp_path, env=env)
    wait_for((tmp_path / "ready").exists, "ready")
    process.kill()
    process.wait()
    wait_for((tmp_path / "reason").exists, "reason")
    assert (tmp_path / "reason").read_text() == ("its launcher is gone" if ends else "none")


def test_a_stop_file_is_a_request(tmp_path):
    requests = runtime.StopRequests(tmp_path)
    (tmp_path / "stop").touch()
    assert requests and "stop" in requests.reason
    requests.close()


def test_rank_zero_alone_looks_for_the_stop_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    requests = runtime.StopRequests(tmp_path)
    (tmp_path / "stop").touch()
    assert not requests
    requests.close()


def test_the_lock_of_a_host_that_is_gone_is_waited_for(tmp_path, monkeypatch, capsys):
    held = runtime.RunLock(tmp_path)
    (tmp_path / "lock").write_text("process 7 on another-host")
    waits = []
    monkeypatch.setattr(runtime.time, "sleep", lambda seconds: waits.append(seconds) or len(waits) < 3 or held.close())
    runtime.RunLock(tmp_path).close()
    assert len(waits) == 3
    assert capsys.readouterr().err.count("locked by process 7 on another-host; waiting") == 1
    held = runtime.RunLock(tmp_path)
    (tmp_path / "lock").write_text("process 7 on another-host")
    monkeypatch.setattr(runtime, "LOST_HOST_S", 0)
    monkeypatch.setattr(runtime.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="If that host is gone, remove .*lock"):
        runtime.RunLock(tmp_path)
    held.close()


def test_one_trainer_a_folder(tmp_path):
    first = runtime.RunLock(tmp_path)
    with pytest.raises(UserError, match=f"another process trains in this folder \\(process {os.getpid()} on"):
        runtime.RunLock(tmp_path)
    first.close()
    runtime.RunLock(tmp_path).close()


def test_the_environment_is_recorded():
    world = runtime.World(0, 1, 0, 1, torch.device("cpu"))
    about = runtime.environment(world)
    assert about["packages"]["torch"] in (torch.__version__.split("+")[0], torch.__version__)
    assert about["cores"] >= 1 and about["device"] == "cpu" and json.dumps(about)


def test_bf16_is_slow_where_the_cpu_has_no_wide_vectors_for_it():
    flags = Path("/proc/cpuinfo").read_text()
    if platform.machine() == "x86_64":
        assert runtime.is_slow("bf16", torch.device("cpu")) == ("avx512bw" not in flags)
    assert not runtime.is_slow("fp32", torch.device("cpu")) and not runtime.is_slow("bf16", torch.device("cuda"))


def test_after_an_error_under_nccl_and_a_second_ctrl_c_the_process_ends_with_its_message(monkeypatch, capsys):
    def ended(code):
        raise SystemExit(code)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: pytest.fail("it would wait for the others"))
    monkeypatch.setattr(os, "_exit", ended)
    for error, backend, code, words in ((UserError("the disk is full"), "nccl", 2, "the disk is full"),
                                        (ZeroDivisionError("x"), "nccl", 1, "ZeroDivisionError: x"),
                                        (KeyboardInterrupt(), "gloo", 130, "interrupted")):  # fmt: skip
        monkeypatch.setattr(torch.distributed, "get_backend", lambda name=backend: name)
        with pytest.raises(SystemExit) as left, contextlib.ExitStack() as leaving:
            leaving.push(runtime.leave)
            raise error
        assert left.value.code == code and words in capsys.readouterr().err
    left_in_order = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left_in_order.append(True))
    with contextlib.ExitStack() as leaving:
        leaving.push(runtime.leave)
    assert left_in_order == [True]


def test_a_run_in_fp16_predicts_in_fp32_on_a_cpu(job):
    job(0)
    assert [runtime.precision_here(name) for name in ("fp16", "bf16", "fp32")] == ["fp32", "bf16", "fp32"]
    job(1)
    assert runtime.precision_here("fp16") == "fp16"
    job(1, ACCELERATE_USE_CPU="true")
    assert runtime.precision_here("fp16") == "fp32"


@pytest.mark.parametrize("env, told", [
    ({}, True), ({"CUDA_VISIBLE_DEVICES": "0"}, True), ({"CUDA_VISIBLE_DEVICES": ""}, False),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, False), ({"ACCELERATE_USE_CPU": "true"}, False),
])  # fmt: skip
def test_a_run_on_the_cpu_tells_of_a_driver_of_gpus_unless_they_are_hidden(tmp_path, monkeypatch, env, told):
    (tmp_path / "version").touch()
    monkeypatch.setattr(runtime, "DRIVER", str(tmp_path / "version"))
    assert runtime._is_gpu_expected(env) == told
    world = runtime.World(0, 2, 0, 2, torch.device("cpu"), misses_gpu=told)
    assert runtime.where(world).startswith("2 ranks on the CPU") and ("doctor says why" in runtime.where(world)) == told
    monkeypatch.setattr(runtime, "DRIVER", str(tmp_path / "absent"))
    assert not runtime._is_gpu_expected(env)


def test_a_disk_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(runtime.fcntl, "flock", refuse)
    runtime.RunLock(tmp_path).close()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err
