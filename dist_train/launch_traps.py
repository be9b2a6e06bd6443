"""What `accelerate launch` would really start from a settings file, where that is not what the file seems to say."""

from collections.abc import Mapping


def launch_traps(settings: dict, num_gpus: int, env: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what would happen, what to write instead) for every trap in accelerate's settings (as of accelerate 1.15).

    settings: the file's. num_gpus: visible on this machine. Raises ValueError, TypeError or AttributeError where they are
    of other types than accelerate writes.
    """
    processes, machines = int(settings.get("num_processes") or 1), int(settings.get("num_machines") or 1)
    kind, use_cpu = str(settings.get("distributed_type", "NO")).upper(), settings.get("use_cpu") is True
    is_on_cpu = use_cpu or env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    here = -(-processes // machines)
    traps = []
    if processes > 1 and kind in ("MULTI_CPU", "NO", "FALSE"):  # YAML reads a bare NO as false
        traps.append((f"distributed_type {kind} starts one process, not {processes}",
                      "MULTI_GPU; on CPUs with ACCELERATE_USE_CPU=true before the command (launch/local.sh --cpu N)"))  # fmt: skip
    if processes > 1 and kind == "MULTI_GPU" and use_cpu:
        traps.append((f"use_cpu: true makes each of the {processes} processes train alone",
                      "use_cpu: false, and ACCELERATE_USE_CPU=true before the command"))  # fmt: skip
    if kind == "FSDP" and (is_on_cpu or not num_gpus):
        traps.append(("FSDP on the CPU silently becomes plain data parallelism", "distributed_type: MULTI_GPU"))
    if kind in ("MULTI_GPU", "FSDP") and not is_on_cpu and here > num_gpus:
        traps.append((f"{here} processes on this machine, but {num_gpus} GPUs are visible",
                      f"num_processes: {max(1, num_gpus) * machines}, or ACCELERATE_USE_CPU=true before the command"))  # fmt: skip
    if str(settings.get("mixed_precision") or "no").lower() not in ("no", "false"):
        traps.append((f"mixed_precision is {settings['mixed_precision']}, which changes results, so a run with another refuses",
                      "'no' here, and train.precision in the recipe"))  # fmt: skip
    if machines > 1 and not settings.get("main_process_ip"):
        traps.append((f"{machines} machines, but no main_process_ip: they would not meet", "the first machine's address"))
    backend = str((settings.get("dynamo_config") or {}).get("dynamo_backend") or "NO").upper()
    if backend not in ("NO", "FALSE"):
        traps.append((f"dynamo_backend {backend} compiles what the recipe did not ask for", "leave it out; use train.compile"))
    return traps
