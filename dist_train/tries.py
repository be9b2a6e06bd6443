"""Requests to a server that are made again while their fault may pass.

For minutes where the server has answered before: a busy object store must not end a run. For seconds where it never has: a wrong
address is to be named soon.
"""

import itertools
import random
import sys
import time
from collections.abc import Callable

from dist_train.errors import UserError

TRIES = 3  # at least, however long one takes; and at most where what comes is damaged
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0  # between tries: doubled each time
PATIENCE_S = 180.0  # the other ranks wait as well, and give up after runtime.timeout_s, 300 s
SHORT_PATIENCE_S = 10.0
_LONG_S = 60.0  # waited for another's tries, so that fewer are left; or without a request, so that a server may be well again
_LOOK_S, _SAY_AFTER_S = 0.1, 5.0

_servers: dict[str, "Server"] = {}


class Transient(Exception):
    """A fault that another try may not meet. heard_at: when the last bytes came before it, of time.monotonic; 0 where none did."""

    heard_at = 0.0


class Damaged(Transient):
    """What came is not what was asked for."""


class Server:
    """What this process knows of a server, or of a bucket; its threads share it."""

    def __init__(self):
        self.heard_at = 0.0  # when it last sent something, of time.monotonic; 0: never
        self.failing_since = self.failed_at = self.said_of = -1.0

    def failed(self, since: float) -> float:
        """Note a fault of tries that fail since then; since when the server fails: earlier, where it answers no others either."""
        if self.failing_since < self.heard_at or since - self.failed_at > _LONG_S:
            self.failing_since = since
        self.failed_at = time.monotonic()
        return min(self.failing_since, since)


def server_of(name: str) -> Server:
    """The server of a name: scheme and host, or bucket."""
    return _servers.setdefault(name, Server())


def tried(
    server: Server, what: str, attempt: Callable, advice: str = "", is_wanted: Callable[[], bool] = lambda: True,
    is_patient: bool = False, waited_s: float = 0.0,
):  # fmt: skip
    """attempt(), made again where it raises Transient.

    Three times in any case, and no more where it raises Damaged; else for SHORT_PATIENCE_S, or PATIENCE_S if is_patient and the
    server has answered before. what: the file, in messages. waited_s: how long the caller has waited for others to fetch it.
    Raises UserError, naming the file and the last reason; InterruptedError once is_wanted() is false.
    """
    began, since, num_damaged = time.monotonic(), 0.0, 0
    for number in itertools.count(1):
        tried_at = time.monotonic()
        try:
            result = attempt()
        except Transient as fault:
            reason, num_damaged = str(fault), num_damaged + isinstance(fault, Damaged)
            since = since or max(tried_at, fault.heard_at)  # not the minutes in which a large file came
        else:
            server.heard_at = time.monotonic()
            return result
        failing_s = time.monotonic() - min(server.failed(since), since - waited_s)
        wait_s = min(FIRST_WAIT_S * 2.0 ** min(number - 1, 30), LONGEST_WAIT_S)
        wait_s *= random.uniform(0.8, 1.2)  # ranks must not come back as one
        patience_s = PATIENCE_S if is_patient and server.heard_at else SHORT_PATIENCE_S
        is_over = failing_s + wait_s > patience_s and number >= (TRIES if waited_s < _LONG_S else 1)
        if is_over or num_damaged >= TRIES:
            raise UserError(
                f"{what}: cannot be fetched: {reason} ({number} tries in {time.monotonic() - began:.0f} s).\n"
                f"  {advice or 'Is the server well? Try again.'}"
            )
        if failing_s > _SAY_AFTER_S and server.said_of != server.failing_since:
            server.said_of = server.failing_since
            left_s = max(patience_s - failing_s, wait_s)
            print(f"{what}: {reason}; trying again for up to {left_s:.0f} s", file=sys.stderr, flush=True)
        _wait(wait_s, what, is_wanted)


def _wait(wait_s: float, what: str, is_wanted: Callable[[], bool]) -> None:
    until = time.monotonic() + wait_s
    while (left_s := until - time.monotonic()) > 0:
        if not is_wanted():
            raise InterruptedError(f"{what}: no longer wanted")
        time.sleep(min(left_s, _LOOK_S))
