"""What one rank does for all, and how the others wait for it."""

import contextlib
import itertools
import platform
import time

from dist_train.errors import UserError
from dist_train.watch import RankLost
from dist_train.workers import cores_to_run_on, num_cores

_ENDED = "dist_train/ended"  # in the store of the process group: which rank has failed, and why
_meetings = itertools.count()  # alike on all ranks: each comes to every meeting


def meet(world) -> None:
    """Return when every rank has come here, however long one of them was busy: with a file, a decoded split, pictures.

    A collective would fail after runtime.timeout_s. Raises RankLost where another rank has failed; of one that was killed,
    `watch.Watch` knows. world: runtime.World.
    """
    if world.world_size == 1:
        return
    store, key, pause_s = _store(), f"dist_train/meeting-{next(_meetings)}", 0.001
    if store.add(key, 1) == world.world_size:
        store.set(f"{key}/all", "here")
    while not store.check([f"{key}/all"]):
        if store.check([_ENDED]):
            raise RankLost(store.get(_ENDED).decode())
        time.sleep(pause_s)
        pause_s = min(0.2, 1.5 * pause_s)
    store.add(f"{key}/seen", 1)
    while world.rank == 0 and store.add(f"{key}/seen", 0) < world.world_size:  # the store ends with this process
        time.sleep(0.001)


def tell_end(error: BaseException) -> None:
    """Tell the others, where they wait in `meet`, that this rank fails."""
    import torch.distributed as dist

    with contextlib.suppress(OSError, RuntimeError, ValueError):  # the store's process may be gone, or the group
        _store().set(_ENDED, f"rank {dist.get_rank()} on {platform.node()} ended: {(str(error) or type(error).__name__)[:500]}")


def _store():
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def on_main(world, function, *args):
    """Call function(*args) on rank zero; every rank returns its result, or raises its UserError. world: runtime.World."""
    outcome = _outcome(function, *args) if world.is_main else [None, None]
    meet(world)
    if world.world_size > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(outcome)
    return _result(outcome)


def on_each_machine(world, function, *args) -> None:
    """Call function(*args) on one rank of every machine; every rank raises the UserError of the first that has one."""
    mine = _outcome(function, *args) if world.local_rank == 0 else [None, None]
    meet(world)
    for outcome in from_every_rank(world, mine):
        _result(outcome)


def cores_of_rank(world) -> int:
    """Cores for this rank: those it may run on, shared out among the ranks of its machine that may run on the same ones."""
    mine = platform.node(), sorted(cores_to_run_on())
    return max(1, num_cores() // from_every_rank(world, mine).count(mine))


def from_every_rank(world, value) -> list:
    """What each rank gives, in their order. world: runtime.World."""
    values = [value] * world.world_size
    if world.world_size > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value)
    return values


def _outcome(function, *args) -> list:
    """[what it returns, None], or [None, the message of its UserError]."""
    try:
        return [function(*args), None]
    except UserError as error:
        return [None, str(error)]


def _result(outcome: list):
    value, complaint = outcome
    if complaint is not None:
        raise UserError(complaint)
    return value
