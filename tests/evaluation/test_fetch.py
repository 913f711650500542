"""Fetching from a server on this machine: whole, continued, refused, and never without the right SHA-256."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Download, load
from clipkit.evaluation.convert import get
from clipkit.evaluation.fetch import fetch

DATA = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """Serves `files`; `ranges`: continues downloads; `cut`: breaks the next answer off after so many bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"a/data.bin": DATA}
        self.ranges, self.cut = True, 0
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append((path, wanted))
        data = self.server.files.get(path)
        if data is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end, self.server.cut = start + self.server.cut if self.server.cut else len(data), 0
        self.wfile.write(data[start:end])

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def download(server: Server, data: bytes = DATA, path: str = "data.bin") -> Download:
    return Download(url=f"{server.url}/a/", files={path: hashlib.sha256(data).hexdigest()})


def test_fetched_once(server: Server, tmp_path: Path):
    said: list[str] = []
    (file,) = fetch(download(server), tmp_path, say=said.append)
    assert file.read_bytes() == DATA and [*tmp_path.iterdir()] == [file]
    assert said == [f"fetching {server.url}/a/data.bin"]
    fetch(download(server), tmp_path, say=said.append)
    assert len(server.asked) == len(said) == 1
    file.write_bytes(b"other")
    assert fetch(download(server), tmp_path)[0].read_bytes() == DATA


def test_a_broken_connection_goes_on_where_it_stopped(server: Server, tmp_path: Path):
    server.cut = 1000
    with pytest.raises(UserError, match=r"data\.bin: the connection ended after 1000 of 10240 bytes; the next try"):
        fetch(download(server), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin.part"]
    assert fetch(download(server), tmp_path)[0].read_bytes() == DATA
    assert server.asked[-1] == ("a/data.bin", "bytes=1000-")


@pytest.mark.parametrize(("held", "ranges"), [(DATA[:1000], False), (DATA + b"more", True), (b"x" * len(DATA), True)])
def test_what_cannot_be_continued_begins_anew(server: Server, tmp_path: Path, held: bytes, ranges: bool):
    server.ranges = ranges
    (tmp_path / "data.bin.part").write_bytes(held)
    assert fetch(download(server), tmp_path)[0].read_bytes() == DATA


def test_a_whole_part_is_taken_as_it_is(server: Server, tmp_path: Path):
    (tmp_path / "data.bin.part").write_bytes(DATA)
    assert fetch(download(server), tmp_path)[0].read_bytes() == DATA and not server.asked


def test_another_version_is_refused_and_not_kept(server: Server, tmp_path: Path):
    found, expected = hashlib.sha256(DATA).hexdigest(), hashlib.sha256(b"old").hexdigest()
    with pytest.raises(UserError, match=f"not the version described here: SHA-256 {found}, expected {expected}"):
        fetch(download(server, b"old"), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_failures_name_the_address(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match=r"/a/none\.bin: the server answers 404"):
        fetch(download(server, path="none.bin"), tmp_path)
    with pytest.raises(UserError, match="must stay inside"):
        fetch(download(server, path="../data.bin"), tmp_path)
    nobody = Download(url="http://127.0.0.1:9", files={"x": "0" * 64})
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x: .*refused"):
        fetch(nobody, tmp_path)


def own(server: Server, folder: Path, **fields: object) -> Path:
    rows = json.dumps([["http://x/1.jpg", "one", "http://x/2.jpg", "two"]]).encode()
    name = "COLA_multiobjects_matching_benchmark.json"
    server.files[f"a/{name}"] = rows
    tree = {"base": "cola", "sha256": {}, "download": download(server, rows, name).model_dump()} | fields
    (folder / "mine.yaml").write_text(json.dumps(tree))
    return folder / "mine.yaml"


def test_get_fetches_and_converts(server: Server, tmp_path: Path):
    found = get(str(own(server, tmp_path)), tmp_path / "out")
    assert found["n"] == 1 and (tmp_path / "out" / "cola.jsonl").is_file()
    assert (tmp_path / "out" / "cola" / "COLA_multiobjects_matching_benchmark.json").is_file()
    right = {"published:cola.jsonl": found["sha256"]}
    assert get(str(own(server, tmp_path, sha256=right)), tmp_path / "out") == found
    with pytest.raises(UserError, match=r"cola\.jsonl: not the rows .* describes: SHA-256"):
        get(str(own(server, tmp_path, sha256={"published:cola.jsonl": "0" * 64})), tmp_path / "out")


def test_get_says_how_else(tmp_path: Path):
    with pytest.raises(UserError, match=r"winoground: no plain address serves its annotations\. .*Hugging Face"):
        get("winoground", tmp_path)


def test_every_packaged_download_is_of_a_fixed_commit():
    from clipkit.evaluation.benchmark import packaged

    found = [download for name in packaged() if (download := load(name).download)]
    assert len(found) == 10
    assert all(any(len(part) == 40 for part in download.url.split("/")) for download in found)
