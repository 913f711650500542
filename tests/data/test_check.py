"""What is wrong in shards, counted by shard and reason; and a look at some pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from clipkit.data.build import encode_jpeg
from clipkit.data.check import check_shards, index_shards
from clipkit.data.sheet import show_shard

from .conftest import noise_picture

Writer = Callable[..., Path]


def test_good_shards(shard_folder: Path) -> None:
    report = check_shards(shard_folder)
    assert report["samples"] == report["usable"] == 23 and report["reasons"] == report["examples"] == {}
    assert [s["samples"] for s in report["shards"].values()] == [7, 1, 15]


def test_every_problem_is_counted_and_named(write_tar: Writer, tmp_path: Path) -> None:
    good = encode_jpeg(noise_picture(1))
    pairs = [(f"{i}.{s}", d) for i in range(6) for s, d in (("jpg", good), ("txt", b"some words"))]
    bad = {"1.jpg": good[:300], "2.txt": b"", "4.txt": b"caf\xe9"}
    members = [(name, bad.get(name, data)) for name, data in pairs]
    write_tar([*members, ("0.jpg", good), ("6.jpg", good), ("7.json", b"{}")], "a.tar")
    (tmp_path / "b.tar").write_bytes(b"no tar")
    write_tar([("x.left", b""), ("x.right", b"")], "c.tar")
    (tmp_path / "d.tar").write_bytes(write_tar(pairs, "d.tar").read_bytes()[:5000])
    report = json.loads(json.dumps(check_shards(f"{tmp_path}/*.tar", progress=False)))
    assert report == check_shards(f"{tmp_path}/*.tar", progress=False, workers=1)
    problems = {Path(path).name: shard["problems"] for path, shard in report["shards"].items()}
    assert problems == {
        "a.tar": {
            "duplicate key": 1,
            "missing caption": 1,
            "missing picture": 1,
            "unreadable picture": 1,
            "empty caption": 1,
            "broken txt": 1,
        },
        "b.tar": {"not a tar": 1},
        "c.tar": {"no pairs": 1},
        "d.tar": {"truncated tar": 1, **problems["d.tar"]},
    }
    assert report["samples"] == 6 + report["shards"][str(tmp_path / "d.tar")]["samples"]
    assert report["usable"] == report["samples"] - 3
    (example,) = report["examples"]["unreadable picture"]
    assert example[0] == "a.tar/1" and example[1].startswith("unreadable picture: OSError")


def test_index_and_show(shard_folder: Path, write_tar: Writer) -> None:
    summary = index_shards(shard_folder)
    assert summary["samples"] == 23 and list(summary["shards"].values()) == [7, 1, 15]
    second, third = show_shard(shard_folder, n=2, start=1)
    assert second["where"] == "s-0.tar/k00001" and second["picture"] == "40x30" and third["id"] == 2
    assert len(second["captions"]) == len(second["negatives"]) == 2 and set(second["members"]) == {"jpg", "json", "txt"}
    json.dumps([second, third])
    (bad,) = show_shard(write_tar([("a.jpg", b""), ("a.txt", b"x")]))
    assert bad["problem"].startswith("unreadable picture")
