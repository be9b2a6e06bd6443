"""Files behind a URL: fetched whole or in part, tried again where that can help, proven by size and checksum.

https:// and http:// need no package, nor does file://, a folder on a slow disk. s3://, gs:// and az:// are spoken by obstore (pip
install 'dist_train[remote]'), whose settings are the usual environment variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...). Where it is missing, and for every other scheme, fsspec is asked.
"""

import contextlib
import functools
import http.client
import importlib.util
import os
import posixpath
import re
import string
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import BinaryIO
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

import xxhash

from dist_train.durable import writing
from dist_train.errors import UserError
from dist_train.tries import Damaged, Server, Transient, server_of, tried

SILENCE_S = 60  # a server that sends nothing for this long is taken to be gone
_CHUNK = 1 << 20
_OBJECT_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss")
_RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504, 520, 522, 524)  # of HTTP: a later try may meet another
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_")  # variables that obstore reads
_SECRETS = re.compile(r"(?<=://)[^/@\s]+@|(?<=\?)\S+")
_CREDENTIALS = re.compile(r"credential|metadata|access.?key|169\.254\.|performing (?:POST|PUT)\b", re.IGNORECASE)  # not GET


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL rather than a folder."""
    return "://" in str(path)


def join(url: str, name: str) -> str:
    """The URL of a file below a URL; a query (a signature, say) stays at the end. A name that is a URL stands for itself."""
    if is_remote(name):
        return name
    parts = split_url(url)
    if parts.scheme == "file":  # an index may name tars elsewhere by their whole paths
        return urlunsplit(parts._replace(path=posixpath.join(parts.path, quote(name))))
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def on_disk(url: str) -> str:
    """The folder that a file:// URL names; other URLs, and paths, as they are."""
    return unquote(split_url(url).path) if url.startswith("file:///") else url


def split_url(url: str) -> SplitResult:
    """The parts of a URL. Raises UserError if it is none."""
    try:
        return urlsplit(url)
    except ValueError as error:
        raise UserError(f"{shown(url)}: is no URL: {error}.") from None


def shown(url: str) -> str:
    """The URL without a password or signature in it, for messages; a path as it is."""
    return _SECRETS.sub("", url).rstrip("?") if is_remote(url) else url


def without_secrets(tree: dict) -> dict:
    """Nested settings with every URL as `shown` gives it, for pages and servers."""
    return {
        key: without_secrets(value) if isinstance(value, dict) else shown(value) if isinstance(value, str) else value
        for key, value in tree.items()
    }


def download(
    url: str, file: BinaryIO, num_bytes: int | None = None, checksum: str | None = None, advice: str = "",
    is_wanted: Callable[[], bool] = lambda: True, waited_s: float = 0.0, is_patient: bool = False,
) -> str:  # fmt: skip
    """Write what lies at the URL into an open file, from its start; return the xxh3_128, hex.

    Tried again where the fault may pass (`tries.tried`; is_patient as there): a busy or failing server, a broken connection; twice
    where the size or the checksum is not the one given. waited_s: how long the caller has waited for others to fetch it. Raises
    UserError, naming the URL and the last reason, after that, and at once where trying again is useless: no such file, no
    permission; InterruptedError once is_wanted() is false.
    """
    how = {"is_wanted": is_wanted, "is_patient": is_patient, "waited_s": waited_s}
    return _tried(url, lambda: _fetch(url, file, num_bytes, checksum, is_wanted), advice=advice, **how)


def read_range(url: str, offset: int, num_bytes: int) -> bytes | None:
    """The num_bytes > 0 bytes of a file from offset on; None where only the whole can be had.

    None: the server does not know ranges (it answers 200 instead of 206; RFC 9110, section 14), or the file ends before. Tried and
    raises as `download`, with less patience.
    """

    def attempt() -> bytes | None:
        try:
            found = b"".join(_chunks(url, (offset, offset + num_bytes)))
        except _NoRange:
            return None
        if len(found) != num_bytes:
            raise Damaged(f"{len(found):,} bytes came, {num_bytes:,} were asked for")
        return found

    return _tried(url, attempt)


def read_small(url: str) -> bytes:
    """All bytes of a file that fits into memory. Tried and raises as `read_range`."""
    return _tried(url, lambda: b"".join(_chunks(url)))


def file_size(url: str) -> int | None:
    """Bytes of the file, without fetching it; None where the server does not say. Tried and raises as `download`."""
    scheme = split_url(url).scheme
    is_object = scheme in _OBJECT_SCHEMES and _has_obstore()
    look = _object_size if is_object else {"file": _disk_size, "http": _http_size, "https": _http_size}.get(scheme)
    return _tried(url, lambda: look(url)) if look else None


def _tried(url: str, attempt: Callable, **how):
    return tried(_server(url), shown(url), attempt, **how)


def _server(url: str) -> Server:
    parts = split_url(url)
    return server_of(f"{parts.scheme}://{parts.netloc}")


class _NoRange(Exception):
    """The server sends the whole file only, or the file ends before the range does."""


def _fetch(url: str, file: BinaryIO, num_bytes, checksum, is_wanted) -> str:
    digest, received = xxhash.xxh3_128(), 0
    file.seek(0)
    if not is_wanted():
        raise InterruptedError(f"{shown(url)}: no longer wanted")
    for chunk in _chunks(url):
        if not is_wanted():
            raise InterruptedError(f"{shown(url)}: no longer wanted")
        digest.update(chunk)
        received += len(chunk)
        if num_bytes is not None and received > num_bytes:
            break  # whatever it is, it must not fill the disk
        with writing(file.name):
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
    if num_bytes is not None and received != num_bytes:
        found = "more" if received > num_bytes else f"{received:,}"
        raise Damaged(f"{found} bytes came, {num_bytes:,} were expected")
    if checksum is not None and digest.hexdigest() != checksum:
        raise Damaged("the checksum of what came differs from the index")
    file.truncate(received)
    return digest.hexdigest()


def _chunks(url: str, span: tuple[int, int] | None = None) -> Iterator[bytes]:
    """The file's bytes, or those of a span (first, stop), piece by piece. Raises Transient, _NoRange or UserError."""
    server, heard_at = _server(url), 0.0
    try:
        for chunk in _pieces(url, span):
            server.heard_at = heard_at = time.monotonic()
            yield chunk
    except Transient as fault:
        fault.heard_at = heard_at
        raise


def _pieces(url: str, span: tuple[int, int] | None) -> Iterator[bytes]:
    scheme = split_url(url).scheme
    if scheme in ("http", "https"):
        return _http_chunks(url, span)
    if scheme in _OBJECT_SCHEMES and _has_obstore():
        return _object_chunks(url, span)
    return _disk_chunks(url, span) if scheme == "file" else _fsspec_chunks(url, span)


def _has_obstore() -> bool:
    return importlib.util.find_spec("obstore") is not None


def _http_chunks(url: str, span: tuple[int, int] | None) -> Iterator[bytes]:
    with _http_answer(url, span) as answer:
        if span and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {span[0]}-{span[1] - 1}/"):
            raise _NoRange
        while chunk := answer.read(_CHUNK):
            yield chunk
        if getattr(answer, "length", None):  # of the bytes announced, so many did not come
            raise Transient(f"the connection ended {answer.length:,} bytes early")


def _http_size(url: str) -> int | None:
    with contextlib.suppress(_NoRange), _http_answer(url, (0, 1)) as answer:  # a GET: some servers refuse HEAD
        headers = answer.headers
        total = (headers.get("Content-Range") or "").rpartition("/")[2] or headers.get("Content-Length") or ""
        return int(total) if total.isdigit() else None
    return None


@contextlib.contextmanager
def _http_answer(url: str, span: tuple[int, int] | None):
    headers = {"User-Agent": "dist_train"} | ({"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {})
    try:
        try:
            request = urllib.request.Request(quote(url, safe=string.punctuation), headers=headers)
            answer = urllib.request.urlopen(request, timeout=SILENCE_S)
        except (ValueError, http.client.InvalidURL) as error:
            raise UserError(f"{shown(url)}: is no URL: {error}.") from None
        with answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise _NoRange from None
        if error.code in _RETRIED_STATUSES:
            raise Transient(f"the server says {error.code} {error.reason}") from None
        raise _refused(url, error.code, f"the server says {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Transient(str(getattr(error, "reason", "") or error) or type(error).__name__) from None


def _object_chunks(url: str, span: tuple[int, int] | None) -> Iterator[bytes]:
    with _object_store(url) as (store, path):
        for chunk in store.get(path, options={"range": span} if span else {}).stream(min_chunk_size=_CHUNK):
            yield memoryview(chunk)


def _object_size(url: str) -> int:
    with _object_store(url) as (store, path):
        return store.head(path)["size"]


@contextlib.contextmanager
def _object_store(url: str):
    """(obstore's store of the URL, path in it); its faults become ours."""
    from obstore import exceptions as faults

    parts = split_url(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    endpoint = endpoint if parts.scheme == "s3" else ""
    settings = frozenset(item for item in os.environ.items() if item[0].startswith(_SETTINGS))
    try:
        yield _opened_store(f"{parts.scheme}://{parts.netloc}", endpoint, SILENCE_S, settings), parts.path.lstrip("/")
    except FileNotFoundError as error:
        raise _refused(url, 404, _first_line(error)) from None
    except (faults.PermissionDeniedError, faults.UnauthenticatedError) as error:
        raise _refused(url, 403, _first_line(error)) from None
    except faults.GenericError as error:
        raise _object_fault(url, error, endpoint) from None
    except (OSError, faults.BaseError) as error:
        raise Transient(_first_line(error)) from None


@functools.lru_cache(8)
def _opened_store(base: str, endpoint: str, silence_s: float, settings: frozenset):
    """obstore's store, which keeps its connections and credentials for all threads; another one where a setting has changed."""
    from obstore.store import from_url

    client = {"connect_timeout": f"{silence_s}s", "read_timeout": f"{silence_s}s", "timeout": "1 day"}  # 30 s by default
    if endpoint.startswith("http:"):
        client["allow_http"] = True
    options = {"endpoint": endpoint} if endpoint else {}
    return from_url(base, **options, client_options=client, retry_config={"max_retries": 0})


def _object_fault(url: str, error: Exception, endpoint: str) -> Exception:
    """What a fault comes to that obstore has no name for."""
    status = re.search(r"status code: (\d{3})", str(error))
    # without a place to go: the bucket is of another region
    code = int(status[1]) if status else 301 if "redirect without" in str(error) else 0
    if code == 416:
        return _NoRange()
    if is_of_credentials := _is_of_credentials(url, error, endpoint):
        may_pass = _server(url).heard_at > 0  # whoever gives a role's credentials gives few a second
    else:
        may_pass = not 300 <= code < 500
    if may_pass or code in _RETRIED_STATUSES:
        return Transient(_first_line(error))
    return _refused(url, 401 if is_of_credentials else code, _first_line(error))


def _is_of_credentials(url: str, error: Exception, endpoint: str = "") -> bool:
    """Whether it is credentials that cannot be had, by words that are not those of the URL."""
    parts, text = split_url(url), unquote(str(error))
    for own in filter(None, (parts.path.strip("/"), *parts.netloc.split("@"), split_url(endpoint).hostname)):
        text = re.sub(rf"(?<![\w-]){re.escape(own)}(?![\w-])", "", text)
    return bool(_CREDENTIALS.search(text))


def _disk_chunks(url: str, span: tuple[int, int] | None) -> Iterator[bytes]:
    first, stop = span or (0, sys.maxsize)
    with _disk_file(url) as file:
        file.seek(first)
        while first < stop and (chunk := file.read(min(_CHUNK, stop - first))):
            yield chunk
            first += len(chunk)


def _disk_size(url: str) -> int:
    with _disk_file(url) as file:
        return os.fstat(file.fileno()).st_size


@contextlib.contextmanager
def _disk_file(url: str):
    parts = split_url(url)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{shown(url)}: names a host; expected a whole path with three slashes, such as file:///data/shards.")
    try:
        with open(unquote(parts.path), "rb") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _refused(url, 404, error.strerror) from None
    except PermissionError as error:
        raise Refused(f"{shown(url)}: cannot be read: {error.strerror}.") from None
    except OSError as error:  # of a network disk: a stale handle, a server that is away
        raise Transient(error.strerror or str(error)) from None


def _fsspec_chunks(url: str, span: tuple[int, int] | None) -> Iterator[bytes]:
    import fsspec

    scheme = split_url(url).scheme
    try:
        with fsspec.open(url, "rb") as file:
            if span:
                file.seek(span[0])
                yield file.read(span[1] - span[0])
                return
            while chunk := file.read(_CHUNK):
                yield chunk
    except (ImportError, ValueError) as error:
        package = "dist_train[remote]" if scheme in _OBJECT_SCHEMES else "the package it names"
        raise UserError(f"{shown(url)}: nothing here speaks {scheme}://: {error}\n  Install {package}.") from None
    except FileNotFoundError as error:
        raise _refused(url, 404, _first_line(error)) from None
    except PermissionError as error:
        raise _refused(url, 403, _first_line(error)) from None
    except Exception as error:  # each file system of fsspec has errors of its own
        if _is_of_credentials(url, error) and not _server(url).heard_at:
            raise _refused(url, 401, _first_line(error)) from None
        raise Transient(f"{type(error).__name__}: {_first_line(error)}") from None


class Refused(UserError):
    """The server does not give the file, and will not if asked again."""


class NotThere(Refused):
    """There is no file at the URL."""


def _refused(url: str, code: int, reason: str) -> UserError:
    if code in (404, 410):
        return NotThere(f"{shown(url)}: there is no such file ({reason}).\n  Check the URL; tars are named in full.")
    if code in (401, 403):
        return Refused(f"{shown(url)}: access is refused: {reason}.\n  Set credentials that may read it (s3: AWS_ACCESS_KEY_ID, "
                         f"AWS_SECRET_ACCESS_KEY, AWS_REGION and, off Amazon, AWS_ENDPOINT_URL).")  # fmt: skip
    return Refused(f"{shown(url)}: cannot be fetched: {reason}.")


def _first_line(error: Exception) -> str:
    """What an error says, without the dumps of structures that some bring along."""
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r" in [\d.]+[mµn]?s\b", "", line.partition(": <")[0])
    return _SECRETS.sub("", f"{line[:240]}{f' ({code[1]})' if code else ''}").rstrip(".")
