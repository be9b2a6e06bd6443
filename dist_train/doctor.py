"""`dist-train doctor`: what this machine has, what is broken, and what costs speed, with what to do about it."""

import argparse
import ctypes
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dist_train.control_groups import cpu_quota, memory_limit, text_of
from dist_train.shard_cache import DEFAULT_GB, default_folder
from dist_train.store import MAX_OPEN
from dist_train.workers import cores_to_run_on

_NETWORK_DISKS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "glusterfs", "9p", "afs", "fuse.sshfs")
_SOFTWARE = ("torch", "torchvision", "accelerate")


class Finding(NamedTuple):
    """One line. state: good, slow (it works, but costs speed), broken (something will fail), or note."""

    state: str
    found: str
    advice: str = ""


def main(argv: list[str]) -> int:
    """`dist-train doctor [--accelerate FILE] [--cache-dir DIR]`: print every finding as it is made; 1 if anything is broken."""
    parser = argparse.ArgumentParser("dist-train doctor", description="What this machine has, lacks, and what costs speed.")
    parser.add_argument("--accelerate", metavar="FILE", help="accelerate's settings to look at; default accelerate_config.yaml")
    parser.add_argument("--cache-dir", default="", metavar="DIR", help="where shards behind URLs would be kept, as data.cache_dir")
    options = parser.parse_args(argv)
    states = []
    for finding in look_around(options.accelerate, options.cache_dir):
        print(f"{finding.state:7} {finding.found}", flush=True)
        for line in finding.advice.splitlines():
            print(f"        {line}", flush=True)
        states.append(finding.state)
    broken, slow = states.count("broken"), states.count("slow")
    words = [f"{broken} broken"] * bool(broken) + [f"{slow} could be faster"] * bool(slow)
    print(f"\n{', '.join(words) or 'all well'}.")
    return 1 if broken else 0


def look_around(accelerate_file: str | None, cache_dir: str) -> Iterator[Finding]:
    """All findings, the quick ones first; torch is loaded for the last."""
    system = f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}"
    yield Finding("good", f"Python {platform.python_version()}, {system}")
    found = [(d.metadata["Name"], getattr(d, "_path", d), d) for d in importlib.metadata.distributions()]
    yield from (Finding("note", f"{path}: left by an installation that was cut short") for name, path, _ in found if not name)
    installed = {name.lower().replace("_", "-"): d.version for name, _, d in found if name}
    yield from versions(installed, _requirements("dist-train"), _requirements("torchvision"), _tested_versions())
    quota = cpu_quota()
    yield cores(len(cores_to_run_on()), quota)
    yield processor(text_of("/proc/cpuinfo"))
    yield memory(text_of("/proc/meminfo"), memory_limit())
    yield allocator(hasattr(_libc(), "mallopt"), text_of("/sys/kernel/mm/transparent_hugepage/enabled"))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield from decoding()
    yield cache_folder(default_folder(cache_dir), text_of("/proc/mounts"))
    yield from optional_packages(lambda name: importlib.util.find_spec(name) is not None)
    yield tracking(os.environ)
    yield slurm(os.environ, bool(shutil.which("sbatch")))
    gpus = list(devices(text_of("/proc/driver/nvidia/version")))
    yield from gpus
    num_gpus = sum(finding.found.startswith("GPU ") for finding in gpus)
    if num_gpus > 1:
        yield shared_memory(_disk_bytes("/dev/shm"))
    file = Path(accelerate_file or "accelerate_config.yaml")
    if accelerate_file or file.exists():
        yield from accelerate_settings(file, num_gpus, os.environ)


def versions(
    installed: dict[str, str], required: list[str], of_torchvision: list[str], tested: dict[str, str]
) -> Iterator[Finding]:
    """Packages against what dist_train requires and torchvision expects of torch, and what the tests passed with."""
    from packaging.requirements import Requirement

    if not required:
        yield Finding("broken", "dist_train is not installed, only lies here", "pip install -e . in its folder")
    wrong = []
    for line in required:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        found = installed.get(need.name.lower().replace("_", "-"))
        if found is None or not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name} is {found or 'missing'}; expected {need.specifier}")
    for need in map(Requirement, of_torchvision):
        found = installed.get(need.name)
        if need.name == "torch" and found and not need.specifier.contains(found, prereleases=True):
            wrong.append(f"torchvision {installed.get('torchvision')} was built for torch{need.specifier}, not {found}")
    if wrong:
        yield Finding("broken", "; ".join(wrong), "pip install -c constraints.txt -e .")
    have = ", ".join(f"{name} {installed[name]}" for name in _SOFTWARE if name in installed)
    other = [f"{name} {installed[name]} (tested: {version})" for name, version in tested.items()
             if name in installed and installed[name].partition("+")[0] != version]  # fmt: skip
    yield Finding("good", have) if not other else Finding("note", f"{have}; not the tested versions: {', '.join(other)}")


def cores(num_cores: int, quota: float | None) -> Finding:
    """quota: cores' worth of time that the container or job may use, if it is limited."""
    if quota and quota < num_cores - 0.5:
        threads = max(1, int(quota))
        return Finding("slow", f"{num_cores} cores are visible, but the container or job may use {quota:g} of them",
                       f"data.threads and runtime.threads {threads}, or ask for more cores")  # fmt: skip
    return Finding("good", f"{num_cores} cores for this process")


def processor(cpuinfo: str) -> Finding:
    """Which vector units there are, and whether bf16 is worth trying on them. cpuinfo: of /proc."""
    lines = dict([part.strip() for part in line.split(":", 1)] for line in cpuinfo.splitlines() if ":" in line)
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    name = lines.get("model name", platform.machine())
    fast = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    if fast:
        return Finding("good", f"{name}: {', '.join(fast)}, so train.precision bf16 is fast on this CPU too")
    vectors = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "")
    if not vectors:
        return Finding("slow", f"{name}: neither AVX2 nor AVX-512 nor NEON", "train on another machine; keep fp32 here")
    return Finding("note", f"{name}: {vectors} without bf16 units, so on this CPU train.precision bf16 is far slower than fp32")


def memory(meminfo: str, limit_bytes: int | None) -> Finding:
    """meminfo: of /proc. limit_bytes: the container's or job's, if it has one."""
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if len(line.split()) > 1}
    total, free = kilobytes.get("MemTotal", 0) * 1024, kilobytes.get("MemAvailable", 0) * 1024
    limited = f"; the container or job may use {limit_bytes / 1e9:,.1f} GB" if limit_bytes and limit_bytes < total else ""
    return Finding("good", f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB memory are free{limited}")


def allocator(has_mallopt: bool, huge_pages: str) -> Finding:
    """huge_pages: of /sys/kernel/mm/transparent_hugepage/enabled, where the choice stands in brackets."""
    if not has_mallopt:
        return Finding("slow", "the C library is not glibc: freed memory goes back to the system at every step",
                       "on the CPU, preload an allocator that keeps it: LD_PRELOAD=libtcmalloc.so.4")  # fmt: skip
    if "[never]" in huge_pages:
        return Finding("slow", "allocator: glibc, tuned by the run; transparent huge pages are off",
                       "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled   (as root; matters on the CPU)")  # fmt: skip
    return Finding("good", "allocator: glibc, tuned by the run" + ", with huge pages" * bool(huge_pages))


def open_files(hard: int) -> Finding:
    """The limit of open files up to which a reader raises its own; it keeps up to MAX_OPEN shards open."""
    least = 4 * MAX_OPEN  # batches ahead hold theirs besides
    if hard == resource.RLIM_INFINITY or hard >= least:
        return Finding("good", f"{'any number of' if hard == resource.RLIM_INFINITY else f'{hard:,}'} open files allowed")
    what = f"{hard:,} open files allowed; sets of many shards need {least:,}"
    return Finding("broken", what, "ask for a higher hard limit (ulimit -Hn)")


def decoding() -> Iterator[Finding]:
    """Which decoder serves which format; what would make it faster."""
    from dist_train.decode import decoders, native_core

    core = native_core()
    for what, how in decoders().items():
        lacks_header = what == "checksum" and not core.missing and not core.has_checksum
        advice = "with libxxhash-dev (Fedora: xxhash-devel) and pip install again, the native core has its own"
        if what != "native":
            yield Finding("note" if lacks_header else "good", f"{what}: {how}", advice if lacks_header else "")
    if core.missing:
        compiler = shutil.which("cc") or shutil.which("gcc")
        yield Finding("slow", f"native decoder: missing ({core.missing})", _native_advice(compiler))


def _native_advice(compiler: str | None) -> str:
    header = any(Path(folder, "jpeglib.h").exists() for folder in ("/usr/include", "/usr/local/include", f"{sys.prefix}/include"))
    has_python = Path(sysconfig.get_path("include"), "Python.h").exists()
    lacking = ["a C compiler"] * (not compiler) + ["Python.h"] * (not has_python)
    lacking += ["jpeglib.h of libjpeg-turbo, 2.0.6 or newer"] * (not header)
    return (
        f"2.5 times as fast with it on photographs, 4 to 15 times on small pictures; "
        f"lacking: {' and '.join(lacking) or 'nothing'}. Debian, Ubuntu: apt install gcc python3-dev "
        f"libjpeg-dev libxxhash-dev;\nFedora: dnf install gcc python3-devel libjpeg-turbo-devel xxhash-devel; conda: gcc "
        f"libjpeg-turbo xxhash. Then pip install again"
    )


def cache_folder(folder: Path, mounts: str) -> Finding:
    """Whether shards behind URLs can be kept there: room, rights, locks, a disk of this machine. mounts: of /proc."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = shutil.disk_usage(there).free
    except PermissionError as error:
        return Finding("broken", f"shard cache {folder}: {error.strerror}", "data.cache_dir: a folder you may write to")
    except OSError as error:
        return Finding("broken", f"shard cache {folder}: no files with locks there ({error.strerror})",
                       "data.cache_dir: a folder on a disk of this machine")  # fmt: skip
    kind = _disk_kind(there, mounts)
    what = f"shard cache {folder}: {free / 1e9:,.1f} GB free, files can be locked"
    if kind in _NETWORK_DISKS:
        return Finding("slow", f"{what}; it lies on a network disk ({kind})", "data.cache_dir: a disk of this machine")
    if free < DEFAULT_GB * 1e9:
        most = max(1, int(free / 1e9 * 0.9))
        return Finding("note", what, f"sets behind URLs: data.cache_gb {most} at most (default {DEFAULT_GB:g})")
    return Finding("good", what)


def _disk_kind(path: Path, mounts: str) -> str:
    rows = [line.split()[1:3] for line in mounts.splitlines() if len(line.split()) > 2]
    holding = [(place, kind) for place, kind in rows if path.resolve().is_relative_to(place)]
    return max(holding, key=lambda row: len(row[0]))[1] if holding else ""


def optional_packages(is_installed) -> Iterator[Finding]:
    """What else could be installed, and what for. is_installed: name -> bool."""
    uses = {"remote": (("obstore",), "shards on s3://, gs:// and az://"),
            "export": (("onnx", "onnxscript", "onnxruntime"), "exported networks as ONNX"),
            "timm": (("timm",), "model.name timm/NAME")}  # fmt: skip
    for extra, (names, use) in uses.items():
        missing = [name for name in names if not is_installed(name)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            yield Finding("note", f"{', '.join(missing)} {verb} not installed: {use}", f"pip install 'dist_train[{extra}]'")
        else:
            yield Finding("good", f"{', '.join(names)}: {use}")


def tracking(env: Mapping[str, str]) -> Finding:
    """Where figures would go with track.wandb auto; the server is not asked."""
    from dist_train.errors import UserError
    from dist_train.wandb_log import wandb_mode

    try:
        mode = wandb_mode("auto", env)
    except UserError as error:
        return Finding("broken", f"Weights & Biases: {error.args[0].splitlines()[0]}", "wandb login, or WANDB_MODE=offline")
    says = {"online": "online, an API key is there", "offline": "recorded in the run folder (no API key, or WANDB_MODE says so)"}
    return Finding("good", f"Weights & Biases: {says.get(mode, mode)}")


def slurm(env: Mapping[str, str], has_sbatch: bool) -> Finding:
    """Whether SLURM is there, and whether this is one of its jobs."""
    if "SLURM_JOB_ID" in env:
        tasks = env.get("SLURM_NTASKS") or env.get("SLURM_NPROCS") or "1"
        nodes = env.get("SLURM_JOB_NUM_NODES", "1")
        return Finding("good", f"SLURM: inside job {env['SLURM_JOB_ID']}, {nodes} nodes, {tasks} tasks")
    found = "sbatch is there; launch/train.sbatch starts jobs" if has_sbatch else "not on this machine"
    return Finding("good", f"SLURM: {found}")


def devices(driver: str) -> Iterator[Finding]:
    """GPUs that torch sees. driver: of /proc/driver/nvidia/version, empty without one."""
    if importlib.util.find_spec("torch") is None:
        return  # told above
    import torch

    version = driver.split("Kernel Module")[-1].split()[0] if "Kernel Module" in driver else ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    if not torch.cuda.is_available():
        if version and not built:
            yield Finding("broken", f"driver {version}, but torch {torch.__version__} is built for CPUs alone",
                          "install torch's CUDA build")  # fmt: skip
        elif version:
            chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            yield Finding("broken", f"driver {version}, but torch ({built}) sees no GPU",
                          f"CUDA_VISIBLE_DEVICES is {chosen}; a driver as new as that CUDA is needed")  # fmt: skip
        else:
            yield Finding("note", "no GPU; training runs on the CPU")
        return
    for k in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(k)
        has_bf16 = (about.major, about.minor) >= (8, 0)
        precision = "bf16 and TF32" if has_bf16 else "fp16, no fast bf16"
        yield Finding("good", f"GPU {k}: {about.name}, {about.total_memory / 1e9:,.0f} GB, {precision} "
                              f"({built}, driver {version or '?'})")  # fmt: skip


def shared_memory(num_bytes: int) -> Finding:
    """/dev/shm: NCCL passes data between the GPUs of a machine through it."""
    if num_bytes < 1e9:
        return Finding("slow", f"/dev/shm has {num_bytes / 1e6:,.0f} MB; NCCL wants it for several GPUs",
                       "docker run --shm-size=8g")  # fmt: skip
    return Finding("good", f"/dev/shm has {num_bytes / 1e9:,.1f} GB")


def accelerate_settings(file: Path, num_gpus: int, env: Mapping[str, str]) -> Iterator[Finding]:
    """What a settings file of accelerate would start here, where that is not what it seems to say."""
    import yaml

    from dist_train.launch_traps import launch_traps

    try:
        settings = yaml.safe_load(file.read_text()) or {}
        traps = launch_traps(settings, num_gpus, env)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        yield Finding("broken", f"{file}: cannot be read: {str(error).splitlines()[0]}", "compare launch/accelerate/gpu-1.yaml")
        return
    for found, advice in traps:
        yield Finding("broken", f"{file}: {found}", advice)
    if not traps:
        processes, machines = settings.get("num_processes", 1), settings.get("num_machines", 1)
        yield Finding("good", f"{file}: starts what it says; processes: {processes}, machines: {machines}")


def _requirements(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _tested_versions() -> dict[str, str]:
    """constraints.txt beside the package, where it lies in its repository."""
    lines = text_of(Path(__file__).parents[1] / "constraints.txt").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def _disk_bytes(path: str) -> int:
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return 0


def _libc():
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None
