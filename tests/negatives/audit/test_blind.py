from __future__ import annotations

import numpy as np
import pytest

from clipkit.negatives.audit import blind


def test_cues_are_words_pairs_letters_and_lengths() -> None:
    cues = blind.cues_of(["A cat sits", "a dog"], 1)
    first = {cues.names[i] for i in cues.index[cues.start[0] : cues.start[1]]}
    assert {"a", "cat", "^ a", "cat sits", "sits $", "3 words", "10 letters or more", "…A c…", "…sits…"} <= first
    assert "dog" not in first and "A" not in first
    assert len(first) == cues.start[1]  # each once
    common = blind.cues_of(["A cat sits", "a dog"], 2)
    assert common.names == ["a", "^ a"]
    index, start = cues.of(np.array([1, 0]))
    assert {cues.names[i] for i in index[start[1] :]} == first
    counts = cues.count(np.array([0, 1]), np.array([2.0, 3.0]))
    assert counts[cues.names.index("a")] == 5 and counts[cues.names.index("dog")] == 3


def test_fit_meets_the_plain_gradient() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdef"), 4)) for _ in range(60)]
    labels, weights = rng.random(60) < 0.5, rng.uniform(0.5, 2, 60)
    cues, rows = blind.cues_of(texts, 2), np.arange(60)
    slope = blind.fit(cues, rows, labels, weights)
    there = np.zeros((60, len(slope)))
    for i in rows:
        there[i, cues.index[cues.start[i] : cues.start[i + 1]]] = 1
    there[:, -1] = 1
    assert np.allclose(blind.score(cues, rows, slope), there @ slope)

    def loss(at: np.ndarray) -> float:
        margin = np.where(labels, 1, -1) * (there @ at)
        each = np.log1p(np.exp(-margin))
        sides = [np.average(each[side], weights=weights[side]) for side in (labels, ~labels)]
        return float(np.mean(sides) + blind.RIDGE / 2 * (at[:-1] ** 2).sum())

    moved = [loss(slope + step) for step in rng.normal(0, 1e-2, (20, len(slope)))]
    assert min(moved) > loss(slope)


def test_auc_counts_pairs_and_halves_ties() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    weights = rng.integers(0, 3, (2, 40)).astype(float)
    for row, found in zip(weights, blind.auc(logits, labels, weights)):
        pairs = [
            (row[i] * row[j], (logits[i] > logits[j]) + (logits[i] == logits[j]) / 2)
            for i in np.flatnonzero(labels)
            for j in np.flatnonzero(~labels)
        ]
        assert found == pytest.approx(sum(w * won for w, won in pairs) / sum(w for w, _ in pairs))
    assert blind.auc(logits, np.ones(40, bool), weights[0]) == 0.5


def test_texts_of_a_picture_share_a_fold() -> None:
    folds = blind.folds_of(["p1", "p2", "p1", *map(str, range(100))])
    assert folds[0] == folds[2] and len(set(folds.tolist())) == blind.FOLDS
    assert (folds != blind.folds_of(["p1", "p2", "p1", *map(str, range(100))], 1)).any()


def test_what_only_one_picture_says_is_not_told() -> None:
    """A cue that repeats within pictures only is no cue for others: held out, it tells nothing."""
    rng = np.random.default_rng(2)
    texts = [chr(0x4E00 + p) for p in range(60) for _ in range(4)]
    labels = np.repeat(rng.random(60) < 0.5, 4)
    pictures = [f"{p}" for p in range(60) for _ in range(4)]
    cues, rows, ones = blind.cues_of(texts), np.arange(240), np.ones(240)
    folds = blind.folds_of(pictures)
    logits = blind.held_out(cues, rows, labels, ones, folds)
    assert 0.3 < blind.auc_over(logits, labels, ones, folds) < 0.7
    seen = blind.score(cues, rows, blind.fit(cues, rows, labels, ones))
    assert blind.auc(seen, labels, ones) > 0.95
