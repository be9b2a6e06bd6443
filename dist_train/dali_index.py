"""DALI's index files (wds2idx): where one lies beside a tar, it must say of the tar what the tar says itself.

    v1.2 2                                        version, number of samples
    jpg 512 10240 a.jpg cls 11264 1 a.cls         per sample: extension, offset, bytes and (from v1.2 on) name of each member

It saves nothing to believe it: every payload is read anyway, for its checksum. But a tar that was replaced or cut after it
was indexed for DALI shows here.
"""

import re
import sys
from pathlib import Path
from urllib.parse import urlunsplit

from dist_train.errors import UserError
from dist_train.remote import Refused, is_remote, read_small, shown, split_url

Member = tuple[str, int, int]  # name, offset of its bytes, number of them

_HEADER = re.compile(r"v1\.(\d+) (\d+)")
_COMPONENT = re.compile(r"(\S*) (\d+) (\d+)(?: |$)")
_NAMED_COMPONENT = re.compile(r"(\S*) (\d+) (\d+) .*?(?= \S* \d+ \d+ |$) ?")  # names may hold blanks


def check_dali_index(tar: str, members: list[Member]) -> None:
    """Compare the index beside a tar, if there is one, with the tar's members. tar: its path or URL.

    Raises UserError where they differ.
    """
    path = _beside(tar)
    lines = _lines(path)
    header = _HEADER.fullmatch(lines[0].strip()) if lines else None
    if not header:
        return  # of another kind
    component = _COMPONENT if int(header[1]) < 2 else _NAMED_COMPONENT
    listed = [found.groups() for line in lines[1:] for found in component.finditer(line.strip())]
    there = {(offset, size): name for name, offset, size in members}
    for extension, offset, size in listed:
        name = there.get((int(offset), int(size)))
        if name is None or name.rpartition("/")[2].partition(".")[2] != extension:
            found = f"{name} there" if name else "no such member there"
            listed_one = f"a .{extension} of {int(size):,} bytes at byte {int(offset):,}"
            raise _differing(path, tar, f"lists {listed_one}, but the tar has {found}")
    visible = sum(not name.rpartition("/")[2].startswith(".") for name, _, _ in members)
    if len(lines) - 1 != int(header[2]) or len(listed) < visible:
        raise _differing(path, tar, f"lists {len(listed):,} members in {len(lines) - 1:,} of {int(header[2]):,} samples, "
                                    f"but the tar has {visible:,} members")  # fmt: skip


def _beside(tar: str) -> str:
    """Where the index of a tar lies. (wds2idx cuts at the first dot, so that of a.0.tar and a.1.tar one is left: not asked for.)"""
    if not is_remote(tar):
        return f"{tar.removesuffix('.tar')}.idx"
    parts = split_url(tar)
    return urlunsplit(parts._replace(path=f"{parts.path.removesuffix('.tar')}.idx"))


def _lines(path: str) -> list[str]:
    """No lines where there is no such file, or none that a server gives. Raises UserError where it cannot be read."""
    try:
        payload = read_small(path) if is_remote(path) else Path(path).read_bytes()
    except (FileNotFoundError, Refused):  # S3 says "refused" of what is not there to whoever may not list
        return []
    except UserError as error:
        print(f"{str(error).splitlines()[0]} It was not held against its tar.", file=sys.stderr)
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    return payload.decode("utf-8", "surrogateescape").splitlines()


def _differing(path: str, tar: str, what: str) -> UserError:
    name = shown(tar).rpartition("/")[2]
    return UserError(
        f"{shown(path)}: does not fit {name}: it {what}.\n"
        f"  If the tar is as it should be, write the index again with wds2idx, or remove it; if not, fetch the tar again."
    )
