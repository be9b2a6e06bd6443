"""Is every rank still there? A rank that dies, hangs or is cut off ends the job with its name, not with a silent wait.

Each rank sends rank zero a datagram with its step every second or two, and rank zero answers. Datagrams never block: not
on a frozen peer, not on a cut cable. Collectives do, for as long as the process group's time-out.
"""

import json
import os
import platform
import secrets
import socket
import sys
import threading
import time

from dist_train.errors import UserError

EXIT_LOST_RANK = 86  # another rank is gone; `--resume` goes on from the last checkpoint


class RankLost(UserError):
    """Another rank ended, hangs or cannot be reached."""

    exit_code = EXIT_LOST_RANK


class Watch:
    """Watches the other ranks of a job from a thread. Every rank of the process group makes one, at the same place.

    world: runtime.World. timeout_s: silence that ends the job, with exit code EXIT_LOST_RANK. address: a name or number
    of rank zero's host that every rank can reach, as in MASTER_ADDR. read_step: set it to a function that tells how far
    this rank is; is_busy: to one that tells whether it has something to finish though another rank has failed. Used as a
    context, it turns the error of a collective into RankLost, and tells the others how it left.
    """

    def __init__(self, world, timeout_s: float, address: str):
        self.rank, self.world_size, self.read_step = world.rank, world.world_size, lambda: 0
        self.period_s = min(2.0, timeout_s / 10)
        # sooner than the collectives' own time-out, whose message does not say who
        self.limit_s = timeout_s - 4 * self.period_s
        self._closed, self._broken, self._verdict = threading.Event(), threading.Event(), ""
        self.is_busy = lambda: False
        self._ended: dict[int, str] = {}
        if self.world_size == 1:
            return
        family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self._meet(place)
        now = time.monotonic()
        self._heard = dict.fromkeys(range(self.world_size) if self.rank == 0 else (0,), now)
        self._heard.pop(self.rank, None)
        self._steps, self._places = dict.fromkeys(self._heard, 0), {}
        self._unheard, self._is_said = set(self._heard), False  # no datagram came yet: perhaps none passes between the hosts
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.explain(error)
        finally:
            self.close(error)

    def explain(self, error: BaseException | None) -> None:
        """Raise RankLost, naming the rank, if error is that of a collective; return if it is something else."""
        if self.world_size == 1 or not is_lost_contact(error):
            return
        self._broken.set()
        patience = time.monotonic() + 6 * self.period_s
        while not self._verdict and time.monotonic() < patience:
            time.sleep(self.period_s / 4)
        raise RankLost(self._verdict or self._stuck(error)) from error

    def close(self, error: BaseException | None) -> None:
        """Tell the others that this rank leaves, and why."""
        if self.world_size > 1 and not self._closed.is_set():
            if self._broken.is_set():
                time.sleep(self.period_s)  # rank zero's verdict has to reach the others
            self._closed.set()
            self._thread.join()  # a thread that is still there when the interpreter ends can abort the process
            for _ in range(2):  # datagrams may be lost
                self._send(reason=(str(error) or type(error).__name__)[:500] if error else "")
            self._socket.close()

    def _meet(self, place: tuple) -> None:
        """Exchange host names, and rank zero's port; a token keeps other jobs' datagrams out."""
        import torch.distributed as dist

        mine = (platform.node(), self._socket.getsockname()[1], secrets.token_hex(8))
        all_of_them = [None] * self.world_size
        dist.all_gather_object(all_of_them, mine)
        self.hosts = [host for host, _, _ in all_of_them]
        _, port, self._token = all_of_them[0]
        self._rank_zero = (place[0], port, *place[2:])

    def _watch(self) -> None:
        next_beat, exit_at, before = 0.0, float("inf"), time.monotonic()
        while not self._closed.is_set():
            now = time.monotonic()
            if now - before > self.period_s:  # this process was stopped itself, with the whole job perhaps
                self._heard = {rank: heard + now - before for rank, heard in self._heard.items()}
            before = now
            if now >= next_beat:
                next_beat = now + self.period_s
                self._send()
            self._listen()
            if not self._verdict:
                self._verdict = self._judge()
                if self._verdict and self.rank == 0:
                    self._send()
            if self._verdict and exit_at == float("inf"):
                # where the main thread knows already, it ends the process in order; should it hang, so does this one
                wait_s = self.limit_s if self._broken.is_set() else 2 * self.period_s if self.rank == 0 else 0
                exit_at = time.monotonic() + wait_s
            if time.monotonic() >= exit_at and not self._closed.is_set():
                print(f"[rank {self.rank}] {self._verdict}", file=sys.stderr, flush=True)
                os._exit(EXIT_LOST_RANK)  # the main thread may wait in a collective for ever

    def _judge(self) -> str:
        """What is wrong with the others, or ""."""
        now = time.monotonic()
        limit_s = 3 * self.period_s if self._broken.is_set() else self.limit_s
        for rank, reason in self._ended.items():
            # neither a collective of NCCL's nor ranks.meet fails where a rank is missing: they wait on
            is_missed = now - self._heard[rank] > 5 * self.period_s and not self.is_busy()
            if reason and (self._broken.is_set() or is_missed):
                return f"step {self.read_step()}: {self._name(rank)} ended: {reason}"
        silent = [rank for rank, heard in self._heard.items() if now - heard > limit_s and rank not in self._ended]
        if not self._broken.is_set() and any(rank in self._unheard for rank in silent):
            unheard = [rank for rank in silent if rank in self._unheard]
            silent = [rank for rank in silent if rank not in self._unheard]
            if not self._is_said:
                self._is_said = True
                print(
                    f"[rank {self.rank}] no datagram came from {self._names(unheard)}: UDP is blocked, or the rank hangs.\n"
                    f"  Were it lost, a collective would say so after runtime.timeout_s, or the launcher.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        if not silent:
            return ""
        silence_s = max(now - self._heard[rank] for rank in silent)
        seen = min(self._steps[rank] for rank in silent)
        return (
            f"step {self.read_step()}: {self._names(silent)} no longer answers: silent for {silence_s:.0f} s, last seen at step "
            f"{seen}. It was killed, hangs, or is cut off.\n  Look for its last words in the log; go on with --resume."
        )

    def _stuck(self, error: RuntimeError) -> str:
        """Every rank's thread answers, and yet a collective failed: who is behind?"""
        first_line = str(error).splitlines()[0][:300]
        steps = self._steps | {self.rank: self.read_step()}
        rank = min(steps, key=steps.get)
        behind = f"{self._name(rank)} is still at step {steps[rank]}, others at {max(steps.values())}"
        behind = behind if steps[rank] < max(steps.values()) else "all are at the same step"
        return (
            f"step {self.read_step()}: the ranks lost contact ({first_line}). Every one still answers; {behind}.\n"
            f"  If a step, an evaluation or a file may take this long, raise runtime.timeout_s; go on with --resume."
        )

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(self._name(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _send(self, reason: str | None = None) -> None:
        """A beat: from a rank to rank zero, from rank zero to every rank it has heard."""
        beat = {"token": self._token, "rank": self.rank, "step": self.read_step(), "end": reason, "verdict": self._verdict}
        data = json.dumps(beat).encode()
        for place in [*self._places.values()] if self.rank == 0 else [self._rank_zero]:
            try:
                self._socket.sendto(data, place)
            except OSError:  # no way to that host: its silence will tell
                pass

    def _listen(self) -> None:
        """Take in what has arrived, waiting a little for the first."""
        self._socket.settimeout(self.period_s / 8)
        try:
            while True:
                data, place = self._socket.recvfrom(4096)
                self._socket.settimeout(0)
                try:
                    beat = json.loads(data)
                    if beat["token"] != self._token or beat["rank"] not in self._heard:
                        continue
                except (ValueError, KeyError, TypeError):  # not ours
                    continue
                rank = beat["rank"]
                self._unheard.discard(rank)
                self._heard[rank], self._steps[rank], self._places[rank] = time.monotonic(), beat["step"], place
                if beat["end"] is not None:
                    self._ended[rank] = beat["end"]
                if rank == 0 and beat["verdict"] and not self._verdict:
                    self._verdict = beat["verdict"]
        except OSError:  # nothing more for now; on some systems also a refusal from a peer that is gone
            return


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because of another rank or the network, rather than this program."""
    import torch.distributed as dist

    kinds = dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))
