"""Tars written many members at a time: byte for byte those written one by one, and what tarfile reads."""

import tarfile

import numpy as np
import pytest

from dist_train.tars import BLOCK, TarWriter, header, headers, is_header

SIZES = [0, 1, 511, 512, 513, 4096, 70_000, 8**7, 8**11 - 1]


def test_many_headers_are_those_made_one_by_one():
    names = [f"{k:08d}.{kind}" for k, kind in enumerate(["jpg", "cls", "png", "npy", "jpg", "a", "x" * 80, "cls", "jpg"])]
    together = headers(names, SIZES)
    assert together == b"".join(map(header, names, SIZES))
    assert all(is_header(together[at : at + BLOCK]) for at in range(0, len(together), BLOCK))
    assert headers([], []) == b""


@pytest.mark.parametrize("name, size", [("x" * 101, 1), ("a.jpg", 8**11)])
def test_what_does_not_fit_a_header_is_refused(name, size):
    with pytest.raises(ValueError, match="does not fit a ustar header"):
        headers(["fits.jpg", name], [5, size])


def test_many_members_make_the_same_tar_as_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    members = [(f"{k:08d}.jpg", rng.bytes(size)) for k, size in enumerate([0, 1, 512, 700, 1024, 30_000] * 5)]
    singly, together = TarWriter(tmp_path / "singly.tar"), TarWriter(tmp_path / "together.tar")
    offsets = [singly.extend([member])[0] for member in members]
    assert together.extend(members[:7]) + together.extend(members[7:]) + together.extend([]) == offsets
    assert (singly.close(), singly.size) == (together.close(), together.size)
    written = (tmp_path / "together.tar").read_bytes()
    assert written == (tmp_path / "singly.tar").read_bytes() and len(written) == together.size
    with tarfile.open(tmp_path / "together.tar") as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()] == members
        assert [m.offset_data for m in tar.getmembers()] == offsets
