"""What all tests share: where the shared data lies, a cache of their own, and which marks need what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shapes import check_shapes

check_shapes("clipkit.objective")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data (CLIPKIT_SHARED, else beside the repository); the test is skipped where it is absent."""
    folder = Path(os.environ.get("CLIPKIT_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("no shared data here (CLIPKIT_SHARED)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shard indexes are cached away from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run (gpu, multi_gpu) and what was not asked for by name (slow, network)."""
    asked = config.getoption("-m")
    for item in items:
        for mark in ("slow", "network"):
            if item.get_closest_marker(mark) and mark not in asked:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: run with -m {mark}"))
        for mark, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(mark) and _gpus() < needed:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {_gpus()} GPUs here"))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
