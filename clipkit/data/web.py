"""Byte ranges over http(s): connections kept open between requests, redirects, proxies, a deadline for everything.

Each call is one attempt. Transient is what another attempt may mend; UserError is what it cannot.
"""

from __future__ import annotations

import atexit
import base64
import os
import socket
import ssl
import time
import urllib.request
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

import clipkit
from clipkit.errors import UserError

TIMEOUT_S = 30.0
"""Longest silence of a server."""
SLOWEST = 64 * 1024
"""Bytes a second: an answer that comes slower than this is given up."""
CHUNK = 1 << 20
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 8
MAX_IDLE = 32
"""Connections kept open to one host."""


class Transient(Exception):
    """Something that may go well the next time; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


class Answer(NamedTuple):
    """What a server said of a file: `size` is -1 where it did not say."""

    size: int
    version: str
    """ETag, else Last-Modified, else empty."""
    ranges: bool
    data: bytes


def shown(url: str) -> str:
    """The URL as messages name it: without credentials, neither in front of the host nor in a signed query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="..." if parts.query else "").geturl()


def get_range(url: str, offset: int, size: int) -> Answer:
    """Bytes offset ... offset+size-1. Where the server does not cut ranges out, `ranges` is False and no data read."""
    with _asked(url, {"Range": f"bytes={offset}-{offset + size - 1}"}) as response:
        if response.status == 416:  # an empty file has no first byte
            return Answer(_total(response), _version(response), True, b"")
        if response.status != 206 or _total(response) < 0:
            length = response.getheader("Content-Length", "")
            return Answer(int(length) if length.isdigit() else -1, _version(response), False, b"")
        expected = max(0, min(size, _total(response) - offset))
        if not response.getheader("Content-Range", "").startswith(f"bytes {offset}-"):
            raise Transient(f"asked for bytes from {offset}, got {response.getheader('Content-Range')}")
        return Answer(_total(response), _version(response), True, _body(response, expected))


def get_whole(url: str, limit: int = 0) -> Iterator[bytes]:
    """The file in pieces. Raises Transient when it ends early, UserError beyond `limit` bytes (0: none)."""
    with _asked(url, {}) as response:
        length, seen, began = response.getheader("Content-Length", ""), 0, time.monotonic()
        while piece := _piece(response, CHUNK):
            seen += len(piece)
            _on_time(began, seen)
            if limit and seen > limit:
                raise UserError(f"{shown(url)}: larger than {limit} bytes")
            yield piece
        if length.isdigit() and seen != int(length):
            raise Transient(f"{seen} of {length} bytes came")


@contextmanager
def _asked(url: str, headers: Mapping[str, str]) -> Iterator[HTTPResponse]:
    """The answer to a GET, after redirects. Its connection is kept if the answer was read to its end."""
    for _ in range(MAX_REDIRECTS):
        parts = urlsplit(url)
        connection, response = _exchange(url, parts, headers)
        if response.status not in REDIRECTS:
            break
        _keep(parts, connection, response)
        url = urljoin(url, response.getheader("Location", ""))
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{shown(url)}: redirected to where http does not lead")
    else:
        raise UserError(f"{shown(url)}: redirected more than {MAX_REDIRECTS} times")
    try:
        _refuse(url, response)
        yield response
    except (OSError, HTTPException) as error:
        raise _blame(url, error) from None
    finally:
        _keep(parts, connection, response)


def _exchange(url: str, parts: SplitResult, headers: Mapping[str, str]) -> tuple[HTTPConnection, HTTPResponse]:
    kept = _IDLE[_place(parts)]
    while True:
        try:
            connection, used = kept.pop(), True
        except IndexError:
            connection, used = _connection(parts), False
        try:
            connection.request("GET", _target(parts), headers={**_common(parts), **headers})
            return connection, connection.getresponse()
        except (OSError, HTTPException, ValueError) as error:
            connection.close()
            if not used or isinstance(error, TimeoutError):  # a kept one may have been closed at the other end
                raise _blame(url, error) from None


def _refuse(url: str, response: HTTPResponse) -> None:
    status, where = response.status, shown(url)
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        wait = response.getheader("Retry-After", "")
        raise Transient(f"the server answered {status} {response.reason}", float(wait) if wait.isdigit() else 0.0)
    if status in (404, 410):
        raise UserError(f"{where}: no such file ({status} {response.reason}); check the address")
    if status in (401, 403):
        raise UserError(
            f"{where}: not allowed ({status} {response.reason}); sign the address, or read it with a program that "
            "knows your credentials (s3://, gs:// or pipe:)"
        )
    raise UserError(f"{where}: the server answered {status} {response.reason}")


def _blame(url: str, error: Exception) -> Exception:
    if isinstance(error, ssl.SSLCertVerificationError):
        return UserError(f"{shown(url)}: the server's certificate is not trusted ({error.verify_message})")
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return UserError(f"{shown(url)}: no host of that name ({error.strerror})")
    if isinstance(error, ValueError) and not isinstance(error, HTTPException):  # a port of 99999, a space in the path
        return UserError(f"{shown(url)}: no address of a file ({error})")
    return Transient(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _body(response: HTTPResponse, size: int) -> bytes:
    began, pieces, left = time.monotonic(), [], size
    while left:
        piece = _piece(response, left)
        if not piece:
            raise Transient(f"{size - left} of {size} bytes came")
        pieces.append(piece)
        left -= len(piece)
        _on_time(began, size - left)
    return b"".join(pieces)


def _on_time(began: float, seen: int) -> None:
    if time.monotonic() - began > TIMEOUT_S + seen / SLOWEST:
        raise Transient(f"{seen} bytes came in {time.monotonic() - began:.0f} s")


def _piece(response: HTTPResponse, size: int) -> bytes:
    return response.read1(min(size, CHUNK))  # what is there; read() would wait for all of it, however long it takes


def _total(response: HTTPResponse) -> int:
    total = response.getheader("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else -1


def _version(response: HTTPResponse) -> str:
    return response.getheader("ETag") or response.getheader("Last-Modified") or ""


def _common(parts: SplitResult) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": f"clipkit/{clipkit.__version__}"}
    if parts.username:
        secret = f"{parts.username}:{parts.password or ''}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    return headers


def _proxy(parts: SplitResult) -> SplitResult | None:
    proxy = urllib.request.getproxies().get(parts.scheme)
    return urlsplit(proxy) if proxy and not urllib.request.proxy_bypass(parts.hostname or "") else None


def _connection(parts: SplitResult) -> HTTPConnection:
    proxy = _proxy(parts)
    end = proxy or parts
    if not end.hostname:
        raise UserError(f"{shown(parts.geturl())}: names no host")
    kind = HTTPSConnection if parts.scheme == "https" and not (proxy and proxy.scheme != "http") else HTTPConnection
    try:
        connection = kind(end.hostname, end.port, timeout=TIMEOUT_S)
        if proxy and parts.scheme == "https":
            connection.set_tunnel(str(parts.hostname), parts.port)
    except ValueError as error:
        raise UserError(f"{shown(parts.geturl())}: no address of a file ({error})") from None
    return connection


def _target(parts: SplitResult) -> str:
    local = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
    if parts.scheme == "http" and _proxy(parts):
        return f"http://{parts.netloc.rpartition('@')[2]}{local}"
    return local


def _place(parts: SplitResult) -> tuple[int, str, str]:
    return os.getpid(), parts.scheme, parts.netloc  # a connection must not be used on both sides of a fork


_IDLE: dict[tuple[int, str, str], deque[HTTPConnection]] = defaultdict(deque)


def _keep(parts: SplitResult, connection: HTTPConnection, response: HTTPResponse) -> None:
    kept = _IDLE[_place(parts)]
    whole = (response.isclosed() or response.length == 0) and not response.will_close
    response.close()
    if whole and len(kept) < MAX_IDLE:
        kept.append(connection)
    else:
        connection.close()


@atexit.register
def close_idle() -> None:
    """Close the connections that wait for another request."""
    for kept in _IDLE.values():
        while kept:
            kept.pop().close()
