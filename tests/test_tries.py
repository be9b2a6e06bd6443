"""Requests made again: for how long, how often, and when not."""

import itertools
import re

import pytest

from dist_train import tries
from dist_train.errors import UserError
from dist_train.tries import Damaged, Server, Transient, tried


class Clock:
    """Stands for the module `time`: it passes while somebody sleeps, or by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tries, "time", clock)
    return clock


@pytest.fixture
def server(clock) -> Server:
    """One that has answered before."""
    server = Server()
    server.heard_at = clock.now
    return server


class Requests:
    """An attempt that fails until some time. began: when each was made; takes_s: what each takes."""

    def __init__(self, clock: Clock, until: float = float("inf"), takes_s: float = 0.0):
        self.clock, self.until, self.takes_s, self.began = clock, until, takes_s, []

    def __call__(self) -> str:
        self.began.append(self.clock.now)
        self.clock.now += self.takes_s
        if self.clock.now < self.until:
            raise Transient("the server says 503")
        return "a file"


def failing_s(clock, server, requests, **how) -> float:
    """For how long it was tried in vain."""
    began = clock.now
    with pytest.raises(UserError, match=r"x\.tar: cannot be fetched: .* \(\d+ tries in \d+ s\)"):
        tried(server, "x.tar", requests, **how)
    return clock.now - began


def test_a_fault_of_two_minutes_is_outlived_by_waits_that_grow(clock, server):
    requests = Requests(clock, until=clock.now + 120)
    assert tried(server, "x.tar", requests, is_patient=True) == "a file"
    waits = [b - a for a, b in itertools.pairwise(requests.began)]
    assert waits[0] < 1 and waits[:5] == sorted(waits[:5]) and max(waits) < 25 and len(waits) < 15


@pytest.mark.parametrize(("has_answered", "is_patient", "least", "most"), [
    (True, True, 150, 180), (True, False, 5, 10), (False, True, 5, 10), (False, False, 5, 10),
])  # fmt: skip
def test_patience_is_for_servers_that_have_answered(clock, server, has_answered, is_patient, least, most):
    server = server if has_answered else Server()
    assert least < failing_s(clock, server, Requests(clock), is_patient=is_patient) < most


def test_a_stop_ends_the_wait_within_a_fraction_of_a_second(clock, server):
    stopped_at = clock.now + 100
    with pytest.raises(InterruptedError, match="x.tar: no longer wanted"):
        tried(server, "x.tar", Requests(clock), is_wanted=lambda: clock.now < stopped_at, is_patient=True)
    assert clock.now < stopped_at + 0.5


def test_damage_is_met_three_times_whatever_else_happens(clock, server):
    faults = [Transient, Damaged, Transient, Transient, Damaged, Damaged, Damaged]

    def attempt():
        raise faults.pop(0)("fault")

    assert failing_s(clock, server, attempt, is_patient=True) < 60
    assert len(faults) == 1


@pytest.mark.parametrize("takes_s", [0, 5, 60])
@pytest.mark.parametrize("waited_s", [0, 30, 59, 100, 170])
def test_all_waiting_for_a_file_stays_well_below_the_time_after_which_ranks_give_up(clock, server, takes_s, waited_s):
    requests = Requests(clock, takes_s=takes_s)
    took_s = failing_s(clock, server, requests, is_patient=True, waited_s=waited_s)
    assert 150 < waited_s + took_s < 250
    assert len(requests.began) >= (3 if waited_s < 60 else 1)


def test_who_has_waited_for_all_the_time_tries_once(clock, server):
    requests = Requests(clock)
    failing_s(clock, server, requests, is_patient=True, waited_s=300)
    assert len(requests.began) == 1


def test_a_server_that_is_away_is_waited_for_once_and_not_for_each_file(clock, server, capsys):
    failing_s(clock, server, Requests(clock), is_patient=True)
    clock.now += 30  # by then it has been away for all of the patience
    for _ in range(5):
        requests = Requests(clock)
        assert failing_s(clock, server, requests, is_patient=True) < 3 and len(requests.began) == 3
    said = re.findall(r"^x.tar: the server says 503; trying again for up to 1\d\d s$", capsys.readouterr().err, re.MULTILINE)
    assert len(said) == 1
    assert tried(server, "x.tar", Requests(clock, until=clock.now + 1)) == "a file"
    assert failing_s(clock, server, Requests(clock), is_patient=True) > 150  # it was well in between
    clock.now += 600
    assert failing_s(clock, server, Requests(clock), is_patient=True) > 150  # and may have been


def test_a_file_that_never_comes_is_given_up_though_its_server_answers_others(clock, server):
    def attempt():
        server.heard_at = clock.now
        raise Transient("the server says 500")

    assert 150 < failing_s(clock, server, attempt, is_patient=True) < 200


def test_minutes_in_which_a_large_file_came_are_not_those_of_a_fault(clock, server):
    well_again = clock.now + 400 + 30

    def attempt() -> str:
        if clock.now < well_again - 30:
            clock.now = server.heard_at = well_again - 30
            fault = Transient("the connection ended early")
            fault.heard_at = clock.now
            raise fault
        if clock.now < well_again:
            raise Transient("the server says 503")
        return "a file"

    assert tried(server, "x.tar", attempt, is_patient=True) == "a file"


def test_a_large_file_that_breaks_again_and_again_is_tried_three_times(clock, server):
    requests = []

    def attempt():
        requests.append(clock.now)
        clock.now += 400
        server.heard_at = clock.now
        fault = Transient("the connection ended early")
        fault.heard_at = clock.now
        raise fault

    failing_s(clock, server, attempt, is_patient=True)
    assert len(requests) == 3
