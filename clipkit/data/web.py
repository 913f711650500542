"""Byte ranges and posts over http(s), through urllib3: pooled connections, proxies; a deadline for every answer.

Each call is one attempt. Transient is what another attempt may mend; UserError is what it cannot.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import lru_cache
from math import isfinite
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3 import exceptions
from urllib3.response import BaseHTTPResponse

import clipkit
from clipkit.errors import UserError

TIMEOUT_S = 30.0
"""Longest silence of a server."""
SLOWEST = 64 * 1024
"""Bytes a second: an answer that comes slower than this is given up."""
CHUNK = 1 << 20
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


class Posted(NamedTuple):
    """A server's answer to a post, whatever it is; `wait_s` is its Retry-After, 0 where it has none."""

    status: int
    reason: str
    wait_s: float
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
            length = response.headers.get("Content-Length", "")
            return Answer(int(length) if length.isdigit() else -1, _version(response), False, b"")
        expected = max(0, min(size, _total(response) - offset))
        if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise Transient(f"asked for bytes from {offset}, got {response.headers.get('Content-Range')}")
        data = b"".join(_pieces(response, expected))
        if len(data) != expected:
            raise Transient(f"{len(data)} of {expected} bytes came")
        return Answer(_total(response), _version(response), True, data)


def get_whole(url: str, limit: int = 0) -> Iterator[bytes]:
    """The file in pieces. Raises Transient when it ends early, UserError beyond `limit` bytes (0: none)."""
    with _asked(url, {}) as response:
        length, seen = response.headers.get("Content-Length", ""), 0
        for piece in _pieces(response):
            seen += len(piece)
            if limit and seen > limit:
                raise UserError(f"{shown(url)}: larger than {limit} bytes")
            yield piece
        if length.isdigit() and seen != int(length):
            raise Transient(f"{seen} of {length} bytes came")


def post(url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float, idle: int = MAX_IDLE) -> Posted:
    """One POST, without redirects; the status is the caller's to judge. Up to `idle` connections are kept open.

    Raises Transient where no whole answer came (`timeout_s`: the longest silence), UserError for a wrong address.
    """
    with _opened("POST", url, headers, body=body, timeout_s=timeout_s, idle=idle) as response:
        data = b"".join(_pieces(response))
        return Posted(response.status, response.reason or "", _wait_s(response), data)


@contextmanager
def _asked(url: str, headers: Mapping[str, str]) -> Iterator[BaseHTTPResponse]:
    """The answer to a GET, after redirects."""
    with _opened("GET", url, headers) as response:
        _refuse(url, response)
        yield response


@contextmanager
def _opened(
    method: str,
    url: str,
    headers: Mapping[str, str],
    *,
    body: bytes | None = None,
    timeout_s: float | None = None,
    idle: int = MAX_IDLE,
) -> Iterator[BaseHTTPResponse]:
    """An answer whose body is not read yet. Its connection is kept if the answer was read to its end."""
    response = None
    try:
        parts = urlsplit(url)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
        response = _pool(os.getpid(), _proxy(parts.scheme, parts.hostname or ""), idle).request(
            method,
            bare,
            body=body,
            headers={**_common(parts.username, parts.password), **headers},
            preload_content=False,
            redirect=method == "GET",
            timeout=urllib3.Timeout(connect=min(TIMEOUT_S, timeout_s or TIMEOUT_S), read=timeout_s or TIMEOUT_S),
        )
        yield response
    except (OSError, ValueError, exceptions.HTTPError) as error:
        raise _blame(url, error) from None
    finally:
        if response is not None:
            if response.length_remaining == 0:  # type: ignore[attr-defined]
                response.drain_conn()  # nothing is left, but an answer without a body was never read
            else:
                response.close()


@lru_cache(16)
def _pool(_pid: int, proxy: str, idle: int) -> urllib3.PoolManager:
    """One for each process: a connection must not be used on both sides of a fork."""
    # Trying again is left to the caller, who knows what is worth it and what the pauses add up to.
    once = urllib3.Retry(
        total=None, connect=0, read=0, status=0, other=0, redirect=MAX_REDIRECTS, respect_retry_after_header=False
    )
    if proxy:
        return urllib3.ProxyManager(proxy, maxsize=idle, retries=once)
    return urllib3.PoolManager(maxsize=idle, retries=once)


def _proxy(scheme: str, host: str) -> str:
    """The proxy that the environment names for this address; empty for none."""
    proxy = urllib.request.getproxies().get(scheme, "")
    return "" if not proxy or urllib.request.proxy_bypass(host) else proxy


def _common(user: str | None, password: str | None) -> dict[str, str]:
    secret = f"{unquote(user)}:{unquote(password or '')}" if user else None
    return {"Accept-Encoding": "identity", **urllib3.make_headers(basic_auth=secret)} | {
        "User-Agent": f"clipkit/{clipkit.__version__}"
    }


def _refuse(url: str, response: BaseHTTPResponse) -> None:
    status, where = response.status, shown(url)
    if status in (200, 206, 416):
        return
    if status in (408, 425, 429) or status >= 500:
        raise Transient(f"the server answered {status} {response.reason}", _wait_s(response))
    if status in (404, 410):
        raise UserError(f"{where}: no such file ({status} {response.reason}); check the address")
    if status in (401, 403):
        raise UserError(
            f"{where}: not allowed ({status} {response.reason}); sign the address, or read it with a program that "
            "knows your credentials (s3://, gs:// or pipe:)"
        )
    raise UserError(f"{where}: the server answered {status} {response.reason}")


def _wait_s(response: BaseHTTPResponse) -> float:
    """Retry-After in seconds, given as such or as a date; 0 where it says nothing."""
    said = response.headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(said)) if isfinite(float(said)) else 0.0
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0


def _blame(url: str, error: Exception) -> Exception:
    if isinstance(error, UserError):
        return error
    reason = _innermost(error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return UserError(f"{shown(url)}: the server's certificate is not trusted ({reason.verify_message})")
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        return UserError(f"{shown(url)}: no host of that name ({reason.strerror})")
    if isinstance(reason, exceptions.ResponseError):
        return UserError(f"{shown(url)}: redirected more than {MAX_REDIRECTS} times")
    if isinstance(reason, exceptions.IncompleteRead):
        return Transient(f"{reason.partial} of {reason.partial + reason.expected} bytes came")
    if isinstance(reason, ValueError):  # urllib3's faults of an address are ValueErrors, too
        return UserError(f"{shown(url)}: no address of a file ({reason})")
    return Transient(f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__)


def _innermost(error: BaseException) -> BaseException:
    """What urllib3 wraps: as its reason, its cause, or its last argument."""
    while True:
        wrapped = [getattr(error, "reason", None), error.__cause__, *reversed(error.args)]
        inner = next((one for one in wrapped if isinstance(one, BaseException)), None)
        if inner is None:
            return error
        error = inner


def _pieces(response: BaseHTTPResponse, size: int = -1) -> Iterator[bytes]:
    """What comes, as it comes, up to `size` bytes (-1: all)."""
    began, seen = time.monotonic(), 0
    while seen != size and (piece := response.read1(min(CHUNK, size - seen) if size >= 0 else CHUNK)):
        yield piece
        seen += len(piece)
        if time.monotonic() - began > TIMEOUT_S + seen / SLOWEST:
            raise Transient(f"{seen} bytes came in {time.monotonic() - began:.0f} s")


def _total(response: BaseHTTPResponse) -> int:
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else -1


def _version(response: BaseHTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
