"""Shards behind a URL: the same batches as from a folder, fetched once, proven, bounded, through faults and crashes."""

import contextlib
import errno
import fcntl
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import lines_of, serving, sharded, tiny_run, wait_for
from test_foreign import dali_index, pairs, write_tar

from dist_train import foreign, plan, remote, remote_index, shard_cache, tries, verify
from dist_train import store as store_module
from dist_train.config import DataConfig, RunConfig
from dist_train.data import open_evaluation, open_stream
from dist_train.durable import writing
from dist_train.errors import UserError
from dist_train.file_locks import locked
from dist_train.index import file_checksum, load_index
from dist_train.order import Order
from dist_train.remote import file_size, read_range, read_small
from dist_train.shard_cache import ReadAhead, ShardCache, default_folder, shards_in_play
from dist_train.store import Store


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder, and answers: {file name: bytes}. faults: {file name: what is done to its next requests, in order}; requests:
    names in order. The first folder of a URL is the bucket, or whatever it is called."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.faults, self.answers, self.requests = folder, {}, {}, []
        self.has_ranges, self.ranges = True, []  # ranges: (name, first, stop) of those that were answered
        self.url = f"http://127.0.0.1:{self.server_address[1]}/set"

    def count(self, ending: str) -> int:
        return sum(name.endswith(ending) for name in self.requests)

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802  http.server calls it so
        server, name = self.server, self.path.partition("?")[0].lstrip("/").partition("/")[2]
        server.requests.append(name)
        plan = server.faults.get(name, [])
        fault = plan.pop(0) if plan else "none"
        path = server.folder / name
        if fault == "hang up":
            return self.connection.close()
        if isinstance(fault, int) or not (name in server.answers or path.exists()):
            return self.send_error(fault if isinstance(fault, int) else 404)
        body = server.answers[name] if name in server.answers else path.read_bytes()
        if fault == "damaged":
            body = body[:-700] + bytes([body[-700] ^ 1]) + body[-699:]
        if fault == "longer":
            body += b"x" * 3_000_000
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if server.has_ranges else None
        if span:
            first, stop, total = int(span[1]), int(span[2]) + 1, len(body)
            if first >= total:
                return self.send_error(416)
            server.ranges.append((name, first, stop))
            body = body[first:stop] if fault != "other part" else body[first:stop][::-1]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')  # the two that S3 sends, and its clients ask for
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return None
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
            self.wfile.write(body[: min(1000, len(body) // 2)])
            time.sleep(30)
        else:
            self.wfile.write(body)
        return None

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, *words):
        pass


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Three tries soon after each other."""
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(tries, "PATIENCE_S", 0)
    monkeypatch.setattr(tries, "SHORT_PATIENCE_S", 0)
    monkeypatch.setattr(remote, "SILENCE_S", 10)  # a busy machine may stall the server for seconds


def threads_of(*names: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.fixture
def server(many):
    server = FaultyServer(Path(many))
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """The digits in 24 shards of training."""
    return sharded(tmp_path_factory.mktemp("many") / "digits", "--source", "sklearn", "--dataset", "digits", "--min-shards", "24")


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


def test_a_folder_on_a_slow_disk_is_kept_on_a_fast_one(many, tmp_path):
    spaced = tmp_path / "slow disk" / "digits"
    shutil.copytree(many, spaced)
    index = load_index(spaced.as_uri(), str(tmp_path / "cache"))
    assert batches_of(index, 70) == batches_of(many, 70)
    shutil.rmtree(spaced)
    split = index.split("train")
    assert all(split.remote.is_kept(split, k) for k in range(split.num_shards))
    assert batches_of(index, 70) == batches_of(many, 70)
    url = (tmp_path / "file").as_uri()
    (tmp_path / "file").write_bytes(b"0123456789")
    assert (read_range(url, 3, 4), file_size(url), read_small(url)) == (b"3456", 10, b"0123456789")
    assert remote.join("file:///a b/set", "/other/tar 1.tar") == "file:///other/tar%201.tar"
    with pytest.raises(UserError, match="gone/index.json: there is no such file"):
        load_index((tmp_path / "gone").as_uri(), str(tmp_path / "cache"))
    with pytest.raises(UserError, match="names a host; expected a whole path with three slashes"):
        load_index("file://data/shards", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["index.json", "train.samples.npy", "train.names.txt"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "gone"])
def test_a_kept_index_that_was_damaged_is_fetched_again(many, server, tmp_path, name, damage):
    load_index(server.url, str(tmp_path))
    (path,) = tmp_path.glob(f"index-*/{name}")
    good = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if damage == "a bit" else good[: len(good) // 2])
    assert load_index(server.url, str(tmp_path)).split("train").num_samples > 0
    assert path.read_bytes() == good and not list(tmp_path.glob("*.partial"))


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
def test_passing_faults_are_survived(many, server, tmp_path, fault, monkeypatch):
    if fault == "stuck":
        monkeypatch.setattr(remote, "SILENCE_S", 1)
    for name in ("index.json", "train.samples.npy", "train-000003.tar"):
        if fault not in ("damaged", "longer") or name != "index.json":
            server.faults[name] = [fault]
    server.faults["train-000004.tar"] = [fault, fault]
    split = load_index(server.url, str(tmp_path)).split("train")
    assert split.remote.open(split, 3) > 0 and split.remote.open(split, 4) > 0
    tries = 1 if fault == "slow" else 3
    assert server.count("train-000004.tar") == tries
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == sorted(f"{split.shard_checksums[k]}.tar" for k in (3, 4))
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
        Store(index.split("test")).locate(np.array([0]))
    assert server.count("test-000000.tar") == tries
    assert not list(tmp_path.glob("*.tar*"))


def test_a_server_that_is_not_there_is_named_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(tries, "PATIENCE_S", 600)
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


def test_weights_and_biases_gets_no_passwords_or_signatures(tmp_path, monkeypatch):
    from dist_train.wandb_log import open_wandb

    config = RunConfig(data=DataConfig(shards="https://me:geheim@host/set?signature=geheim"))
    monkeypatch.setattr(sys, "argv", ["dist-train", "train", "--data.shards", config.data.shards])
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path))
    run = open_wandb(tmp_path, config, [])
    run.finish(True)
    assert list(run.news()) == []
    (recorded,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"https://host/set" in recorded.read_bytes()
    assert [path for path in tmp_path.glob("wandb/**/*") if path.is_file() and b"geheim" in path.read_bytes()] == []


def test_an_index_cannot_name_files_outside_the_cache(many, tmp_path):
    from dist_train.index import _json_checksum

    raw = json.loads(Path(many, "index.json").read_text())
    for spoil in (lambda s: s["train"]["checksums"].__setitem__(0, "../../evil"), lambda s: s.update({"../evil": s["train"]})):
        bad = json.loads(json.dumps(raw))
        bad.pop("checksum")
        spoil(bad["splits"])
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "index.json").write_text(json.dumps(bad | {"checksum": _json_checksum(bad)}))
        server = FaultyServer(folder)
        with serving(server), pytest.raises(UserError, match="evil"):
            load_index(server.url, str(tmp_path / "cache"))


def test_the_cache_stays_below_its_limit_and_batches_are_the_same(many, server, tmp_path):
    split = load_index(many).split("train")
    limit = int(split.shard_bytes.max() * 13)
    index = load_index(server.url, str(tmp_path), limit / 1e9)
    most, stop = [0], threading.Event()

    def watch():
        while not stop.wait(0.002):
            with contextlib.suppress(FileNotFoundError), locked(tmp_path / "room.lock"):  # nothing is removed or added meanwhile
                found = [path.stat() for path in tmp_path.glob("*.tar*")]
                most.append(sum({one.st_ino: one.st_size for one in found}.values()))  # a renaming may show both names

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert batches_of(index, 100, lanes=2, cache="none") == batches_of(many, 100, lanes=2)
    finally:
        stop.set()
        watcher.join()
    assert limit / 2 < max(most) <= limit
    assert server.count(".tar") > split.num_shards  # some were removed, and fetched again


def test_a_store_lets_go_of_shards_where_two_batches_wait_for_room(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 5)
    monkeypatch.setattr(shard_cache, "_SOON_S", 0.02)
    split = load_index(many).split("train")
    limit = int(split.shard_bytes.max() * 4)
    store = Store(load_index(server.url, str(tmp_path), limit / 1e9).split("train"))
    first = np.flatnonzero(np.diff(split.shard_of(np.arange(split.num_samples)), prepend=-1))

    def locate(turn: int) -> list[int]:  # three shards a batch: two batches that held two each would fill the cache
        return store.locate(first[[turn % 24, (turn + 7) % 24, (turn + 14) % 24]]).offsets.tolist()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(locate, range(12)))
    assert found == [split.table()["offset"][first[[t % 24, (t + 7) % 24, (t + 14) % 24]]].tolist() for t in range(12)]


def stop_while_it_fetches(store: Store, server) -> None:
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(store.locate, np.array([0]))
        wait_for(lambda: server.count(".tar"), "a request")
        store.stopped.set()
        with pytest.raises(InterruptedError):
            fetching.result(timeout=10)


def test_a_fetch_ends_soon_once_its_stream_is_closed(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 1)
    server.faults |= {path.name: ["stuck"] * 3 for path in Path(many).glob("train-*.tar")}
    store = Store(load_index(server.url, str(tmp_path)).split("train"))
    stop_while_it_fetches(store, server)
    assert server.count(".tar") == 1, "it was tried again"
    stream = open_stream(load_index(server.url, str(tmp_path)), batch_size=8, threads=1)
    with pytest.raises(UserError, match="cannot be fetched"):
        next(stream)
    wait_for(lambda: not threads_of("decode", "fetch"), "the end of its threads")


def test_a_limit_too_small_for_the_shards_in_play_is_refused_at_once(many, server, tmp_path):
    index = load_index(server.url, str(tmp_path), 50_000 / 1e9)
    with pytest.raises(UserError, match=r"(?s)10 shards .* but shards may take 5e-05 GB .*cache_gb.*, or lower data.window_shards"):
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
            "print(sum(len(p) for p in store.payloads(np.arange(split.num_samples))))")  # fmt: skip
    command = [sys.executable, "-c", code, server.url, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    store = Store(load_index(many).split("train"))
    expected = int(store.table["size"].sum())
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
    wait_for(lambda: partial.exists() and partial.stat().st_size, "the room that is taken")
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
    main([f"{server.url}?signature=geheim"])
    said = capsys.readouterr().out
    assert f"{server.url}: whole. 1,797 samples in 26 shards" in said and "geheim" not in said
    assert "26 of the shards were fetched, 0 are proven by the copies kept" in said and "--cache-dir" not in said
    os.unlink(next((tmp_path / "dist_train").glob("*.tar")))
    main([server.url])
    assert f"1 of the shards were fetched, 25 are proven by the copies kept in {tmp_path}/dist_train" in capsys.readouterr().out
    main([server.url, "--cache-dir", str(tmp_path / "another")])
    assert f"26 of the shards were fetched, 0 are proven by the copies kept in {tmp_path}/another" in capsys.readouterr().out
    split = load_index(server.url, str(tmp_path / "another")).split("train")
    assert f"dist-train verify {server.url}" in str(Store(split).fault(0, "checksum differs from the index"))
    inspect_main([server.url, "--out", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    server.faults["val-000000.tar"] = ["damaged"] * 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="val-000000.tar: cannot be fetched: the checksum of what came differs"):
        main([server.url])


def test_verify_fetches_a_damaged_copy_again(server, tmp_path, monkeypatch, capsys):
    from dist_train.verify import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    main([server.url])
    split = load_index(server.url).split("test")
    kept = tmp_path / "dist_train" / f"{split.shard_checksums[0]}.tar"
    whole = kept.read_bytes()
    kept.write_bytes(bytes(len(whole)))  # as a power cut may leave it
    reader = split.remote.open(split, 0)
    with pytest.raises(UserError, match=f"kept as {kept}.: the kept copy is damaged, and in use by others"):
        main([server.url])
    os.close(reader)
    main([server.url])
    assert kept.read_bytes() == whole


def test_damage_in_the_cache_names_the_url_and_the_kept_file(many, server, tmp_path):
    store = Store(load_index(server.url, str(tmp_path)).split("test"))
    store.locate(np.array([0]))
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

    def fetched() -> list[str]:
        return [name for name in server.requests if name.endswith(".tar")]

    with ReadAhead(store, iter(upcoming), distance, num_threads=1):
        wait_for(lambda: len(fetched()) >= 4, "four fetches ahead")
        time.sleep(0.3)
        assert fetched() == split.files[:4]
        for samples in upcoming[:10]:
            store.locate(samples)
        wait_for(lambda: len(fetched()) > 10, "fetches that keep ahead")
        time.sleep(0.3)
        assert len(fetched()) <= 15 and len(fetched()) == len(set(fetched()))
    wait_for(lambda: not threads_of("fetch"), "the end of its thread")
    done = len(server.requests)
    for samples in upcoming[:10]:
        store.locate(samples)
    time.sleep(0.3)
    assert len(server.requests) == done  # its threads have ended


def test_batches_that_are_kept_are_not_looked_at_without_end(many, server, tmp_path):
    store = Store(load_index(server.url, str(tmp_path)).split("train"), 2)
    with ReadAhead(store, itertools.repeat(np.zeros(0, np.int64)), 1 << 20) as ahead:
        for num_read in (0, 500):  # by so much the reader has moved on
            ahead.num_read, most = num_read, shard_cache._IDLE_BATCHES + num_read
            wait_for(lambda ahead=ahead, most=most: ahead.num_looked > most, "a look at what comes")
            time.sleep(0.2)
            assert ahead.num_looked == most + 1


def test_another_set_at_the_same_url_is_noticed(many, server, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(many, copied)
    server.folder = copied
    before = batches_of(load_index(server.url, str(tmp_path / "cache")), 3)
    shutil.rmtree(copied)
    sharded(copied, "--source", "sklearn", "--dataset", "digits", "--seed", "5")
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
    with locked(tmp_path / "x.lock"), open(tmp_path / "x.lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "x.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_few_payloads_of_a_shard_come_alone_and_many_bring_the_shard(many, server, tmp_path):
    local = Store(load_index(many).split("train"))
    store = Store(load_index(server.url, str(tmp_path)).split("train"))
    few = np.array([5, 80, 6, 900])
    assert list(store.payloads(few)) == list(local.payloads(few))
    rows = [local.table[k] for k in few.tolist()]
    files = [local.split.files[k] for k in local.split.shard_of(few)]
    wanted = [(file, row["offset"], row["offset"] + row["size"]) for file, row in zip(files, rows, strict=True)]
    assert sorted(server.ranges) == sorted(wanted)
    assert not list(tmp_path.glob("*.tar")) and server.count(".tar") == 4
    first = np.arange(local.split.first[1])  # all of a shard
    assert list(store.payloads(first)) == list(local.payloads(first))
    assert [path.stem for path in tmp_path.glob("*.tar")] == [local.split.shard_checksums[0]]
    assert store.payload(7) == local.payload(7) and server.count(".tar") == 5  # which is there now


def test_payloads_asked_for_one_by_one_bring_the_shard_in_the_end(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MOST_SINGLY", 3)
    store = Store(load_index(server.url, str(tmp_path)).split("train"))
    assert len({store.payload(k) for k in range(6)}) == 6
    assert len(server.ranges) == 3 and server.count(".tar") == 4


def test_a_server_without_ranges_sends_the_shard_once(many, server, tmp_path):
    local, server.has_ranges = Store(load_index(many).split("test")), False
    store = Store(load_index(server.url, str(tmp_path)).split("test"))
    assert [store.payload(k) for k in range(9)] == [local.payload(k) for k in range(9)]
    assert not server.ranges and server.count(".tar") == 2  # asked for a part, answered with the whole; then fetched


def test_a_part_that_differs_from_its_checksum_is_taken_from_the_proven_shard(many, server, tmp_path):
    local = Store(load_index(many).split("test"))
    store = Store(load_index(server.url, str(tmp_path)).split("test"))
    server.faults["test-000000.tar"] = ["other part"]
    assert store.payload(3) == local.payload(3)
    assert server.count(".tar") == 2 and len(list(tmp_path.glob("*.tar"))) == 1


@pytest.mark.parametrize("fault", [503, "truncated", "reset", "stuck"])
def test_a_part_is_asked_for_again_where_that_helps(many, server, tmp_path, fault, monkeypatch):
    if fault == "stuck":
        monkeypatch.setattr(remote, "SILENCE_S", 1)
    store = Store(load_index(server.url, str(tmp_path)).split("test"))
    server.faults["test-000000.tar"] = [fault]
    assert store.payload(3) == Store(load_index(many).split("test")).payload(3)
    assert server.count(".tar") == 2 and not list(tmp_path.glob("*.tar"))
    server.faults["test-000000.tar"] = [403]
    with pytest.raises(UserError, match="access is refused"):
        store.payload(4)


def test_a_contact_sheet_of_a_set_behind_a_url_leaves_its_shards_there(many, server, tmp_path, monkeypatch):
    from dist_train.contact_sheet import draw_samples

    index = load_index(server.url, str(tmp_path))
    monkeypatch.setattr("dist_train.contact_sheet._PER_CLASS", 1)
    there = draw_samples(index, tmp_path / "remote.png").read_bytes()
    assert there == draw_samples(load_index(many), tmp_path / "local.png").read_bytes()
    assert len(server.ranges) == server.count(".tar") == 10 and not list(tmp_path.glob("*.tar"))


# Tars made by others, behind a URL


@pytest.fixture
def foreign_tars(server, tmp_path) -> Path:
    server.folder = tmp_path / "tars"
    for k, name in enumerate(("train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar")):
        write_tar(server.folder / name, pairs(*range(k * 20, k * 20 + 20)))
    return server.folder


def test_tars_behind_urls_are_indexed_and_give_the_batches_of_the_same_tars_here(foreign_tars, server, tmp_path, capsys):
    cache = tmp_path / "cache"
    names = [f"{server.url}/train-{{000000..000002}}.tar", f"{server.url}/val-000000.tar"]
    foreign.main([*names, "--out", str(tmp_path / "index"), "--cache-dir", str(cache)])
    local = foreign.index_tars(foreign_tars)
    index = load_index(tmp_path / "index", str(cache))
    assert (index.mean, index.std, index.classes) == (local.mean, local.std, local.classes)
    assert index.split("train").files[1] == f"{server.url}/train-000001.tar"
    assert index.split("train").fingerprint() == local.split("train").fingerprint()
    before = server.count(".tar")
    settings = {"batch_size": 8, "num_steps": 20, "image_size": 8, "crop": "random_resized"}
    assert batches_of(index, **settings) == batches_of(foreign_tars, **settings)
    assert server.count(".tar") == before  # what was fetched for the index is still there
    elsewhere = load_index(tmp_path / "index", str(tmp_path / "other cache"))
    assert batches_of(elsewhere, **settings) == batches_of(foreign_tars, **settings)
    assert server.count(".tar") == before + 3


def test_dalis_index_behind_a_url_is_held_against_its_tar(foreign_tars, server, tmp_path, capsys):
    listed = dali_index(foreign_tars / "train-000000.tar")
    url, cache = f"{server.url}/train-000000.tar?signature=secret", ShardCache(tmp_path / "cache", 10**9)
    assert foreign.index_tars(url, out=tmp_path / "index", cache=cache).split("train").num_samples == 20
    assert server.count(".idx") == 1
    listed.write_text(listed.read_text().replace(" 512 ", " 1024 ", 1))
    with pytest.raises(UserError, match=r"http://\S*/train-000000.idx: does not fit train-000000.tar: .*no such member") as told:
        foreign.index_tars(url, out=tmp_path / "index", cache=cache)
    assert "secret" not in str(told.value)
    server.faults["train-000000.idx"] = [403]  # S3's answer to whoever may not list what is there
    foreign.index_tars(url, out=tmp_path / "index", cache=cache)
    server.faults["train-000000.idx"] = [500] * tries.TRIES
    foreign.index_tars(url, out=tmp_path / "index", cache=cache)
    assert "train-000000.idx: cannot be fetched" in capsys.readouterr().err


def test_names_beyond_ascii_are_fetched_and_what_is_no_url_is_named(many, server):
    (server.folder / "%C3%BC%20b.tar").write_bytes(b"payload")
    assert remote.read_small(f"{server.url}/%C3%BC%20b.tar") == remote.read_small(f"{server.url}/ü b.tar") == b"payload"
    for url in ("http://[::1/x", f"http://{'a' * 70}.example/x", "http://127.0.0.1:port/x"):
        with pytest.raises(UserError, match="is no URL"):
            load_index(url)


def test_a_run_trains_on_tars_behind_urls(foreign_tars, server, tmp_path, capsys):
    from dist_train.train import run_training

    out, cache = str(tmp_path / "index"), str(tmp_path / "cache")
    foreign.main([f"{server.url}/{{train-000000,train-000001,val-000000}}.tar", "--out", out, "--cache-dir", cache])
    argv = ["--data.cache_dir", cache, "--data.global_batch_size", "8", "--train.max_steps", "2"]
    assert run_training(tiny_run(out, tmp_path / "run", *argv)) == 0
    assert [line["step"] for line in lines_of(tmp_path / "run", "train")] == [1, 2]


def test_verify_inspect_and_plan_know_tars_behind_urls(foreign_tars, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = str(tmp_path / "index")
    foreign.main([f"{server.url}/train-000000.tar", "--out", out])
    verify.main([out])
    verify.inspect_main([out])
    plan.main(["--shards", out, "--global-batch-size", "4", "--json"])
    said = capsys.readouterr().out
    assert "whole. 20 samples in 1 shards" in said and f"{out}/inspect.png" in said
    assert f'"shards": ["{server.url}/train-000000.tar"]' in said
    write_tar(foreign_tars / "train-000000.tar", pairs(*range(20, 40)))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        UserError, match=f"(?s)train-000000.tar: cannot be fetched: .*dist-train index {server.url}.* --out {out}"
    ):
        verify.main([out])


def test_indexing_keeps_the_cache_below_its_limit(foreign_tars, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 0.1)
    size = max(path.stat().st_size for path in foreign_tars.iterdir())
    cache = ShardCache(tmp_path / "cache", int(2.5 * size))
    foreign.index_tars(f"{server.url}/train-{{000000..000002}}.tar", out=tmp_path / "index", cache=cache)
    kept = list((tmp_path / "cache").glob("*.tar*"))
    assert len(kept) == 2 and not [path for path in kept if path.suffix == ".partial"]
    with pytest.raises(UserError, match=r"train-000000.tar: has [\d,]+ bytes, and shards may take"):
        small = ShardCache(tmp_path / "small", size // 2)
        foreign.index_tars(f"{server.url}/train-000000.tar", out=tmp_path / "index", cache=small)
    assert not list((tmp_path / "small").glob("*.tar*"))


def test_a_tar_is_on_the_disk_before_it_counts_as_whole(foreign_tars, server, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size)))
    with ShardCache(tmp_path / "cache", 10**9).fetched(f"{server.url}/train-000000.tar") as path:
        size = path.stat().st_size
    ((name, num_bytes),) = synced
    assert name.endswith(".tar.partial") and num_bytes == size


def test_indexing_waits_for_the_room_that_another_tar_takes(foreign_tars, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 0.1)
    size = max(path.stat().st_size for path in foreign_tars.iterdir())
    cache = ShardCache(tmp_path / "cache", int(1.5 * size))

    def fetch() -> str:
        with cache.fetched(f"{server.url}/train-000001.tar") as path:
            return file_checksum(path)

    with ThreadPoolExecutor(1) as pool:
        with cache.fetched(f"{server.url}/train-000000.tar"):
            second, said = pool.submit(fetch), []
            wait_for(lambda: said.append(capsys.readouterr().err) or "waiting for room to fetch" in "".join(said), "a word of it")
            time.sleep(0.3)
            assert not second.done()
        assert second.result(timeout=30) == file_checksum(foreign_tars / "train-000001.tar")
    assert ("".join(said) + capsys.readouterr().err).count("waiting for room to fetch") == 1


def test_faults_of_tars_behind_urls_name_the_url(foreign_tars, server, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**9)
    with pytest.raises(UserError, match=f"{server.url}/train-9.tar: there is no such file"):
        foreign.index_tars(f"{server.url}/train-9.tar?key=geheim", out=tmp_path / "index", cache=cache)
    (foreign_tars / "train-1.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match=f"{server.url}/train-1.tar: cannot be read as a tar: it is compressed"):
        foreign.index_tars(f"{server.url}/train-1.tar", out=tmp_path / "index", cache=cache)
    server.has_ranges = False  # then sizes come with the file
    server.faults["train-000000.tar"] = ["none", "truncated", 503]
    index = foreign.index_tars(f"{server.url}/train-000000.tar", out=tmp_path / "index", cache=cache)
    assert index.split("train").num_samples == 20


def test_a_wids_list_behind_a_url_names_tars_beside_it(foreign_tars, server, tmp_path):
    wids = {"__kind__": "wids-shard-index-v1", "shardlist": [{"url": "train-000002.tar", "nsamples": 20}]}
    (foreign_tars / "shards.json").write_text(json.dumps(wids))
    cache = ShardCache(tmp_path / "cache", 10**9)
    index = foreign.index_tars(f"{server.url}/shards.json?sig=1", out=tmp_path / "index", cache=cache)
    assert index.split("train").files == [f"{server.url}/train-000002.tar?sig=1"]
    assert "sig" not in index.split("train").names()[0]


def test_object_storage_is_read_in_parts_too_and_its_tars_are_indexed(foreign_tars, server, tmp_path, monkeypatch):
    pytest.importorskip("obstore")
    settings = {"ENDPOINT_URL": server.url.removesuffix("/set"), "ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "word"}
    for name, value in (settings | {"REGION": "x"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    body = (foreign_tars / "val-000000.tar").read_bytes()
    assert remote.file_size("s3://set/val-000000.tar") == len(body)
    assert remote.read_range("s3://set/val-000000.tar", 700, 99) == body[700:799]
    assert server.ranges == [("val-000000.tar", 700, 799)]
    cache = ShardCache(tmp_path / "cache", 10**9)
    index = foreign.index_tars("s3://set/train-{000000..000001}.tar", out=tmp_path / "index", cache=cache)
    assert index.split("train").num_samples == 40
    store = Store(load_index(tmp_path / "index", str(tmp_path / "empty")).split("train"))
    row = store.table[23]
    tar = (foreign_tars / "train-000001.tar").read_bytes()
    assert store.payload(23) == tar[int(row["offset"]) :][: int(row["size"])] and not (tmp_path / "empty").exists()
    with pytest.raises(UserError, match="s3://set/absent.tar: there is no such file"):
        remote.read_range("s3://set/absent.tar", 0, 9)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_nothing_left_to_fetch_is_no_work_and_no_thread_outlives_its_stream(many, server, tmp_path, cache):
    index = load_index(server.url, str(tmp_path))
    stream = open_stream(index, batch_size=48, window_shards=24, cache=cache, threads=1)
    for _ in range(60):  # all shards, and an epoch besides
        next(stream)
    began = time.process_time()
    time.sleep(1)
    assert time.process_time() - began < 0.5
    stream.close()
    wait_for(lambda: not threads_of("fetch"), "the end of its threads")


# A server that is away for a while


def test_a_stream_outlives_a_server_that_is_busy_for_a_while(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(tries, "PATIENCE_S", 60)
    monkeypatch.setattr(tries, "LONGEST_WAIT_S", 0.05)
    index = load_index(server.url, str(tmp_path))
    server.faults |= {path.name: [503] * 8 for path in Path(many).glob("train-*.tar")}
    assert batches_of(index, 6) == batches_of(many, 6)


def test_a_stop_ends_the_wait_for_a_server(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(tries, "PATIENCE_S", 600)
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 100)
    monkeypatch.setattr(tries, "LONGEST_WAIT_S", 100)
    store = Store(load_index(server.url, str(tmp_path)).split("test"))
    server.faults["test-000000.tar"] = [503] * 9
    stop_while_it_fetches(store, server)
    assert server.count(".tar") == 1


def test_waiting_for_another_who_fetches_counts_as_waiting_for_the_server(many, server, tmp_path, monkeypatch):
    split = load_index(server.url, str(tmp_path)).split("test")
    waited = []

    def download(*rest, waited_s, **how):
        waited.append(waited_s)
        return remote.download(*rest, **how)

    monkeypatch.setattr(shard_cache, "download", download)
    with ThreadPoolExecutor(1) as pool:
        with open(tmp_path / f"{split.shard_checksums[0]}.tar.partial", "w") as partial:
            fcntl.flock(partial, fcntl.LOCK_EX)
            fetching = pool.submit(split.remote.open, split, 0)
            time.sleep(0.5)
            os.unlink(partial.name)  # as whoever gives up does
        os.close(fetching.result(timeout=30))
    os.unlink(tmp_path / f"{split.shard_checksums[0]}.tar")
    os.close(split.remote.open(split, 0))
    assert waited[0] > 0.3 and waited[1:] == [0]


# Object storage: names, credentials, clients


@pytest.fixture
def object_storage(server, tmp_path, monkeypatch) -> FaultyServer:
    """The server as S3, with the file sets/x.bin in each of its buckets. It also gives the credentials of a role."""
    pytest.importorskip("obstore")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    base = server.url.removesuffix("/set")
    for name, value in {"ENDPOINT_URL": base, "METADATA_ENDPOINT": base, "REGION": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server.answers = {"sets/x.bin": b"payload", "sets/credentials/metadata.bin": b"payload"}
    give_credentials(server, "2099-01-01T00:00:00Z")
    return server


def give_credentials(server, expiration: str) -> None:
    role = {"AccessKeyId": "me", "SecretAccessKey": "word", "Token": "t", "Expiration": expiration}
    role |= {"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2024-01-01T00:00:00Z"}
    folder = "meta-data/iam/security-credentials"
    server.answers |= {"api/token": b"t", f"{folder}/": b"role", f"{folder}/role": json.dumps(role).encode()}


def test_a_busy_bucket_is_asked_again_whatever_its_name(object_storage, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
    for place in ("corp-metadata/sets/x.bin", "credentials/sets/x.bin", "data/sets/credentials/metadata.bin"):
        object_storage.faults[place.partition("/")[2]] = ["hang up", 503]
        assert remote.read_small(f"s3://{place}") == b"payload"
    assert len(object_storage.requests) == 3 * 3
    for more, (fault, reason) in enumerate(((400, "400 Bad Request"), (301, "incorrectly configured region")), 1):
        object_storage.faults["sets/x.bin"] = [fault] * 9
        with pytest.raises(UserError, match=f"s3://data/sets/x.bin: cannot be fetched: .*{reason}"):
            remote.read_small("s3://data/sets/x.bin")
        assert len(object_storage.requests) == 3 * 3 + more, "a request that is wrong was made again"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="(?s)half/sets/x.bin: access is refused: .*Missing SecretAccessKey.*credentials") as told:
        remote.read_small("s3://half/sets/x.bin")
    assert "tries" not in str(told.value)


def test_credentials_that_cannot_be_had_are_final_at_the_start_and_a_passing_fault_later(object_storage):
    give_credentials(object_storage, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120)))  # soon asked for again
    object_storage.faults["api/token"] = [404] * 9
    with pytest.raises(UserError, match="(?s)s3://other/sets/x.bin: access is refused: .*Set credentials"):
        remote.read_small("s3://other/sets/x.bin")
    assert object_storage.requests == ["api/token"]
    object_storage.faults["api/token"] = [503]  # whoever gives them may be busy even then
    assert remote.read_small("s3://role/sets/x.bin") == b"payload"
    for fault in (404, 503):
        time.sleep(0.3)  # what was given is used for 0.1 s
        object_storage.faults["meta-data/iam/security-credentials/role"] = [fault, fault]
        before = object_storage.count("/role")
        assert remote.read_small("s3://role/sets/x.bin") == b"payload"
        assert object_storage.count("/role") == before + 3


def test_clients_of_object_storage_keep_their_credentials(object_storage, monkeypatch):
    def read() -> bytes:
        return remote.read_small("s3://kept/sets/x.bin")

    with ThreadPoolExecutor(4) as pool:
        read()
        assert {pool.submit(read).result() for _ in range(8)} == {b"payload"}
    assert remote.read_range("s3://kept/sets/x.bin", 1, 3) == b"ayl" and remote.file_size("s3://kept/sets/x.bin") == 7
    assert object_storage.count("api/token") == 1
    monkeypatch.setenv("AWS_REGION", "y")
    assert read() == b"payload" and object_storage.count("api/token") == 2  # other settings, another client


# A disk that is smaller than data.cache_gb


def written(folder: Path) -> int:
    """Bytes of its disk that shards take."""
    total = 0
    for path in folder.glob("*.tar*"):
        with contextlib.suppress(FileNotFoundError):
            total += 512 * path.stat().st_blocks
    return total


def give_disk(monkeypatch, folder: Path, num_bytes: int) -> None:
    """Let the folder's disk have so much room, as far as it says."""

    def statvfs(path):
        return SimpleNamespace(f_blocks=num_bytes, f_frsize=1, f_bavail=max(0, num_bytes - written(folder)))

    monkeypatch.setattr(os, "statvfs", statvfs)


def give_quota(monkeypatch, folder: Path, num_bytes: int) -> None:
    """Refuse what is written beyond so many bytes, without a word before."""

    def download(url, file, *rest, **how):
        checksum = remote.download(url, file, *rest, **how)
        beyond = written(folder) - num_bytes
        if beyond > 0:
            file.truncate(max(0, os.fstat(file.fileno()).st_size - beyond))
            with writing(file.name):
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return checksum

    monkeypatch.setattr(shard_cache, "download", download)


def test_shards_make_way_on_a_disk_smaller_than_the_limit(many, server, tmp_path, monkeypatch):
    split = load_index(server.url, str(tmp_path)).split("train")
    num_bytes = 6 * int(split.shard_bytes.max())
    give_disk(monkeypatch, tmp_path, num_bytes)
    most = 0
    for k in range(split.num_shards):
        os.close(split.remote.open(split, k))
        most = max(most, sum(path.stat().st_size for path in tmp_path.glob("*.tar")))
    assert 0.7 * num_bytes < most <= 0.9 * num_bytes, "a tenth is left to others"
    assert server.count(".tar") == split.num_shards == 24


def test_shards_in_use_may_fill_the_disk_and_then_it_is_named(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 0.1)
    split = load_index(server.url, str(tmp_path)).split("train")
    give_disk(monkeypatch, tmp_path, 6 * int(split.shard_bytes.max()) + 50_000)
    fds = [split.remote.open(split, k) for k in range(6)]
    with pytest.raises(UserError, match=r"(?s)no room to fetch .*all shards there are in use, and its disk, or a "
                                        r"quota on it, leaves .*data.cache_gb is 100.*set data.cache_dir"):  # fmt: skip
        split.remote.open(split, 6)
    for fd in fds:
        os.close(fd)
    give_disk(monkeypatch, tmp_path, 1000)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"(?s)train-000006.tar: has [\d,]+ bytes, and its disk, .*data.cache_gb .*data.cache_dir"):
        split.remote.open(split, 6)
    assert not list(tmp_path.glob("*.tar*"))


def test_a_stream_that_does_not_fit_the_disk_is_refused_at_once(many, server, tmp_path, monkeypatch):
    index = load_index(server.url, str(tmp_path))
    give_disk(monkeypatch, tmp_path, 5 * int(index.split("train").shard_bytes.max()))
    with pytest.raises(UserError, match=r"(?s)10 shards of .*but its disk, .*data.cache_dir.*, or lower data.window_shards"):
        batches_of(index)
    assert batches_of(index, window_shards=1, lanes=1) == batches_of(many, window_shards=1, lanes=1)
    assert written(tmp_path) <= 5 * int(index.split("train").shard_bytes.max())


def test_shards_make_way_where_a_quota_is_met(many, server, tmp_path, monkeypatch):
    split = load_index(server.url, str(tmp_path)).split("train")
    give_quota(monkeypatch, tmp_path, int(4.5 * split.shard_bytes.max()))
    for k in range(split.num_shards):
        os.close(split.remote.open(split, k))
    kept = {path.stem for path in tmp_path.glob("*.tar")}
    assert kept == set(split.shard_checksums[-len(kept) :]) and len(kept) >= 3  # the last ones
    assert server.count(".tar") <= split.num_shards + 2, "the quota was met again and again"
    assert not list(tmp_path.glob("*.partial"))


def test_a_quota_without_shards_that_could_make_way_is_named(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 0.1)
    split = load_index(server.url, str(tmp_path)).split("train")
    give_quota(monkeypatch, tmp_path, int(2.5 * split.shard_bytes.max()))
    fds = [split.remote.open(split, k) for k in range(2)]
    with pytest.raises(UserError, match=r"(?s)no room to fetch .*train-000002.tar.*a quota on it.*data.cache_gb.*data.cache_dir"):
        split.remote.open(split, 2)
    assert not list(tmp_path.glob("*.partial"))
    for fd in fds:
        os.close(fd)
    os.close(split.remote.open(split, 2))


def test_indexing_makes_way_where_a_quota_is_met(foreign_tars, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "file_size", lambda url: None)  # a server that does not say
    size = max(path.stat().st_size for path in foreign_tars.iterdir())
    give_quota(monkeypatch, tmp_path / "cache", int(1.5 * size))
    cache = ShardCache(tmp_path / "cache", 10**11)
    index = foreign.index_tars(f"{server.url}/train-{{000000..000002}}.tar", out=tmp_path / "index", cache=cache)
    assert index.split("train").num_samples == 60


def test_shards_make_way_for_the_files_of_an_index(many, server, tmp_path, monkeypatch):
    split = load_index(server.url, str(tmp_path)).split("train")
    for k in range(3):
        os.close(split.remote.open(split, k))

    def download(url, file, **how):
        if list(tmp_path.glob("*.tar")) or "val" in url:
            with writing(file.name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return remote.download(url, file, **how)

    monkeypatch.setattr(remote_index, "download", download)
    assert load_index(server.url, str(tmp_path)).split("train").num_samples > 0
    assert not list(tmp_path.glob("*.tar"))
    shutil.rmtree(next(tmp_path.glob("index-*")))
    with pytest.raises(UserError, match="(?s)val.*No space left on device.*set data.cache_dir"):
        load_index(server.url, str(tmp_path))


@pytest.mark.parametrize("says", ["how much it has", "nothing"])
def test_a_small_disk_holds_what_it_can(many, server, tmp_path, says):
    """On a real one, as it is seen, and as a quota is not."""
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    size = int(load_index(many).split("train").shard_bytes.max())
    code = """
import os, sys, types
from dist_train.index import load_index
if sys.argv[3] == "nothing":
    os.statvfs = lambda path: types.SimpleNamespace(f_blocks=10**12, f_frsize=1, f_bavail=10**12)
split = load_index(sys.argv[1], sys.argv[2]).split("train")
for k in range(split.num_shards):
    fd = split.remote.open(split, k)
    assert os.fstat(fd).st_size == split.shard_bytes[k]
    os.close(fd)
print(len([name for name in os.listdir(sys.argv[2]) if name.endswith(".tar")]))
"""
    mount = 'mount -t tmpfs -o "size=$1" none "$2" && shift 2 && exec "$@"'
    python = [sys.executable, "-c", code, server.url, str(tmp_path), says]
    command = [*apart, "sh", "-c", mount, "sh", str(7 * size), str(tmp_path), *python]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 3 <= int(done.stdout) <= 7
