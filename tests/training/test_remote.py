"""A real run that reads its shards over http is the run that reads them from the disk."""

from __future__ import annotations

from pathlib import Path

from tests.server import serving
from tests.training.conftest import degla_tree
from tests.training.runs import finish, launch, losses, samples


def test_two_ranks_read_over_http_what_one_reads_from_disk(tiny_shards: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    tree = degla_tree(tiny_shards, tmp_path) | {"samples": 96}
    finish(launch(tree | {"name": "disk"}, tmp_path / "disk.yaml"))
    with serving(Path(tiny_shards).parent) as server:
        data = {"train": [f"{server.url}/tiny-{{000000..000002}}.tar"], "workers": 1}
        tree |= {"name": "http", "data": tree["data"] | data, "engine": {"kind": "ddp", "timeout_s": 60}}
        finish(launch(tree, tmp_path / "http.yaml", ranks=2))
        reads = [range for _, range in server.asked if range not in ("bytes=0-0", "")]
    disk, http = tmp_path / "runs" / "disk", tmp_path / "runs" / "http"
    assert samples(http) == samples(disk)
    assert all(abs(one - other) < 2e-4 for one, other in zip(losses(http), losses(disk), strict=True))
    assert len(reads) == 6  # headers and one block of each shard, for both ranks and their workers together
