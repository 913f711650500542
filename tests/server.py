"""A local http server over a folder that cuts out byte ranges, counts requests and can be told to misbehave."""

from __future__ import annotations

import io
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

Trouble = Callable[["Handler", str, int], bool]
"""(request, path, number of the request) → whether it has been answered, somehow."""


class Handler(BaseHTTPRequestHandler):
    """GET of whole files and single ranges, with ETag and connections that stay open."""

    protocol_version = "HTTP/1.1"
    timeout = 20
    server: Server

    def do_GET(self) -> None:
        path = re.sub(r"^http://[^/]*", "", self.path).partition("?")[0]
        with self.server.lock:
            self.server.asked.append((path, self.headers.get("Range", "")))
            number = len(self.server.asked)
        if self.server.trouble and self.server.trouble(self, path, number):
            return
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            self.say(404)
            return
        self.give(file)

    def give(self, file: Path) -> None:
        """The file, or the range of it that was asked for."""
        state = file.stat()
        size, etag = state.st_size, f'"{state.st_mtime_ns:x}-{state.st_size:x}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted:
            self.say(200, file.read_bytes(), ETag=etag)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
        if first > last:
            self.say(416, **{"Content-Range": f"bytes */{size}"})
        else:
            named = {"Content-Range": f"bytes {first}-{last}/{size}", "ETag": etag}
            with file.open("rb") as opened:
                opened.seek(first)
                self.say(206, opened.read(last + 1 - first), **named)

    def say(self, status: int, data: bytes = b"", length: int | None = None, **headers: str) -> None:
        """An answer; with `length`, one that promises more than it gives."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        if length is not None:
            self.close_connection = True

    def reset(self) -> None:
        """End the connection in the rudest way there is."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = io.BytesIO()  # type: ignore[assignment]

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """What was asked for, and who makes trouble."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.lock = folder, threading.Lock()
        self.asked: list[tuple[str, str]] = []
        self.trouble: Trouble | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        pass


def serving(folder: Path) -> AbstractContextManager[Server]:
    """A server over `folder` while the context lasts."""
    return running(Server(folder))


S = TypeVar("S", bound=ThreadingHTTPServer)


@contextmanager
def running(server: S) -> Iterator[S]:
    """It answers in a thread of its own while the context lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
