"""Shards behind a URL: the same batches as from a folder, fetched once, proven, bounded, through faults and crashes."""

import contextlib
import fcntl
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dist_train import remote, shard, shard_cache
from dist_train.data import open_evaluation, open_stream
from dist_train.errors import UserError
from dist_train.index import file_checksum, load_index
from dist_train.order import Order
from dist_train.shard_cache import ReadAhead, ShardCache, default_folder, shards_in_play
from dist_train.store import Store


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder. faults: {file name: what is done to its next requests, in order}; requests: names in order."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.faults, self.requests = folder, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/set"

    def count(self, ending: str) -> int:
        return sum(name.endswith(ending) for name in self.requests)

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802  http.server calls it so
        server, name = self.server, self.path.partition("?")[0].removeprefix("/set/")
        server.requests.append(name)
        plan = server.faults.get(name, [])
        fault = plan.pop(0) if plan else "none"
        path = server.folder / name
        if isinstance(fault, int) or not path.exists():
            return self.send_error(fault if isinstance(fault, int) else 404)
        body = path.read_bytes()
        if fault == "damaged":
            body = body[:-700] + bytes([body[-700] ^ 1]) + body[-699:]
        if fault == "longer":
            body += b"x" * 3_000_000
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(body[: len(body) // 2])
        elif fault == "reset":
            self.wfile.write(body[:100])
            self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: closing sends a reset
        elif fault == "slow":
            for part in np.array_split(np.frombuffer(body, np.uint8), 10):
                self.wfile.write(part.tobytes())
                time.sleep(0.05)
        elif fault == "stuck":
            self.wfile.write(body[:1000])
            time.sleep(30)
        else:
            self.wfile.write(body)
        return None

    def log_message(self, *words):
        pass


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "SILENCE_S", 1)


@pytest.fixture
def server(many):
    with FaultyServer(Path(many)) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
        yield serving
        serving.shutdown()


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """The digits in 24 shards of training."""
    out = tmp_path_factory.mktemp("many") / "digits"
    with contextlib.redirect_stdout(None):
        shard.main(
            ["--source", "sklearn", "--dataset", "digits", "--out", str(out), "--workers", "1", "--min-shards", "24"]
        )
    return str(out)


def batches_of(shards, num_steps=30, **settings):
    settings = {"batch_size": 48, "seed": 3, "threads": 2, "stop_step": num_steps, "window_shards": 3} | settings
    return [(b.keys, b.images.numpy().tobytes()) for b in open_stream(shards, **settings)]


def test_batches_from_a_url_are_those_from_the_folder_and_each_shard_is_fetched_once(many, server, tmp_path):
    index = load_index(server.url, str(tmp_path / "cache"))
    assert batches_of(index, 70) == batches_of(many, 70)  # over two epochs
    names = load_index(many).split("train").files
    assert sorted(name for name in server.requests if name.endswith(".tar")) == sorted(names)
    assert index.split("train").names() == load_index(many).split("train").names()
    before = len(server.requests)
    again = load_index(server.url, str(tmp_path / "cache"))
    assert batches_of(again) == batches_of(many) and server.requests[before:] == ["index.json"]


def test_evaluation_from_a_url_counts_every_sample(many, server, tmp_path):
    index = load_index(server.url, str(tmp_path))
    found = [sample for batch in open_evaluation(index, "train", 100, threads=2) for sample in batch.samples.tolist()]
    assert found == list(range(load_index(many).split("train").num_samples))


def test_each_rank_fetches_only_what_it_reads(many, server, tmp_path):
    order = Order(load_index(many).split("train").shard_samples, 48, 3, 1, 4)
    wanted = {load_index(many).split("train").files[k] for step in range(9)
              for k in np.searchsorted(order.first, order.rank_batch(step, 1, 4)[0], side="right") - 1}  # fmt: skip
    index = load_index(server.url, str(tmp_path))
    batches_of(index, 9, world=(1, 4), window_shards=1, lanes=4)
    fetched = {name for name in server.requests if name.endswith(".tar")}
    assert fetched == wanted and len(wanted) < 12


@pytest.mark.parametrize("fault", [503, 429, "truncated", "reset", "damaged", "stuck", "slow", "longer"])
def test_passing_faults_are_survived(many, server, tmp_path, fault):
    for name in ("index.json", "train.samples.npy", "train-000003.tar"):
        if fault not in ("damaged", "longer") or name != "index.json":
            server.faults[name] = [fault]
    server.faults["train-000004.tar"] = [fault, fault]
    split = load_index(server.url, str(tmp_path)).split("train")
    assert split.remote.open(split, 3) > 0 and split.remote.open(split, 4) > 0
    tries = 1 if fault == "slow" else 3
    assert server.count("train-000004.tar") == tries
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == sorted(
        f"{split.shard_checksums[k]}.tar" for k in (3, 4)
    )
    assert not list(tmp_path.glob("*.partial"))
    for k in (3, 4):
        assert file_checksum(tmp_path / f"{split.shard_checksums[k]}.tar") == split.shard_checksums[k]


@pytest.mark.parametrize(("fault", "reason", "tries"), [
    (503, "503 Service Unavailable .3 tries", 3), ("truncated", "bytes early|bytes came", 3), ("damaged", "checksum", 3),
    ("longer", "more bytes came", 3), (403, "access is refused", 1), (401, "Set credentials", 1), (404, "no such file", 1),
])  # fmt: skip
def test_lasting_faults_end_the_run_with_the_url_and_the_reason(server, tmp_path, fault, reason, tries):
    index = load_index(server.url, str(tmp_path))
    server.faults["test-000000.tar"] = [fault] * 10
    with pytest.raises(UserError, match=f"(?s){server.url}/test-000000.tar: .*({reason})"):
        Store(index.split("test")).payload(0)
    assert server.count("test-000000.tar") == tries
    assert not list(tmp_path.glob("*.tar*"))


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="http://127.0.0.1:9/set/index.json: cannot be fetched: .*refused.* .3 tries"):
        load_index("http://127.0.0.1:9/set", str(tmp_path))


def test_passwords_and_signatures_are_not_printed(server, tmp_path):
    url = f"{server.url}/nothing?signature=geheim"
    with pytest.raises(UserError, match="nothing/index.json: there is no such file") as fault:
        load_index(url, str(tmp_path))
    assert "geheim" not in str(fault.value)
    assert remote.shown("https://me:word@host/x") == "https://host/x"
    assert remote.join("https://h/a?sig=1", "x.tar") == "https://h/a/x.tar?sig=1"
    load_index(f"{server.url}?signature=geheim", str(tmp_path))  # and the query goes along with every file


def test_an_index_cannot_name_files_outside_the_cache(many, tmp_path):
    from dist_train.index import _json_checksum

    raw = json.loads(Path(many, "index.json").read_text())
    for spoil in (
        lambda s: s["train"]["checksums"].__setitem__(0, "../../evil"),
        lambda s: s.update({"../evil": s["train"]}),
    ):
        bad = json.loads(json.dumps(raw))
        bad.pop("checksum")
        spoil(bad["splits"])
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "index.json").write_text(json.dumps(bad | {"checksum": _json_checksum(bad)}))
        with FaultyServer(folder) as serving:
            threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
            with pytest.raises(UserError, match="evil"):
                load_index(serving.url, str(tmp_path / "cache"))
            serving.shutdown()


def test_the_cache_stays_below_its_limit_and_batches_are_the_same(many, server, tmp_path):
    split = load_index(many).split("train")
    limit = int(split.shard_bytes.max() * 13)
    index = load_index(server.url, str(tmp_path), limit / 1e9)
    most, stop, cache = [0], threading.Event(), ShardCache(tmp_path, limit)

    def watch():
        while not stop.wait(0.002):
            with (
                contextlib.suppress(FileNotFoundError),
                cache.locked("room.lock"),
            ):  # nothing is removed or added meanwhile
                found = [path.stat() for path in tmp_path.glob("*.tar*")]
                most.append(sum({one.st_ino: one.st_size for one in found}.values()))  # a renaming may show both names

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert batches_of(index, 100, lanes=2) == batches_of(many, 100, lanes=2)
    finally:
        stop.set()
        watcher.join()
    assert limit / 2 < max(most) <= limit
    assert server.count(".tar") > split.num_shards  # some were removed, and fetched again


def test_a_limit_too_small_for_the_shards_in_play_is_refused_at_once(many, server, tmp_path):
    index = load_index(server.url, str(tmp_path), 50_000 / 1e9)
    with pytest.raises(UserError, match=r"(?s)data.cache_gb is 5e-05, but 10 shards .* or lower data.window_shards"):
        batches_of(index)
    with pytest.raises(UserError, match="data.cache_gb is 0"):
        load_index(server.url, str(tmp_path), 0)
    assert server.count(".tar") == 0


def test_shards_in_use_are_not_removed_and_the_rest_goes_least_recently_used_first(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 0.1)
    split = load_index(server.url, str(tmp_path)).split("train")
    sizes = split.shard_bytes.tolist()
    cache = ShardCache(tmp_path, sum(sizes[:4]) + 2000)
    held = cache_open(cache, server, split, 0)
    for shard_number in (1, 2, 3):
        os.close(cache_open(cache, server, split, shard_number))
        time.sleep(0.01)
    os.close(cache_open(cache, server, split, 1))  # used again: now 2 is the oldest
    os.close(cache_open(cache, server, split, 4))
    there = {path.stem for path in tmp_path.glob("*.tar")}
    assert there == {split.shard_checksums[k] for k in (0, 1, 3, 4)}
    fds = [held, *(cache_open(cache, server, split, k) for k in (1, 3, 4))]
    with pytest.raises(UserError, match="no room to fetch .*train-000005.tar"):
        cache_open(cache, server, split, 5)
    os.close(fds[1])
    os.close(cache_open(cache, server, split, 5))
    assert os.pread(held, sizes[0] + 1, 0) == Path(server.folder, split.files[0]).read_bytes()
    for fd in (held, *fds[2:]):
        os.close(fd)


def cache_open(cache, server, split, k) -> int:
    return cache.open(f"{server.url}/{split.files[k]}", split.shard_checksums[k], int(split.shard_bytes[k]))


def test_many_threads_and_processes_fetch_a_shard_once(many, server, tmp_path):
    code = ("import sys; from dist_train.index import load_index; from dist_train.store import Store; import numpy as np;"
            "split = load_index(sys.argv[1], sys.argv[2]).split('train'); store = Store(split, 4);"
            "print(sum(len(store.payload(s)) for s in range(0, split.num_samples, 7)))")  # fmt: skip
    command = [sys.executable, "-c", code, server.url, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    store = Store(load_index(many).split("train"))
    expected = sum(len(store.payload(s)) for s in range(0, store.split.num_samples, 7))
    assert [int(process.communicate()[0]) for process in processes] == [expected] * 4
    assert server.count(".tar") == store.split.num_shards == 24
    assert server.count(".samples.npy") == 3


def test_a_fetch_that_was_killed_is_taken_over(many, server, tmp_path):
    split = load_index(server.url, str(tmp_path)).split("train")
    server.faults["train-000000.tar"] = ["stuck"]
    code = ("import sys; from dist_train import remote; remote.SILENCE_S = 60; from dist_train.index import load_index;"
            "split = load_index(sys.argv[1], sys.argv[2]).split('train'); split.remote.open(split, 0)")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)])
    partial = tmp_path / f"{split.shard_checksums[0]}.tar.partial"
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert partial.stat().st_size == split.shard_bytes[0]  # reserved at once
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.close(split.remote.open(split, 0))
    assert file_checksum(partial.with_suffix("")) == split.shard_checksums[0] and not partial.exists()


def test_a_shard_cut_short_in_the_cache_is_fetched_again(many, server, tmp_path):
    split = load_index(server.url, str(tmp_path)).split("train")
    os.close(split.remote.open(split, 0))
    kept = tmp_path / f"{split.shard_checksums[0]}.tar"
    os.truncate(kept, 100)
    os.close(split.remote.open(split, 0))
    assert file_checksum(kept) == split.shard_checksums[0] and server.count("train-000000.tar") == 2


def test_verify_and_inspect_work_on_a_url(server, tmp_path, monkeypatch, capsys):
    from dist_train.verify import inspect_main, main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    main([server.url])
    inspect_main([server.url, "--out", str(tmp_path / "sheet.png")])
    assert "whole. 1,797 samples" in capsys.readouterr().out and (tmp_path / "sheet.png").stat().st_size > 1000
    server.faults["val-000000.tar"] = ["damaged"] * 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="val-000000.tar: cannot be fetched: the checksum of what came differs"):
        main([server.url])


def test_damage_in_the_cache_names_the_url_and_the_kept_file(many, server, tmp_path):
    store = Store(load_index(server.url, str(tmp_path)).split("test"))
    store.payload(0)
    kept = tmp_path / f"{store.split.shard_checksums[0]}.tar"
    at = int(store.table[0]["offset"])
    with open(kept, "r+b") as file:
        file.seek(at + 5)
        file.write(b"\xff\x00\xff")
    with pytest.raises(UserError, match=f"test-000000.tar .kept as {kept}.: checksum differs"):
        store.payload(0)


def test_reading_ahead_keeps_its_distance_and_its_order(many, server, tmp_path):
    split = load_index(server.url, str(tmp_path)).split("train")
    store = Store(split, 2)
    upcoming = [np.arange(split.first[k], split.first[k + 1]) for k in range(24)]
    distance = int(split.shard_bytes[:4].sum()) + 4
    with ReadAhead(store, iter(upcoming), distance, num_threads=1):
        time.sleep(0.5)
        fetched = [name for name in server.requests if name.endswith(".tar")]
        assert fetched == split.files[:4]
        for samples in upcoming[:10]:
            store.locate(samples)
        time.sleep(0.5)
        fetched = [name for name in server.requests if name.endswith(".tar")]
        assert 10 < len(set(fetched)) <= 15 and len(fetched) == len(set(fetched))
    time.sleep(0.2)
    done = len(server.requests)
    for samples in upcoming[:10]:
        store.locate(samples)
    time.sleep(0.3)
    assert len(server.requests) == done  # its threads have ended


def test_another_set_at_the_same_url_is_noticed(many, server, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(many, copied)
    server.folder = copied
    before = batches_of(load_index(server.url, str(tmp_path / "cache")), 3)
    shutil.rmtree(copied)
    with contextlib.redirect_stdout(None):
        shard.main(
            ["--source", "sklearn", "--dataset", "digits", "--out", str(copied), "--workers", "1", "--seed", "5"]
        )
    after = batches_of(load_index(server.url, str(tmp_path / "cache")), 3)
    assert after == batches_of(str(copied), 3) != before


def test_shards_in_play_holds_on_any_number_of_ranks(many):
    counts = load_index(many).split("train").shard_samples
    for window, lanes, world in ((1, 4, 4), (3, 2, 2), (2, 4, 3), (24, 1, 2), (2, 6, 1)):
        order = Order(counts, 48, 1, window, lanes)
        for rank in range(world):
            for start in range(0, 40, 7):  # within a window's length
                steps = range(start, start + max(1, window * lanes * int(counts.min()) // 48 // 2))
                samples = np.concatenate([order.rank_batch(step, rank, world)[0] for step in steps])
                touched = np.unique(np.searchsorted(order.first, samples, side="right"))
                assert len(touched) <= 2 * shards_in_play(order, world)


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dist_train"
    assert default_folder("/elsewhere") == Path("/elsewhere")


def test_a_lock_is_freed_by_its_holder_alone(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    with cache.locked("x.lock"), open(tmp_path / "x.lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "x.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
