"""The index: pairs by offset, whatever the members are called; one clear error for what is no shard."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clipkit.data.build import write_shard
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


@pytest.mark.parametrize("content", [b"", b"no tar " * 1000, gzip.compress(b"x" * 9999), b"\0" * 100])
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
        patch.setattr("clipkit.data.shards.scan", lambda path: pytest.fail("scanned again"))
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
