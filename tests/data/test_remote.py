"""Shards behind http, fsspec and commands: the pairs that files give, in few requests; trouble is mended or named."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clipkit.data import remote, storage, tables, web
from clipkit.data.build import Sample, write_shard, write_shards
from clipkit.data.check import check_shards, index_shards
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.shards import Index, Url, expand
from clipkit.data.sheet import show_shard
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig
from tests.server import Handler, Server, Trouble, serving

from .conftest import sample

pytestmark = pytest.mark.usefixtures("watchdog")


@pytest.fixture(autouse=True)
def haste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and pauses that are over soon."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.005)
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(shard_folder: Path) -> Iterator[Server]:
    with serving(shard_folder) as running:
        yield running


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server over a folder that the test may change; it holds x.tar with three pairs."""
    (tmp_path / "www").mkdir()
    write_shard(map(sample, range(3)), tmp_path / "www" / "x.tar")
    with serving(tmp_path / "www") as running:
        yield running


def assert_same(found: Index, expected: Index) -> None:
    assert found.fingerprint == expected.fingerprint and found.counts == expected.counts
    for id in range(len(expected)):
        assert found.where(id) == expected.where(id)
        assert found.read(id) == expected.read(id)


def refused(url: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        index = Index.load(url, **settings)
        for id in range(len(index)):
            index.read(id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_http_gives_what_files_give(server: Server, index: Index) -> None:
    found = Index.load(f"{server.url}/s-{{0..2}}.tar")
    assert_same(found, index)
    assert found.remote and not index.remote
    before = len(server.asked)
    assert_same(pickle.loads(pickle.dumps(found)), index)
    assert server.asked[before:] == []  # all blocks lie on disk
    again = Index.load(f"{server.url}/s-{{0..2}}.tar")
    assert_same(again, index)
    assert [asked for _, asked in server.asked[before:]] == ["bytes=0-0"] * 3  # unchanged? and no more


def test_blocks_cross_members_and_their_number_is_small(
    server: Server, index: Index, monkeypatch: pytest.MonkeyPatch, haste: Path
) -> None:
    monkeypatch.setenv("CLIPKIT_BLOCK_BYTES", "1000")
    found = Index.load([f"{server.url}/s-{i}.tar" for i in range(3)])
    server.asked.clear()
    found.prefetch(range(len(found)))
    asked = len(server.asked)
    assert_same(found, index)
    assert asked == len(server.asked) == len({*server.asked})  # each block once
    sizes = [shard.stat().st_size for shard in index.shards]  # type: ignore[union-attr]
    assert asked <= sum(-(-size // 1000) for size in sizes)
    assert all(int(end) - int(start) < 1000 for _, r in server.asked for start, end in [r[6:].split("-")])


def test_headers_of_large_members_are_read_without_their_bodies(own: Server) -> None:
    noise = random.Random(0).randbytes(3 << 20)
    write_shard((Sample(f"{i}", noise, "jpg", ["words"]) for i in range(8)), own.folder / "large.tar")
    Index.load(f"{own.url}/large.tar")
    bounds = [r[6:].split("-") for path, r in own.asked if path == "/large.tar"]
    read = sum(int(end) - int(start) + 1 for start, end in bounds)
    assert read < 8 * len(noise) / 5
    assert len(bounds) <= 3 + 2 * 8


def test_small_members_are_indexed_in_large_pieces(own: Server) -> None:
    noise = random.Random(0).randbytes(20_000)
    write_shard((Sample(f"{i}", noise, "jpg", ["words"]) for i in range(300)), own.folder / "small.tar")
    Index.load(f"{own.url}/small.tar")
    assert len([path for path, _ in own.asked if path == "/small.tar"]) < 12


def test_loaders_get_the_same_batches(server: Server, index: Index) -> None:
    tokenizer = Tokenizer()

    def batches(index: Index, workers: int) -> list[Any]:
        plan = Plan(index, batch_size=6, lanes=4, seed=3)
        loader = Loader(
            index, plan, data=DataConfig(workers=workers, negatives=1), preprocess=Preprocess(16), tokenizer=tokenizer,
            seed=3,
        )  # fmt: skip
        return list(loader.steps(0, 7))

    expected = batches(index, 0)
    found = batches(Index.load(f"{server.url}/s-{{0..2}}.tar"), 2)
    for one, other in zip(expected, found, strict=True):
        assert one.id.equal(other.id) and one.image.equal(other.image) and one.text.equal(other.text)
        assert one.negative_text.equal(other.negative_text)
    reads = [asked for asked in server.asked if asked[1] not in ("bytes=0-0", "")]
    assert len(reads) == 6  # headers and one block of each shard, whoever came first


def test_everything_that_reads_shards_reads_urls(server: Server, index: Index, shard_folder: Path) -> None:
    url = f"{server.url}/s-{{0..2}}.tar"
    assert index_shards(url)["samples"] == check_shards(url, progress=False)["usable"] == 23
    assert show_shard(url, 2) == show_shard(shard_folder, 2)


def test_an_index_beside_a_url(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Index.load(own.folder)
    index_shards(own.folder, beside=True)
    monkeypatch.setattr(tables, "_scan", lambda *_: pytest.fail("scanned"))
    assert_same(Index.load(f"{own.url}/x.tar"), expected)
    assert [path for path, _ in own.asked].count("/x.tar.index.json") == 1


def test_an_older_index_beside_a_url_is_not_used(own: Server) -> None:
    index_shards(own.folder, beside=True)
    write_shard(map(sample, range(4)), own.folder / "x.tar")
    assert_same(Index.load(f"{own.url}/x.tar"), Index.load(own.folder))


# -- trouble


def first(count: int, act: Callable[[Handler], Any], only: str = "") -> Trouble:
    """`act` on the first `count` requests (whose range contains `only`), as it should be from then on."""
    times = iter(range(count))

    def trouble(request: Handler, _path: str, _number: int) -> bool:
        if only not in request.headers.get("Range", "") or next(times, None) is None:
            return False
        act(request)
        return True

    return trouble


def short(request: Handler) -> None:
    """Half of what was promised, and the end of the connection."""
    say = request.say
    request.say = lambda status, data=b"", **named: say(status, data[: len(data) // 2], len(data), **named)  # type: ignore[method-assign, misc]
    request.give(request.server.folder / "x.tar")


def elsewhere(request: Handler) -> None:
    request.say(206, b"x" * 100, **{"Content-Range": "bytes 100-199/10240"})


MENDED: dict[str, Callable[[Handler], Any]] = {
    "503": lambda request: request.say(503),
    "503 with a date": lambda request: request.say(503, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "429": lambda request: request.say(429, **{"Retry-After": "0"}),
    "500": lambda request: request.say(500, b"sorry"),
    "reset": Handler.reset,
    "short": short,
    "other bytes": elsewhere,
    "no http": lambda request: request.wfile.write(b"hello\r\n") and request.reset(),
}


@pytest.mark.parametrize("only", ["bytes=0-0", "bytes=0-1", ""])
@pytest.mark.parametrize("name", MENDED)
def test_what_passes_is_tried_again(own: Server, name: str, only: str) -> None:
    own.trouble = first(2, MENDED[name], only)
    assert_same(Index.load(f"{own.url}/x.tar"), Index.load(own.folder))


LASTING: dict[str, tuple[Callable[[Handler], Any], str]] = {
    "503": (MENDED["503"], "the server answered 503"),
    "reset": (Handler.reset, "ConnectionResetError"),
    "short": (short, r"\d+ of \d+ bytes came"),
    "other bytes": (elsewhere, "asked for bytes from 0, got bytes 100-199/10240"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_one_error_after_some_tries(own: Server, name: str) -> None:
    act, said = LASTING[name]
    index = Index.load(f"{own.url}/x.tar")
    own.asked.clear()
    own.trouble = lambda request, *_: act(request) or True
    message = refused_read(index)
    assert "/x.tar" in message and "tried 8 times" in message and re.search(said, message)
    assert 8 <= len(own.asked) <= 9  # one more where a kept connection was found closed


def refused_read(index: Index) -> str:
    with pytest.raises(UserError) as caught:
        index.read(0)
    return str(caught.value)


@pytest.mark.parametrize(("status", "said"), [(404, "no such file"), (403, "not allowed"), (401, "not allowed")])
def test_what_cannot_pass_is_said_at_once(own: Server, status: int, said: str) -> None:
    own.trouble = lambda request, *_: request.say(status) or True
    assert said in refused(f"{own.url}/x.tar") and len(own.asked) == 1


def test_no_server_and_no_host() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        assert "ConnectionRefusedError" in refused(f"http://127.0.0.1:{port}/x.tar")
    assert "No host specified" in refused("http:///x.tar")
    assert "no address" in refused("http://127.0.0.1:99999/x.tar")


def test_a_silent_server_does_not_hang(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "TIMEOUT_S", 0.05)
    silence = threading.Event()
    own.trouble = lambda *_: silence.wait(20)
    assert "tried 4 times" in refused(f"{own.url}/x.tar")
    silence.set()


def test_a_trickle_does_not_hang(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.load(f"{own.url}/x.tar")
    monkeypatch.setattr(web, "TIMEOUT_S", 0.3)
    over = threading.Event()

    def trickle(request: Handler, *_: object) -> bool:
        size = (own.folder / "x.tar").stat().st_size
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-{size - 1}/{size}")
        request.send_header("Content-Length", str(size))
        request.end_headers()
        while not over.wait(0.05):
            request.wfile.write(b"x")
            request.wfile.flush()
        return True

    own.trouble = trickle
    monkeypatch.setattr(remote, "TRIES", 2)
    message = refused_read(index)
    over.set()
    assert "bytes came in" in message or "changed" in message


# -- change


def test_a_changed_shard_is_indexed_anew(own: Server) -> None:
    one = Index.load(f"{own.url}/x.tar")
    write_shard(map(sample, range(5)), own.folder / "x.tar")
    other = Index.load(f"{own.url}/x.tar")
    assert_same(other, Index.load(own.folder))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("count", [3, 4])
def test_a_shard_changed_under_way_is_an_error(own: Server, count: int) -> None:
    index = Index.load(f"{own.url}/x.tar")
    write_shard(map(sample, range(9, 9 + count)), own.folder / "x.tar")
    assert "changed while in use" in refused_read(index) and "version" in refused_read(index)


# -- servers of other kinds


def test_a_server_without_ranges_is_copied_once(own: Server, haste: Path) -> None:
    def whole(request: Handler, path: str, _number: int) -> bool:
        if not (own.folder / path[1:]).is_file():
            return False
        request.say(200, (own.folder / path[1:]).read_bytes(), **{"Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"})
        return True

    own.trouble = whole
    assert_same(Index.load(f"{own.url}/x.tar"), Index.load(own.folder))
    assert len(list((haste / "shards").iterdir())) == 1
    own.asked.clear()
    assert_same(Index.load(f"{own.url}/x.tar"), Index.load(own.folder))
    assert own.asked == [("/x.tar", "bytes=0-0")]


def test_redirects_proxies_and_names_are_followed(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Index.load(own.folder)

    def elsewhere(request: Handler, path: str, _number: int) -> bool:
        if path != "/old.tar":
            return False
        request.say(302, Location="/x.tar")
        return True

    own.trouble = elsewhere
    found = Index.load(f"{own.url}/old.tar")
    assert found.read(1) == expected.read(1)
    own.trouble = lambda request, *_: request.say(302, Location="/again.tar") or True
    assert "redirected" in refused(f"{own.url}/loop.tar")
    own.trouble = lambda request, *_: request.say(302, Location="ftp://here/x.tar") or True
    assert "scheme ftp" in refused(f"{own.url}/ftp.tar")
    own.trouble = None
    monkeypatch.setenv("http_proxy", own.url)
    monkeypatch.setenv("no_proxy", "")
    assert Index.load("http://data.example/x.tar").read(1) == expected.read(1)


def test_secrets_stay_out_of_messages(own: Server) -> None:
    place = own.url.removeprefix("http://")
    url = f"http://me:secret@{place}/y.tar?signature=secret"
    seen: list[str] = []
    own.trouble = lambda request, *_: seen.append(request.headers["Authorization"])  # type: ignore[func-returns-value]
    message = refused(url)
    assert "secret" not in message and f"http://{place}/y.tar?..." in message and seen[0].startswith("Basic ")
    assert Url(url).name == "y.tar" and "secret" not in str(Url(url))


def test_fsspec_stores(shard_folder: Path, index: Index, haste: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for shard in shard_folder.glob("*.tar"):
        store.pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
    for pattern in ("memory://bucket/s-{0..2}.tar", "memory://bucket/s-*.tar", "memory://bucket/"):
        assert_same(Index.load(pattern), index)
    assert_same(Index.load(f"file://{shard_folder}/s-*.tar"), index)
    assert all(isinstance(shard, Path) for shard in expand(f"file://{shard_folder}"))
    assert_same(Index.load(f"local://{shard_folder}/s-*.tar"), index)
    shutil.rmtree(haste / "blocks")
    found = Index.load("memory://bucket/s-0.tar")
    store.pipe_file("/bucket/s-0.tar", (shard_folder / "s-1.tar").read_bytes())
    assert "changed while in use" in refused_read(found)
    assert Index.load("memory://bucket/s-0.tar").counts == [1]


def test_a_store_with_arguments_in_another_order(shard_folder: Path, index: Index) -> None:
    """As s3fs has them."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Versioned(MemoryFileSystem):
        protocol = "versioned"
        store: dict[str, Any] = {}

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("versioned://", "memory://"))

        def cat_file(
            self, path: str, version_id: Any = None, start: Any = None, end: Any = None, **settings: Any
        ) -> bytes:
            assert version_id is None
            return super().cat_file(path, start=start, end=end)

    fsspec.register_implementation("versioned", Versioned, clobber=True)
    fsspec.filesystem("versioned").pipe_file("/bucket/s-0.tar", (shard_folder / "s-0.tar").read_bytes())
    assert_same(Index.load("versioned://bucket/s-0.tar"), Index.load(shard_folder / "s-0.tar"))


def test_stores_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in refused("memory://nowhere/x.tar")
    assert "lists nothing" in refused("memory://nowhere/*.tar")
    assert "Protocol not known: xyz" in refused("xyz://bucket/x.tar")
    assert "NAME-{000..009}.tar" in refused("http://127.0.0.1/x-*.tar")
    monkeypatch.setattr(web, "TIMEOUT_S", 0.01)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", lambda *_: time.sleep(2))
    assert "no answer" in refused("memory://nowhere/x.tar")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_library_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = refused(f"{scheme}://bucket/x.tar")
    assert package in message and "clipkit[remote]" in message


def test_commands_in_data_are_never_run(own: Server, tmp_path: Path) -> None:
    """A member, a key or a file beside a shard that looks like a command is only a text."""
    evil = f"pipe:touch {tmp_path}/evil"
    write_shard([Sample(evil, b"x", "jpg", [evil], {"group": evil})], own.folder / "x.tar")
    (own.folder / "x.tar.index.json").write_text(json.dumps({"format": tables.FORMAT, "size": evil, "head": evil}))
    index = Index.load(f"{own.url}/x.tar")
    assert index.read(0)["txt"] == evil.encode() and not (tmp_path / "evil").exists()


# -- room


def test_blocks_make_room_for_others(own: Server, monkeypatch: pytest.MonkeyPatch, haste: Path) -> None:
    monkeypatch.setenv("CLIPKIT_BLOCK_BYTES", "512")
    monkeypatch.setenv("CLIPKIT_CACHE_BYTES", "4096")
    expected, found = Index.load(own.folder), Index.load(f"{own.url}/x.tar")
    for _ in range(3):
        assert_same(found, expected)
        kept = sum(file.stat().st_size for file in (haste / "blocks").rglob("*") if file.is_file())
        assert 0 < kept <= 4096 + storage.EVERY * 512


def test_nowhere_to_keep_blocks(own: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "file"))
    assert "CLIPKIT_CACHE" in refused(f"{own.url}/x.tar")


# -- many at once


def _load(pattern: str, start: Any, results: Any) -> None:
    start.wait(30)
    index = Index.load(pattern, progress=False)
    results.put((index.fingerprint, [index.read(id)["txt"] for id in range(len(index))]))


def test_processes_share_the_work(tmp_path: Path, haste: Path) -> None:
    """Six processes at once, as ranks of a node: each shard is scanned once, and the blocks come once."""
    (tmp_path / "www").mkdir()
    write_shards(map(sample, range(40)), tmp_path / "www", per_shard=4, progress=False)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    with serving(tmp_path / "www") as server:
        pattern = f"{server.url}/shard-{{000000..000009}}.tar"
        ranks = [context.Process(target=_load, args=(pattern, start, results)) for _ in range(6)]
        for rank in ranks:
            rank.start()
        start.set()
        found = [results.get(timeout=40) for _ in ranks]
        for rank in ranks:
            rank.join(20)
            assert rank.exitcode == 0
        reads = [asked for asked in server.asked if asked[1] not in ("bytes=0-0", "")]
    assert found == [found[0]] * 6
    assert len(reads) == 20  # headers and one block a shard


def test_threads_of_one_process_share_blocks(server: Server, index: Index) -> None:
    found = Index.load(f"{server.url}/s-{{0..2}}.tar")
    server.asked.clear()
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(found.read, [*range(23)] * 5)) == [index.read(id) for id in range(23)] * 5
    assert len(server.asked) == 3
