"""Shards in a real object store: written over S3, read back as batches, refused without the right keys."""

import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from dist_train import tries
from dist_train.data import open_stream
from dist_train.errors import UserError
from dist_train.index import load_index

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
HERE = Path(__file__).parent
NEEDED = ("swift-proxy-server", "swift-account-server", "swift-container-server", "swift-object-server", "memcached")


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    """Environment of a running object store."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"needs {', '.join(missing) or 'root'}")
    folder = tmp_path_factory.mktemp("swift")
    subprocess.run([HERE / "swift-up.sh", folder], check=True, timeout=60)
    words = (folder / "env").read_text().split()
    yield dict(word.split("=", 1) for word in words if "=" in word)
    subprocess.run([HERE / "swift-down.sh", folder], check=True)


@pytest.fixture
def bucket(swift, digits, monkeypatch) -> str:
    """s3://shards/sets/digits, holding the digits."""
    store_module = pytest.importorskip("obstore.store")
    for name, value in swift.items():
        monkeypatch.setenv(name, value)
    for name, seconds in {"FIRST_WAIT_S": 0.01, "PATIENCE_S": 0, "SHORT_PATIENCE_S": 0}.items():
        monkeypatch.setattr(tries, name, seconds)
    make_bucket(swift, "shards")
    store = store_module.from_url("s3://shards", endpoint=swift["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    for path in Path(digits).iterdir():
        store.put(f"sets/digits/{path.name}", path.read_bytes())
    return "s3://shards/sets/digits"


def make_bucket(swift, name: str) -> None:
    """Through Swift's own API: obstore makes no buckets."""
    user = {"X-Auth-User": swift["AWS_ACCESS_KEY_ID"], "X-Auth-Key": swift["AWS_SECRET_ACCESS_KEY"]}
    with urllib.request.urlopen(urllib.request.Request(f"{swift['AWS_ENDPOINT_URL']}/auth/v1.0", headers=user)) as answer:
        url, token = answer.headers["X-Storage-Url"], answer.headers["X-Auth-Token"]
    request = urllib.request.Request(f"{url}/{name}", method="PUT", headers={"X-Auth-Token": token})
    urllib.request.urlopen(request).close()


def test_batches_from_s3_are_those_from_the_folder(bucket, digits, tmp_path):
    def batches(shards):
        stream = open_stream(shards, batch_size=64, seed=2, threads=2, stop_step=40)
        return [(batch.keys, batch.images.numpy().tobytes()) for batch in stream]

    assert batches(load_index(bucket, str(tmp_path))) == batches(digits)
    assert len(list(tmp_path.glob("*.tar"))) == load_index(digits).split("train").num_shards


def test_what_s3_refuses_is_said_at_once(bucket, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="s3://shards/sets/none/index.json: there is no such file .*NoSuchKey"):
        load_index("s3://shards/sets/none", str(tmp_path))
    with pytest.raises(UserError, match="there is no such file .*NoSuchBucket"):
        load_index("s3://nowhere/sets", str(tmp_path))
    monkeypatch.setattr(tries, "TRIES", 1)  # refusals must not count as faults that pass
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="(?s)access is refused: .*SignatureDoesNotMatch.*Set credentials .*AWS_ACCESS_KEY_ID"):
        load_index(bucket, str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be fetched: .*1 tries"):
        load_index(bucket, str(tmp_path))
