"""The doctor: what it says of machines that are well, slow and broken, made up here; and of this one."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

from dist_train import control_groups, decode, doctor
from dist_train.launch_traps import launch_traps

INSTALLED = {"torch": "2.15.0", "torchvision": "0.29.2", "accelerate": "1.15.0", "numpy": "2.4.6"}


def test_versions_are_held_against_requirements_torchvision_and_the_tested_ones():
    required = ["torch!=2.13.*,>=2.11", "numpy>=2.0", 'pytest>=8; extra == "dev"']
    of_vision = ["torch (>=2.14.0)", "pillow"]

    def states(installed, required=required, tested=None):
        return [(f.state, f.found) for f in doctor.versions(installed, required, of_vision, tested or {})]

    assert states(INSTALLED) == [("good", "torch 2.15.0, torchvision 0.29.2, accelerate 1.15.0")]
    assert states(INSTALLED | {"torch": "2.13.1"})[0] == ("broken", "torch is 2.13.1; expected !=2.13.*,>=2.11; "
        "torchvision 0.29.2 was built for torch>=2.14.0, not 2.13.1")  # fmt: skip
    assert states({"torch": "2.15.0+cu130"})[0] == ("broken", "numpy is missing; expected >=2.0")
    assert states(INSTALLED, tested={"torch": "2.15.0", "numpy": "2.3.0", "absent": "1"})[-1] == (
        "note", "torch 2.15.0, torchvision 0.29.2, accelerate 1.15.0; not the tested versions: numpy 2.4.6 (tested: 2.3.0)",
    )  # fmt: skip
    assert states(INSTALLED | {"torch": "2.15.0+cpu"}, tested={"torch": "2.15.0"})[-1][0] == "good"
    assert states(INSTALLED, required=[])[0][0] == "broken"


def groups(root: Path, own: str, **files: str) -> dict:
    """Control groups in a folder. own: as /proc/self/cgroup; files: their texts by path."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    root.mkdir(exist_ok=True)
    (root / "own").write_text(own)
    return {"root": root, "own": root / "own"}


def test_the_strictest_limit_of_all_levels_of_control_groups_counts(tmp_path):
    new = "0::/system.slice/slurmd/job_7/step_0\n"
    job = "system.slice/slurmd/job_7"
    assert control_groups.cpu_quota(**groups(tmp_path / "a", new)) is None
    assert control_groups.cpu_quota(**groups(tmp_path / "a", new, **{"cpu.max": "max 100000"})) is None
    assert control_groups.cpu_quota(**groups(tmp_path / "a", new, **{"cpu.max": "250000 100000"})) == 2.5
    assert control_groups.cpu_quota(**groups(tmp_path / "a", new, **{f"{job}/cpu.max": "150000 100000"})) == 1.5
    assert control_groups.cpu_quota(**groups(tmp_path / "a", "0::/elsewhere\n")) == 2.5
    old = "4:memory:/slurm/job_7\n3:cpu,cpuacct:/slurm/job_7/step_0\n0::/\n"
    quota = {"cpu/slurm/job_7/cpu.cfs_quota_us": "400000", "cpu/slurm/job_7/cpu.cfs_period_us": "100000"}
    assert control_groups.cpu_quota(**groups(tmp_path / "b", old, **quota)) == 4
    assert control_groups.cpu_quota(**groups(tmp_path / "b", old, **{"cpu/slurm/job_7/cpu.cfs_quota_us": "-1"})) is None

    memory = {"memory.max": "max", f"{job}/memory.max": "2000", f"{job}/step_0/memory.max": "max"}
    assert control_groups.memory_limit(**groups(tmp_path / "c", new, **memory)) == 2000
    use = {f"{job}/memory.current": "1500", f"{job}/memory.stat": "anon 700\ninactive_file 300"}
    assert control_groups.free_memory(**groups(tmp_path / "c", new, **use)) == 800
    assert control_groups.memory_limit(**groups(tmp_path / "d", new)) is None
    assert control_groups.free_memory(**groups(tmp_path / "d", new)) is None
    limits = {"memory/memory.limit_in_bytes": "9000", "memory/slurm/job_7/memory.limit_in_bytes": "3000"}
    use = {"memory/slurm/job_7/memory.usage_in_bytes": "2900", "memory/slurm/job_7/memory.stat": "total_inactive_file 400"}
    assert control_groups.memory_limit(**groups(tmp_path / "e", old, **limits)) == 3000
    assert control_groups.free_memory(**groups(tmp_path / "e", old, **use)) == 500


def test_a_containers_share_of_the_cores_is_told():
    slow = doctor.cores(64, 2.5)
    assert slow.state == "slow" and "64 cores" in slow.found and "runtime.threads 2" in slow.advice
    assert doctor.cores(4, 4.0).state == doctor.cores(4, None).state == "good"


@pytest.mark.parametrize(("flags", "state", "said"), [
    ("fpu avx2 avx512f avx512_bf16 amx_bf16", "good", "amx_bf16, avx512_bf16"), ("fpu avx2", "note", "avx2 without bf16 units"),
    ("fpu avx2 avx512f", "note", "avx512f without bf16"), ("fpu sse4_2", "slow", "neither"),
])  # fmt: skip
def test_whether_bf16_is_fast_follows_from_the_processors_flags(flags, state, said):
    cpuinfo = f"processor\t: 0\nmodel name\t: Some CPU @ 2 GHz: fast\nflags\t\t: {flags}\nbugs\t:\n"
    found = doctor.processor(cpuinfo)
    assert found.state == state and said in found.found and found.found.startswith("Some CPU @ 2 GHz: fast")
    assert doctor.processor("Features\t: asimd bf16\n").state == "good"  # ARM


def test_memory_allocator_and_open_files():
    meminfo = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\nHugePages_Total: 0\n"
    assert doctor.memory(meminfo, None).found == "8.2 of 16.4 GB memory are free"
    assert "may use 2.0 GB" in doctor.memory(meminfo, 2_000_000_000).found
    assert doctor.allocator(True, "always [madvise] never").state == "good"
    assert doctor.allocator(True, "always madvise [never]").state == doctor.allocator(False, "").state == "slow"
    assert doctor.open_files(4096) == ("good", "4,096 open files allowed", "")
    assert doctor.open_files(resource.RLIM_INFINITY).state == "good"
    assert doctor.open_files(1024).found == "1,024 open files allowed; sets of many shards need 2,048"
    assert "hard limit" in doctor.open_files(1024).advice
    assert doctor.shared_memory(64_000_000).state == "slow" and doctor.shared_memory(8_000_000_000).state == "good"


def test_the_cache_needs_room_locks_and_a_disk_of_its_own(tmp_path, monkeypatch):
    cache = tmp_path / "not" / "yet"
    assert doctor.cache_folder(cache, "").state in ("good", "note") and not cache.exists()
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
    on_network = doctor.cache_folder(cache, mounts)
    assert on_network.state == "slow" and "(nfs4)" in on_network.found and "data.cache_dir" in on_network.advice
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * 10**9))
    assert "data.cache_gb 18 at most" in doctor.cache_folder(cache, "").advice

    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(doctor.fcntl, "flock", no_locks)
    assert doctor.cache_folder(cache, "").state == "broken"


def test_a_missing_native_decoder_is_slow_and_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(decode, "native_core", lambda: decode.NativeCore(missing="no module; none at all"))
    *portable, slow = doctor.decoding()
    assert {found.state for found in portable} == {"good"} and portable[0].found.startswith("jpeg: simplejpeg")
    assert slow[:2] == ("slow", "native decoder: missing (no module; none at all)")
    assert "libjpeg-dev" in slow.advice and "a C compiler" in doctor._native_advice(None)


@pytest.mark.parametrize(("has_checksum", "state"), [(True, "good"), (False, "note")])
def test_a_native_core_built_without_the_header_of_xxhash_is_noted(monkeypatch, has_checksum, state):
    monkeypatch.setattr(decode, "native_core", lambda: decode.NativeCore("", "AVX2", "3.1", has_checksum))
    jpeg, others, checksum = doctor.decoding()
    assert jpeg.found == "jpeg: native core (AVX2) and libjpeg-turbo (built with 3.1)" and jpeg.state == others.state == "good"
    assert checksum.state == state and ("libxxhash-dev" in checksum.advice) == (not has_checksum)


def test_packages_tracking_and_slurm(tmp_path):
    notes = list(doctor.optional_packages(lambda name: name not in ("obstore", "onnxscript", "timm")))
    assert notes == [
        ("note", "obstore is not installed: shards on s3://, gs:// and az://", "pip install 'dist_train[remote]'"),
        ("note", "onnxscript is not installed: exported networks as ONNX", "pip install 'dist_train[export]'"),
        ("note", "timm is not installed: model.name timm/NAME", "pip install 'dist_train[timm]'"),
    ]
    assert [note.state for note in doctor.optional_packages(lambda name: True)] == ["good"] * 3
    nobody = {"HOME": str(tmp_path)}
    assert "run folder" in doctor.tracking(nobody).found
    assert "online" in doctor.tracking(nobody | {"WANDB_API_KEY": "x" * 40}).found
    assert doctor.tracking(nobody | {"WANDB_MODE": "online"}).state == "broken"
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2"}
    assert doctor.slurm(job, True).found == "SLURM: inside job 7, 2 nodes, 16 tasks"
    assert "not on this machine" in doctor.slurm({}, False).found


TRAPS = {
    "cpu, several": ({"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}, 0, {}, "starts one process, not 2"),
    "no, several": ({"distributed_type": False, "num_processes": 4}, 4, {}, "starts one process, not 4"),
    "each alone": ({"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True}, 0, {}, "train alone"),
    "too few GPUs": ({"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2, "main_process_ip": "h"}, 4, {},
                     "8 processes on this machine, but 4 GPUs"),
    "FSDP on the CPU": ({"distributed_type": "FSDP", "num_processes": 1}, 0, {"ACCELERATE_USE_CPU": "true"}, "FSDP"),
    "precision": ({"mixed_precision": "bf16"}, 1, {}, "mixed_precision is bf16"),
    "no address": ({"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 2}, 1, {}, "no main_process_ip"),
    "dynamo": ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, 1, {}, "dynamo_backend INDUCTOR"),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_of_accelerates_settings_are_told(trap):
    settings, num_gpus, env, said = TRAPS[trap]
    found = launch_traps(settings, num_gpus, env)
    assert len(found) == 1 and said in found[0][0] and found[0][1]


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("launch/accelerate/*.yaml"), ROOT / "accelerate_config.yaml"]), ids=lambda p: p.stem
)
def test_our_own_settings_hold_no_trap_where_they_belong(path):
    settings = yaml.safe_load(path.read_text())
    env = {"ACCELERATE_USE_CPU": "true"} if path.stem.startswith("cpu") else {}
    assert launch_traps(settings, 8, env) == []


def test_a_settings_file_that_cannot_be_read_is_broken(tmp_path):
    (tmp_path / "a.yaml").write_text("num_processes: many\n")
    (tmp_path / "b.yaml").write_text("- a\n")
    for name in ("a.yaml", "b.yaml", "absent.yaml"):
        assert [f.state for f in doctor.accelerate_settings(tmp_path / name, 0, {})] == ["broken"]


def test_the_exit_code_is_one_where_something_is_broken(monkeypatch, capsys):
    findings = [doctor.Finding("good", "fine"), doctor.Finding("slow", "lame", "do this\nand that")]
    monkeypatch.setattr(doctor, "look_around", lambda *args: iter(findings))
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == "good    fine\nslow    lame\n        do this\n        and that\n\n1 could be faster.\n"
    findings.append(doctor.Finding("broken", "gone"))
    assert doctor.main([]) == 1
    assert "1 broken, 1 could be faster." in capsys.readouterr().out


def test_this_machine_is_looked_at_and_torch_comes_last(capsys):
    assert doctor.main([]) in (0, 1)
    said = capsys.readouterr().out
    words = ("Python ", "torch ", "cores", "memory", "open files", "jpeg: ", "shard cache", "SLURM", "GPU")
    order = [said.index(word) for word in words]
    assert order == sorted(order)


def test_an_installation_that_was_cut_short_is_noted(tmp_path, monkeypatch):
    (tmp_path / "foo-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    findings = doctor.look_around(None, str(tmp_path))
    notes = [next(findings) for _ in range(3)]
    assert any("foo-1.0.dist-info" in note.found and "cut short" in note.found for note in notes)
