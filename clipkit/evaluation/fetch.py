"""Published annotations from plain addresses: interrupted downloads go on, and a file counts only with its SHA-256."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Download
from clipkit.evaluation.roots import safe

PIECE = 1 << 20
TIMEOUT = 60
"""Seconds without a byte."""


def fetch(download: Download, folder: str | Path, *, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Every file of `download` below `folder`; those that lie there whole are kept. `say` hears of each one fetched.

    What a broken connection leaves (`NAME.part`) is continued by the next call. Raises UserError naming the address
    that fails, or the file that is not the version described.
    """
    files = []
    for path, expected in download.files.items():
        target = Path(folder) / safe(path)
        if not (target.is_file() and _sha256(target) == expected):
            url = f"{download.url.rstrip('/')}/{path}"
            say(f"fetching {url}")
            _fetch(url, target, expected)
        files.append(target)
    return files


def _fetch(url: str, target: Path, expected: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if not (part.is_file() and _sha256(part) == expected):
        _append(url, part)
    found = _sha256(part)
    if found != expected:
        part.unlink()
        raise UserError(f"{url}: is not the version described here: SHA-256 {found}, expected {expected}")
    os.replace(part, target)


def _append(url: str, part: Path) -> None:
    """The rest of the file behind what `part` holds; all of it where the server does not continue."""
    held = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={held}-"} if held else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            continues = answer.status == 206
            with part.open("ab" if continues else "wb") as file:
                _copy(answer, file, answer.headers.get("Content-Length"))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and held:  # nothing behind what is held, and that is not the file: begin anew
            part.unlink()
            _append(url, part)
            return
        raise UserError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"{url}: {getattr(error, 'reason', error)}; the next try goes on from here") from None


def _copy(answer: IO[bytes], file: IO[bytes], length: str | None) -> None:
    """All bytes of the answer. Raises OSError when it ends before its length."""
    copied = 0
    while piece := answer.read(PIECE):
        file.write(piece)
        copied += len(piece)
    if length is not None and copied < int(length):
        raise OSError(f"the connection ended after {copied} of {length} bytes")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
