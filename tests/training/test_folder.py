"""The run's folder: where it cannot be, and what a refused start leaves in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipkit import config as configuration
from clipkit.errors import UserError
from clipkit.training.loop import train


def test_a_resume_that_is_refused_leaves_the_runs_settings(tiny_tree: dict) -> None:
    """They say what the run was made with, until a run with others really goes on."""
    tree = tiny_tree | {"samples": 32}
    folder = train(configuration.validate(tree))
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match="holds the moments of adamw"):
        train(configuration.validate(tree | {"optim": {"lr": 1e-3, "kind": "lion"}, "log_every": 7}), resume=True)
    assert (folder / "config.yaml").read_text() == before
    train(configuration.validate(tree | {"log_every": 7}), resume=True)
    assert configuration.load(folder / "config.yaml").log_every == 7
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("place", ["afile", "afile/x"])
def test_a_folder_that_cannot_be_made(tiny_tree: dict, tmp_path: Path, place: str) -> None:
    (tmp_path / "afile").touch()
    with pytest.raises(UserError, match=f"{place}: the run cannot be written there: .*; choose another name= or out="):
        train(configuration.validate(tiny_tree | {"out": str(tmp_path / place)}))
