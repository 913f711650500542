"""The index: pairs by offset, whatever the members are called; one clear error for what is no shard."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clipkit.data import indexing, tables
from clipkit.data.build import write_shard
from clipkit.data.check import index_shards
from clipkit.data.shards import Index, TarFolder, expand, read_member, scan
from clipkit.errors import UserError

from .conftest import sample

Writer = Callable[..., Path]
PAIR = (b"picture", b"words")


def pair(key: str, picture: str = "jpg", text: str = "txt") -> list[tuple[str, bytes]]:
    return [(f"{key}.{picture}", PAIR[0]), (f"{key}.{text}", PAIR[1])]


def test_the_door_is_light() -> None:
    code = "import sys; from clipkit.data import Index, Plan, Sample, write_shards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reads_what_tarfile_reads(index: Index) -> None:
    id = 0
    for shard in index.shards:
        with tarfile.open(shard) as tar:
            for name in tar.getnames()[::3]:
                key = name.rpartition(".")[0]
                assert index.key(id) == key and index.where(id) == f"{shard.name}/{key}"
                expected = {s: tar.extractfile(f"{key}.{s}").read() for s in ("jpg", "json", "txt")}  # type: ignore[union-attr]
                assert index.read(id) == expected
                assert index.read(id, ["txt"]) == {"txt": expected["txt"]}
                id += 1
    assert id == len(index) == 23 and index.counts == [7, 1, 15]
    with pytest.raises(IndexError):
        index.read(23)


def test_keys_end_at_the_last_dot_and_keep_their_folder(write_tar: Writer) -> None:
    members = pair("a/b.c") + pair("a/b.d") + pair("b.d", "PNG") + pair("./e", "jpeg", "json")
    index = Index.load(write_tar(members))
    assert [index.key(i) for i in range(len(index))] == ["a/b.c", "a/b.d", "b.d", "e"]
    assert index.read(2) == {"png": PAIR[0], "txt": PAIR[1]}


def test_members_of_a_pair_need_not_be_neighbours(write_tar: Writer) -> None:
    index = Index.load(write_tar([("a.jpg", b"A"), ("b.jpg", b"B"), ("b.txt", b"tb"), ("a.txt", b"ta")]))
    assert index.read(0) == {"jpg": b"A", "txt": b"ta"} and index.read(1) == {"jpg": b"B", "txt": b"tb"}


def test_long_and_foreign_names(tmp_path: Path) -> None:
    key = "folder/" * 20 + "ä" * 120
    one = sample(1)
    one.key = key
    write_shard([one], tmp_path / "x.tar")
    assert Index.load(tmp_path / "x.tar").key(0) == key


def test_names_that_would_leave_the_folder_are_only_names(write_tar: Writer, tmp_path: Path) -> None:
    before = {p for p in tmp_path.parent.rglob("*") if p.suffix == ".txt"}
    index = Index.load(write_tar(pair("../../evil") + pair("/etc/evil")))
    assert index.read(0)["txt"] == PAIR[1] and index.key(1) == "/etc/evil"
    assert {p for p in tmp_path.parent.rglob("*") if p.suffix == ".txt"} == before


def test_links_and_folders_are_not_members(tmp_path: Path, write_tar: Writer) -> None:
    path = write_tar(pair("a"))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("b.jpg", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    assert len(Index.load(path)) == 1


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([*pair("b"), ("c.jpg", b"")], "c: missing caption"),
        ([*pair("b"), ("c.txt", b"")], "c: missing picture"),
        (pair("b") + pair("b"), "b: duplicate key"),
    ],
)
def test_what_is_no_pair_is_refused_or_left_out(write_tar: Writer, members: list, reason: str) -> None:
    path = write_tar(members)
    with pytest.raises(UserError, match=reason):
        Index.load(path)
    index = Index.load(path, on_error="skip")
    assert len(index) == 1
    assert {f"{where}: {why}" for where, why in index.problems} == {f"x.tar/{reason}"}


def test_stray_files_are_ignored(write_tar: Writer) -> None:
    assert len(Index.load(write_tar([("README.md", b"hello"), *pair("b"), ("b.cls", b"3")]))) == 1


def test_unexpected_names_are_named_at_once(write_tar: Writer) -> None:
    path = write_tar([(f"{i}.{s}", b"x") for i in range(2000) for s in ("picture", "caption")])
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"found members 0\.picture, 0\.caption"):
        Index.load(path)
    assert time.perf_counter() - began < 5


def test_a_hopeless_shard_is_not_read_to_its_end(write_tar: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "HOPELESS", 50)
    path = write_tar([(f"{i}.jpg", b"x") for i in range(5000)] + pair("0", "png"))
    with pytest.raises(UserError, match=r"found members 0\.jpg, 1\.jpg"):
        Index.load(path)
    assert len(scan(path)[0]) == 50
    assert len(scan(write_tar(pair("a") + [(f"{i}.jpg", b"x") for i in range(500)]))[0]) == 502


def test_every_kind_of_member_is_named(write_tar: Writer) -> None:
    path = write_tar([(f"{i}.picture", b"x") for i in range(90)] + [("0.caption", b"words")])
    with pytest.raises(UserError, match=r"found members 0\.picture, 0\.caption, 1\.picture"):
        Index.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no tar " * 1000, gzip.compress(b"x" * 9999, mtime=0), b"\0" * 100],
    ids=["empty", "text", "gzip", "zeros"],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match="not a plain tar"):
        Index.load(tmp_path / "x.tar")


def test_a_cut_tar_keeps_its_whole_pairs(shard_folder: Path, tmp_path: Path) -> None:
    whole = (shard_folder / "s-0.tar").read_bytes()
    members, problem = scan(shard_folder / "s-0.tar")
    assert problem is None
    last = members[-1].offset + members[-1].size
    for cut in range(4000, last, 997):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"missing caption|truncated tar"):
            Index.load(path)
        index = Index.load(path, on_error="skip")
        complete = {m.name.rpartition(".")[0] for m in members if m.name.endswith("json") and m.offset + m.size <= cut}
        assert {index.key(i) for i in range(len(index))} == complete
        assert "truncated tar" in {reason for _, reason in index.problems}
        assert all(index.read(i) for i in range(len(index)))


def test_garbage_inside_a_tar_is_noticed(shard_folder: Path, tmp_path: Path) -> None:
    data = bytearray((shard_folder / "s-0.tar").read_bytes())
    header = scan(shard_folder / "s-0.tar")[0][6].offset - 512
    data[header : header + 512] = b"\x55" * 512
    (tmp_path / "x.tar").write_bytes(data)
    assert ("x.tar/k00001.txt", "truncated tar") in Index.load(tmp_path / "x.tar", on_error="skip").problems


def test_the_second_start_reads_the_cache_and_a_changed_shard_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    shard = tmp_path / "x.tar"
    write_shard([sample(1)], shard)
    first = Index.load(shard)
    with monkeypatch.context() as patch:
        patch.setattr("clipkit.data.tables._scan", lambda *_: pytest.fail("scanned again"))
        assert Index.load(shard).fingerprint == first.fingerprint and Index.load(shard).key(0) == "k00001"
    write_shard([sample(1), sample(2)], shard)
    second = Index.load(shard)
    assert len(second) == 2 and second.fingerprint != first.fingerprint


def test_a_shard_changed_while_in_use_is_an_error(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    write_shard([sample(1)], shard)
    index = Index.load(shard)
    write_shard([sample(2)], shard)
    with pytest.raises(UserError, match="changed while in use"):
        index.read(0)


def test_other_bytes_under_the_same_size_and_time_are_seen(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    write_shard([sample(1)], shard)
    index, before = Index.load(shard), shard.stat()
    write_shard([sample(2)], shard)
    os.truncate(shard, before.st_size)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="changed while in use"):
        index.read(0)
    assert Index.load(shard).key(0) == "k00002"


def test_what_is_indexed_now_is_said_once(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path))
    Index.load(shard_folder)
    said = capsys.readouterr()
    assert said.err == f"indexing 3 shards (once; kept in {tmp_path / 'index'})\n" and not said.out
    Index.load(shard_folder)
    assert capsys.readouterr().err == ""


def test_a_log_says_how_far_it_is(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "again"))
    monkeypatch.setattr(indexing, "EVERY_S", 0.0)
    Index.load(shard_folder)
    assert "indexed 2 of 3 shards, about 0 minutes left" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_and_a_second_call_goes_on(
    shard_folder: Path, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(indexing, "WORTH", 1)
    Index.load(shard_folder / "s-1.tar")
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "index").iterdir()}
    found = Index.load(shard_folder, workers=workers)
    assert found.fingerprint == index.fingerprint and found.read(22) == index.read(22)
    assert len(first) == 1 and all(file.stat().st_mtime_ns == written for file, written in first.items())


def test_one_bad_shard_ends_it_and_the_others_stay_indexed(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "WORTH", 1)
    (tmp_path / "a.tar").write_bytes((shard_folder / "s-0.tar").read_bytes())
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"b\.tar: not a plain tar"):
            Index.load(tmp_path, workers=workers)
    assert tables.kept_summary(tmp_path / "a.tar")


def test_an_index_beside_the_shard(shard_folder: Path, index: Index, tmp_path: Path, monkeypatch: Any) -> None:
    """It goes where the shard goes, and there is nothing to scan."""
    for shard in index.shards:
        shutil.copy(shard, tmp_path)  # other times than the shard it comes from
    assert index_shards(tmp_path, workers=2, beside=True)["samples"] == 23
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.tar.index.json")}
    assert [file.name for file in sorted(written)] == [f"s-{i}.tar.index.json" for i in range(3)]
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    with monkeypatch.context() as patch:
        patch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
        patch.setattr(tables, "_scan", lambda *_: pytest.fail("scanned"))
        found = Index.load(tmp_path / "elsewhere")
        assert found.fingerprint == index.fingerprint and found.read(9) == index.read(9)
    index_shards(tmp_path, beside=True)
    assert written == {file: file.stat().st_mtime_ns for file in written}


FOREIGN: dict[str, Callable[[dict], Any]] = {
    "no JSON": lambda sheet: "no JSON",
    "a list": lambda sheet: [],
    "deep": lambda sheet: "[" * 100_000,
    "older form": lambda sheet: sheet | {"format": 1},
    "other size": lambda sheet: sheet | {"size": 5},
    "other bytes": lambda sheet: sheet | {"head": "0" * 32},
    "nothing": lambda sheet: {},
    "no spans": lambda sheet: sheet | {"table": sheet["table"] | {"spans": []}},
    "beyond": lambda sheet: sheet | {"table": sheet["table"] | {"spans": [1 << 40, 9, *sheet["table"]["spans"][2:]]}},
    "overflow": lambda sheet: sheet | {"table": sheet["table"] | {"spans": [1 << 80, 9, *sheet["table"]["spans"][2:]]}},
    "below": lambda sheet: sheet | {"table": sheet["table"] | {"spans": [-5, 9, *sheet["table"]["spans"][2:]]}},
    "negative": lambda sheet: sheet | {"table": sheet["table"] | {"spans": [5, -9, *sheet["table"]["spans"][2:]]}},
    "fractions": lambda sheet: sheet | {"table": sheet["table"] | {"spans": [5.5, 9, *sheet["table"]["spans"][2:]]}},
    "other offsets": lambda sheet: sheet | {"table": sheet["table"] | {"spans": [5, 9, *sheet["table"]["spans"][2:]]}},
    "keys no texts": lambda sheet: sheet | {"table": sheet["table"] | {"keys": [1] * len(sheet["table"]["keys"])}},
    "no picture": lambda sheet: sheet | {"table": sheet["table"] | {"suffixes": ["bin", "json", "txt"]}},
    "count": lambda sheet: sheet | {"summary": sheet["summary"] | {"count": 10**12}},
    "problems": lambda sheet: sheet | {"summary": sheet["summary"] | {"problems": [["a"]]}},
    "problems no texts": lambda sheet: sheet | {"summary": sheet["summary"] | {"problems": [[{}, []]]}},
    "fingerprint": lambda sheet: sheet | {"summary": sheet["summary"] | {"fingerprint": 3}},
    "large": lambda sheet: "x" * (2 << 20),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_index_beside_the_shard_is_not_believed(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shard = Path(shutil.copy(shard_folder / "s-0.tar", tmp_path))
    index_shards(shard, beside=True)
    file = tmp_path / "s-0.tar.index.json"
    foreign = FOREIGN[name](json.loads(file.read_text()))
    file.write_text(foreign if isinstance(foreign, str) else json.dumps(foreign))
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    found = Index.load(shard)
    assert found.fingerprint == Index.load(shard_folder / "s-0.tar").fingerprint
    assert [found.key(i) for i in range(len(found))] == [f"k{i:05d}" for i in range(7)]


def test_nothing_is_written_beside_what_cannot_be_written(shard_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="where the shard lies as a file"):
        index_shards(f"pipe:cat {shard_folder}/s-0.tar", beside=True)


def test_no_cache_folder_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "file"))
    write_shard([sample(1)], tmp_path / "x.tar")
    assert Index.load(tmp_path / "x.tar").key(0) == "k00001"


def test_the_fingerprint_names_the_data_not_the_place(shard_folder: Path, tmp_path: Path, index: Index) -> None:
    for shard in index.shards:
        os.link(shard, tmp_path / shard.name)
    assert Index.load(tmp_path).fingerprint == index.fingerprint
    assert Index.load(index.shards[:2]).fingerprint != index.fingerprint


def test_patterns(shard_folder: Path) -> None:
    shards = sorted(shard_folder.glob("*.tar"))
    for pattern in (shard_folder, f"{shard_folder}/*.tar", f"{shard_folder}/s-{{0..2}}.tar", [str(s) for s in shards]):
        assert expand(pattern) == shards
    assert expand([shards[1], shard_folder]) == shards
    with pytest.raises(UserError, match=r"s-4\.tar: no such shard; did you mean s-"):
        expand(shard_folder / "s-4.tar")
    with pytest.raises(UserError, match="matches nothing"):
        expand(f"{shard_folder}/t-*.tar")
    with pytest.raises(UserError, match="no shards named"):
        expand([])


def test_index_and_reads_survive_pickling_and_threads(index: Index) -> None:
    expected = [index.read(i) for i in range(len(index))]
    copy = pickle.loads(pickle.dumps(index))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.read, [*range(len(index))] * 20)) == expected * 20


def test_a_tar_as_a_folder(write_tar: Writer) -> None:
    path = write_tar([("cat/0.jpg", b"c0"), ("dog/0.jpg", b"d0"), ("./rows.jsonl", b"{}")])
    tar = TarFolder(path)
    assert tar.paths() == ["cat/0.jpg", "dog/0.jpg", "rows.jsonl"] and len(tar) == 3 and "cat/0.jpg" in tar
    assert tar.read("dog/0.jpg") == read_member(path, "dog/0.jpg") == b"d0"
    with pytest.raises(UserError, match=r"no member cat/1\.jpg; did you mean cat/0\.jpg"):
        tar.read("cat/1.jpg")


def test_real_shards(shared: Path) -> None:
    index = Index.load(shared / "data" / "flickr8k_dev-000.tar")
    assert len(index) == 1000 and len(json.loads(index.read(7)["json"])["captions"]) == 5
    assert len(TarFolder(shared / "data" / "cifar10_test.tar")) == 5000
    with pytest.raises(UserError, match=r"airplane/0000\.jpg"):
        Index.load(shared / "data" / "cifar10_test.tar")
