"""A forked rank is to its test what a Python of its own would be."""

import json
import signal

import pytest
from conftest import finish_ranks, pytest_runtest_teardown, start_ranks

PROBE = """
import json, os, signal, sys, time
handlers = {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGCHLD")}
ports = ("MASTER_PORT", "PYTEST_CURRENT_TEST")
os.write(1, b"from below, ")
print(json.dumps([sys.argv[1:], os.getcwd(), {k: v for k, v in os.environ.items() if k not in ports}, handlers, os.getpgid(0),
                  os.getsid(0), __name__]))
print("a fault", file=sys.stderr)
time.sleep(float(sys.argv[1]))
sys.exit(7)
"""


@pytest.fixture
def probe(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    return lambda seconds, **how: start_ranks(2, [seconds, "-x"], tmp_path, "probe", PYTHONPATH=str(tmp_path), **how)


def test_a_forked_rank_sees_what_python_m_would(probe, tmp_path):
    seen = []
    for is_cold in (True, False):
        assert finish_ranks(probe("0", is_cold=is_cold), tmp_path) == [7, 7]
        seen.append([(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)])
    assert seen[0] == seen[1]
    words, fault = seen[0][1].splitlines()
    assert fault == "a fault" and json.loads(words.removeprefix("from below, "))[2]["RANK"] == "1"


def test_a_rank_that_hangs_is_killed_and_its_words_shown(probe, tmp_path):
    ranks = probe("600")
    assert [rank.poll() for rank in ranks] == [None, None]
    with pytest.raises(AssertionError, match=r"ranks still run after 2 s:\n(.|\n)*a fault"):
        finish_ranks(ranks, tmp_path, timeout_s=2)
    assert [rank.wait(10) for rank in ranks] == [-signal.SIGKILL] * 2


def test_a_test_that_fails_leaves_no_rank(probe):
    ranks = probe("600")
    pytest_runtest_teardown()
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2
