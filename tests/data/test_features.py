"""Stored features count only when they are complete and computed from what is asked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from clipkit.data.features import FeatureStore


def test_create_attach_commit_read(tmp_path: Path) -> None:
    store, mark = FeatureStore(tmp_path / "cache" / "f.npy"), {"index": "a", "tower": "b"}
    assert not store.matches(mark)
    ours = store.create(6, 3)
    ours[:3] = 1
    theirs = store.attach()
    theirs[3:] = 2
    for rows in (ours, theirs):
        rows.flush()
    assert not store.matches(mark)
    store.commit(mark)
    assert store.matches(mark) and not store.matches({"index": "a", "tower": "c"})
    assert json.loads((tmp_path / "cache" / "f.json").read_text()) == mark
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["f.json", "f.npy"]
    copy = pickle.loads(pickle.dumps(store))
    assert copy[np.array([0, 5])].tolist() == [[1] * 3, [2] * 3] and copy[4].tolist() == [2] * 3
    assert copy[0].dtype == np.float32


def test_a_new_file_takes_the_old_ones_place(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "f.npy")
    for number in (1, 2):
        rows = store.create(2, 2)
        rows[:] = number
        rows.flush()
        store.commit({"n": number})
    assert store.matches({"n": 2}) and not store.matches({"n": 1})
    assert FeatureStore(tmp_path / "f.npy")[1].tolist() == pytest.approx([2, 2])
