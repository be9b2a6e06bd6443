"""The process among others: start-up guards, device, ranks, stop requests, the record of the environment.

The only file that reads what a launcher put into the environment, but for the rank that an error names.
"""

import contextlib
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dist_train.errors import UserError, tell
from dist_train.ranks import cores_of_rank, tell_end
from dist_train.remote import shown
from dist_train.watch import is_lost_contact
from dist_train.workers import num_cores

EXIT_STOPPED = 85  # stopped on request, a checkpoint is written, `--resume` goes on
DRIVER = "/proc/driver/nvidia/version"
LOST_HOST_S = 120  # in which a server of NFSv4 gives up the locks of a host that is gone; its lease is 90 s by default


@dataclass(frozen=True)
class World:
    """This process among all. device is the torch device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: object
    num_cores: int = 1  # for its threads
    misses_gpu: bool = False  # it computes on the CPU, unasked, where a driver of GPUs is

    @property
    def place(self) -> tuple[int, int, int]:
        """(rank, world size, ranks of this machine), as `data.open_stream` takes it."""
        return self.rank, self.world_size, self.local_world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def is_slow(precision: str, device) -> bool:
    """Whether the device does this precision without instructions for it: bf16 on a CPU, hundreds of times slower than fp32."""
    import torch

    return precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def where(world: World) -> str:
    """Ranks and device in words, "8 ranks on NVIDIA H100"; and what to look at where a GPU's driver is there and not in use."""
    import torch

    on_gpu = world.device.type == "cuda"
    words = f"{world.world_size} {'rank' if world.world_size == 1 else 'ranks'} on "
    words += torch.cuda.get_device_name(world.device) if on_gpu else "the CPU"
    return words + (", though this machine has a driver of GPUs: dist-train doctor says why" if world.misses_gpu else "")


def start(precision: str, threads: int, timeout_s: int, deterministic: bool = False):
    """Start Accelerate and the process group; return (accelerator, world).

    precision: fp32, bf16 or fp16. deterministic: as runtime.deterministic. Raises UserError where the launcher's idea of the job
    differs from what was started: several processes that are each alone, more processes than GPUs, a precision that contradicts
    the recipe's.
    """
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    keep_freed_pages()
    env = os.environ
    world_size, local_rank = int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
    _refuse_lonely_launch(world_size)
    use_cpu = _computes_on_cpu()
    if not use_cpu and local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{local_world_size} processes on this machine, but {torch.cuda.device_count()} GPUs are visible.\n"
            f"  Start as many processes as GPUs (under SLURM ask with --gpus-per-node, not --gpus-per-task or --gpu-bind), "
            f"or put ACCELERATE_USE_CPU=true before the command to use the CPU."
        )
    if world_size > 1 and use_cpu and not _asks_for_cpu(env):
        raise UserError(
            f"WORLD_SIZE is {world_size} but this process would be alone: the launcher asked for GPUs and none is visible.\n"
            f"  Use launch/local.sh --cpu {world_size}, or put ACCELERATE_USE_CPU=true before the command."
        )
    if use_cpu and precision == "fp16":
        raise UserError("train.precision is fp16, which needs a GPU; on the CPU use fp32, or bf16 where the CPU has it.")
    asked = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision.replace("fp32", "no")):
        raise UserError(
            f"the launcher asks for mixed precision {asked}, the recipe for train.precision: {precision}.\n"
            f"  Precision changes results, so it belongs to the recipe: leave it out of accelerate's configuration."
        )
    for word, name, setting in (("1", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "train.micro_batch_size"),
                                ("no", "ACCELERATE_DYNAMO_BACKEND", "train.compile")):  # fmt: skip
        if env.get(name, word).lower() not in (word, ""):
            raise UserError(
                f"the launcher sets {name} to {env[name]}, which would change the training behind the recipe's back.\n"
                f"  Leave it out of accelerate's configuration and set {setting} in the recipe."
            )
    misses_gpu = use_cpu and _is_gpu_expected(env)
    env["ACCELERATE_USE_CPU"] = "true" if use_cpu else "false"  # without it, ranks on the CPU would each be alone
    # set, or Accelerate would choose a number, and warn
    env["OMP_NUM_THREADS"] = str(threads or max(1, num_cores() // local_world_size))
    if deterministic and not use_cpu:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it; without effect on the CPU
    try:
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=precision.replace("fp32", "no"),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
                # static_graph takes as long (docs/scaling.md), and would rule out frozen layers and micro-batches
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        if accelerator.num_processes != world_size:
            raise UserError(
                f"WORLD_SIZE is {world_size} but Accelerate counts {accelerator.num_processes} processes: each would train "
                f"alone.\n  Use launch/local.sh, or accelerate launch with a configuration from launch/accelerate/."
            )
        world = World(accelerator.process_index, world_size, local_rank, local_world_size, accelerator.device)
        world = replace(world, num_cores=cores_of_rank(world), misses_gpu=misses_gpu)  # the first message between the ranks
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        raise UserError(
            f"the {world_size} ranks did not meet at {master_address()}:{env.get('MASTER_PORT')} within {timeout_s} s: "
            f"{str(error).splitlines()[0]}\n  Look for the last words of the rank that is missing, and whether that port "
            f"can be reached from every host. Slow starts of many ranks: raise runtime.timeout_s."
        ) from error
    # shapes are few, and stay: the fastest kernel is found by trial
    torch.backends.cudnn.benchmark = accelerator.device.type == "cuda" and not deterministic
    env["OMP_NUM_THREADS"] = str(threads or world.num_cores)
    torch.set_num_threads(threads or world.num_cores)
    return accelerator, world


def precision_here(precision: str) -> str:
    """A run's precision, or fp32 where that is fp16 and the CPU computes: the weights are fp32 in any case."""
    return "fp32" if precision == "fp16" and _computes_on_cpu() else precision


def _computes_on_cpu() -> bool:
    import torch

    return _asks_for_cpu(os.environ) or not torch.cuda.is_available()


def num_launched() -> int:
    """Ranks of the job, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def master_address() -> str:
    """Where rank zero is, as the launcher says."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def end() -> None:
    """Leave the process group in order; leaving without it sometimes aborts."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(kind, error: BaseException | None, trace) -> None:
    """Leave the process group; what an ExitStack calls at its end.

    After an error under NCCL, the process ends here, with its message and exit code: the group can be left in order only
    once the other ranks have come out of their collective, which waits for this rank. So it does after a second Ctrl-C, which
    breaks off what cannot be broken off in order: native threads outlive it, and the interpreter's end would abort.
    """
    import torch.distributed as dist

    is_grouped = dist.is_available() and dist.is_initialized()
    if error is not None and is_grouped:
        tell_end(error)
    if error is not None and is_grouped and (isinstance(error, KeyboardInterrupt) or "nccl" in dist.get_backend()):
        code = tell(error)
        with contextlib.suppress(OSError):  # a reader that is gone
            sys.stdout.flush()
        os._exit(code)
    end()


def keep_freed_pages() -> None:
    """Make glibc keep freed memory instead of giving it back; call before the first large tensor.

    Freshly mapped gradient buffers cost a page fault every 4 KB, every step: as much time as the arithmetic of AlexNet
    on a CPU. Does nothing where the C library is another.
    """
    import ctypes

    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: transparent huge pages for large tensors


class StopRequests:
    """SIGTERM, SIGUSR1, SIGINT, SIGHUP, a file named `stop` in the run folder, or a launcher that is gone.

    Rank zero alone looks for the file: launch/train.sbatch, which asks who stopped the job, runs on its host, and hosts that share
    a network disk see a new file at different times. The handler only notes; the loop asks. A second SIGINT (Ctrl-C pressed
    again) ends the process at once. SIGHUP, of a terminal that is closed, stays ignored where nohup had it so.
    """

    def __init__(self, run_folder: Path):
        self._file = run_folder / "stop" if os.environ.get("RANK", "0") == "0" else None
        self._looked, self.reason = 0.0, ""
        # what a shell started may outlive it; nobody watches or ends what a launcher left behind
        self._parent = os.getppid() if _is_launched() else None
        heard = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        heard += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
        self._before = {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number, frame):
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name

    def __bool__(self) -> bool:
        now = time.monotonic()
        if not self.reason and now - self._looked > 1.0:  # a look at the file system once a second is enough
            self._looked = now
            if self._file and self._file.exists():
                self.reason = f"the file {self._file}"
            elif self._parent not in (None, os.getppid()):
                self.reason = "its launcher is gone"
        return bool(self.reason)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class RunLock:
    """Held by rank zero for as long as it trains in a run folder; the kernel lets go when the process ends.

    The server of a network disk may hold the lock of a host that is gone for a while: a lock from elsewhere is waited for.
    """

    def __init__(self, run_folder: Path):
        self._file = open(run_folder / "lock", "a+")  # noqa: SIM115
        began, told = time.monotonic(), ""
        try:
            while not self._is_mine():
                self._file.seek(0)
                holder = self._file.read().strip() or "unknown"
                if holder.endswith(f" on {platform.node()}") or time.monotonic() - began > LOST_HOST_S:
                    self._file.close()
                    raise UserError(
                        f"{run_folder}: another process trains in this folder ({holder}).\n  Wait for it, or take another folder "
                        f"with --run. If that host is gone, remove {run_folder / 'lock'}."
                    )
                if holder != told:
                    told = holder
                    where = f"{run_folder}: locked by {holder}"
                    print(f"{where}; waiting {LOST_HOST_S} s, in case that host is gone", file=sys.stderr)
                time.sleep(1)
        except OSError as error:  # a file system without locks: nobody can be told from another
            print(f"{run_folder}: cannot be locked ({error.strerror}): see to it that one training uses it.", file=sys.stderr)
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def _is_mine(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def close(self) -> None:
        self._file.close()


def environment(world: World) -> dict:
    """What a result may depend on: versions, hardware, threads, ranks, source revision. For environment.json."""
    import torch

    packages = ("torch", "torchvision", "accelerate", "webdataset", "wandb", "numpy", "pillow", "simplejpeg")
    num_gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    return {
        "command": " ".join(shown(word) for word in sys.argv),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in packages},
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(num_gpus)],
        "world_size": world.world_size,
        "device": str(world.device),
        "revision": _git_revision(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _asks_for_cpu(env) -> bool:
    return env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _is_gpu_expected(env) -> bool:
    is_hidden = env.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    return Path(DRIVER).exists() and not is_hidden and not _asks_for_cpu(env)


def _is_launched() -> bool:
    return num_launched() > 1 or bool(_words_of_accelerate())


def _words_of_accelerate() -> list[str]:
    """What followed `accelerate launch`, where that is the parent of this process; otherwise nothing."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no /proc on this system
        return []
    if "launch" not in words or not any("accelerate" in word for word in words[:3]):
        return []
    return words[words.index("launch") + 1 :]


def _refuse_lonely_launch(world_size: int) -> None:
    """`accelerate launch` for several CPU processes starts one without a word: compare with what it was asked for."""
    words = _words_of_accelerate() if world_size == 1 else []
    if not words:
        return
    words = words[: words.index("-m")] if "-m" in words else words
    options = dict(zip(words, words[1:], strict=False)) | dict(w.split("=", 1) for w in words if "=" in w)
    asked = options.get("--num_processes") or options.get("--num-processes") or options.get("-n")
    file = options.get("--config_file") or options.get("--config-file")
    if not file:
        from accelerate.commands.config.config_args import default_config_file as file
    if not asked and Path(file).exists():
        import yaml

        asked = (yaml.safe_load(Path(file).read_text()) or {}).get("num_processes")
    if asked and int(asked) > 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started one: that is what it does for --cpu and for "
            f"MULTI_CPU.\n  Use launch/local.sh --cpu {asked}, or launch/accelerate/cpu-2.yaml with ACCELERATE_USE_CPU=true."
        )


def version_of(package: str) -> str | None:
    """The version of a package that is installed; None without it."""
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
