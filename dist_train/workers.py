"""Run independent tasks in worker processes that end with their parent, or in threads, a few tasks in flight at a time."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from dist_train.control_groups import cpu_quota
from dist_train.errors import UserError

_report: Callable[[int], None] = int  # replaced where tasks run; takes the number of samples finished


def cores_to_run_on() -> set[int]:
    """The numbers of the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Cores this process may use: those it may run on, or what a container's quota comes to."""
    cores, quota = len(cores_to_run_on()), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def run_tasks(
    work: Callable, tasks: Iterable, workers: int, progress: Callable[[int], None], in_threads: bool = False
) -> Iterator[tuple]:
    """Yield (task number, work(task)) as tasks finish, in any order.

    work and tasks must be picklable where workers > 1; with one worker, or in_threads, all is done in this process.
    Threads start at once, where a process takes a third of a second, and are for work that seldom needs the
    interpreter. tasks is consumed as needed, so what a task carries is held in memory for few of them. progress is
    called with the number of samples that `count_done` was told of since its last call. The first exception ends the
    others and is raised here.
    """
    tasks = enumerate(tasks)
    if workers <= 1:
        global _report
        _report = progress
        for number, task in tasks:
            yield number, work(task)
        return
    seen, running = 0, {}
    if in_threads:
        counter = _Counter()
        pool = ThreadPoolExecutor(workers, initializer=_count_in, initargs=(counter,))
    else:
        import multiprocessing

        context = multiprocessing.get_context("spawn")  # fork is not safe once a library has started threads
        counter = context.Value("q", 0)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    try:
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < workers + 1:
                number, task = next(tasks, (None, None))
                exhausted = number is None
                if not exhausted:
                    running[pool.submit(work, task)] = number
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            progress(counter.value - seen)
            seen = counter.value
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(
            "A worker process was ended from outside, most likely for lack of memory.\n"
            "  Start again with fewer of them (--workers N); what was finished is kept."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def count_done(samples: int) -> None:
    """Tell the parent, from inside a task, that so many more samples are finished."""
    _report(samples)


class _Counter:
    """What multiprocessing's Value is to processes."""

    def __init__(self):
        self.value, self._lock = 0, threading.Lock()

    def get_lock(self) -> threading.Lock:
        return self._lock


def _count_in(counter) -> None:
    def add(samples):
        with counter.get_lock():
            counter.value += samples

    global _report
    _report = add


def _start_worker(counter) -> None:
    from multiprocessing import connection, parent_process

    _count_in(counter)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the workers in good order

    def follow_parent():
        connection.wait([parent_process().sentinel])
        os._exit(1)  # killed: an orphan must not go on writing beside the next attempt

    threading.Thread(target=follow_parent, daemon=True).start()
