"""Tags and labels: from KEY.json into the batch, the vocabulary, and what cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.data.build import Sample, encode_jpeg, write_shard
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader, check_first
from clipkit.data.members import Unreadable, label_of, read_sheet, tags_of
from clipkit.data.plan import Plan
from clipkit.data.reshard import reshard
from clipkit.data.shards import Index
from clipkit.data.tags import count_tags, vocabulary, write_vocabulary
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError

from .conftest import noise_picture

Load = Callable[..., Batch]
TAGGED: list[dict[str, Any]] = [
    {"tags": ["Dog", " red  ball", "dog"], "label": 3},
    {"tags": ["zebra"], "label": "bird"},
    {"tags": ["lawn", "zebra", "dog"], "label": "fish"},
    {"tags": [], "label": 0},
    {"label": "bird "},
    {"tags": ["lawn"]},
]
WORDS = ["lawn", "dog", "red ball"]


def tagged(number: int, **extra: Any) -> Sample:
    return Sample(f"k{number}", encode_jpeg(noise_picture(number)), "jpg", [f"caption {number}"], extra)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard((tagged(number, **extra) for number, extra in enumerate(TAGGED)), tmp_path / "t.tar")
    return tmp_path / "t.tar"


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.txt").write_text("lawn\n\nDog\nred ball\n")
    return str(tmp_path / "words.txt")


@pytest.fixture(scope="module")
def load() -> Load:
    """The one batch of a shard, in the order of its pairs."""
    tokenizer = Tokenizer()

    def load(path: Path, **data: Any) -> Batch:
        config = configuration.validate({"data": {"workers": 0, "augment": "none", **data}}).data
        index = Index.load(path)
        plan = Plan(index, batch_size=len(index), lanes=1)
        loader = Loader(index, plan, data=config, preprocess=Preprocess(16), tokenizer=tokenizer, seed=3)
        (batch,) = loader.steps(0, 1)
        return batch

    return load


def by_id(batch: Batch, table: torch.Tensor) -> list[Any]:
    return table[batch.id.argsort()].tolist()


def test_tags_are_marked_and_unknown_ones_left_out(shard: Path, words: str, load: Load) -> None:
    batch = load(shard, tags=words)
    assert batch.tags is not None and batch.tags.dtype == torch.bool and batch.label is None
    expected = [[0, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert by_id(batch, batch.tags.int()) == expected
    assert list(vocabulary(words)) == WORDS


def test_labels_are_their_number_or_their_names(shard: Path, load: Load) -> None:
    batch = load(shard, labels=True)
    assert batch.label is not None and batch.label.dtype == torch.int64 and batch.tags is None
    three, bird, fish, zero, again, none = by_id(batch, batch.label)
    assert (three, zero, none) == (3, 0, -1) and bird == again and bird > 1 << 61 and fish not in (bird, 3, 0)


def test_unasked_for_they_are_not_looked_at(tmp_path: Path, load: Load) -> None:
    write_shard([tagged(0, tags="dog, cat", label=[1])], tmp_path / "x.tar")
    batch = load(tmp_path / "x.tar")
    assert batch.tags is None and batch.label is None


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"tags": "dog, cat"}, "broken json: tags should be a list of words"),
        ({"tags": ["dog", 1]}, "broken json: tags should be"),
        ({"label": -1}, "broken json: label should be a whole number ≥ 0 or a name, found -1"),
        ({"label": True}, "broken json: label should be"),
        ({"label": 1.5}, "broken json: label should be"),
        ({"label": " "}, "broken json: label should be"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(extra: dict, reason: str, tmp_path: Path, words: str, load: Load) -> None:
    path = tmp_path / "x.tar"
    write_shard([tagged(0, **extra), tagged(1, tags=["dog"])], path)
    sheet = read_sheet(Index.load(path).read(0))
    with pytest.raises(Unreadable, match=reason):
        (tags_of if "tags" in extra else label_of)(sheet)
    data = configuration.validate({"data": {"tags": words, "labels": True}}).data
    index = Index.load(path)
    with pytest.raises(UserError, match=f"x.tar: k0: {reason}"):
        check_first(index, Plan(index, batch_size=2), data)
    batch = load(path, tags=words, labels=True, on_error="skip")
    assert batch.id.tolist() == [1, 1] and batch.skipped[0][1].startswith("broken json")


def test_they_survive_resharding(shard: Path, tmp_path: Path, words: str, load: Load) -> None:
    reshard(str(shard), tmp_path / "new", short_side=20, workers=1, progress=False)
    old, new = (load(path, tags=words, labels=True) for path in (shard, tmp_path / "new"))
    for table in ("tags", "label"):
        assert by_id(new, getattr(new, table)) == by_id(old, getattr(old, table))


def test_the_vocabulary_is_the_most_frequent_words(shard: Path, tmp_path: Path) -> None:
    counts, with_tags, pairs = count_tags(shard, progress=False)
    assert counts == {"dog": 2, "zebra": 2, "lawn": 2, "red ball": 1} and (with_tags, pairs) == (4, 6)
    file = tmp_path / "deep" / "tags.txt"
    assert write_vocabulary(counts, 3, file) == [("dog", 2), ("lawn", 2), ("zebra", 2)]
    assert file.read_text() == "dog\nlawn\nzebra\n" and [p.name for p in file.parent.iterdir()] == ["tags.txt"]
    with pytest.raises(UserError, match=r"tags\.txt: is there already"):
        write_vocabulary(counts, 9, file)
    assert len(write_vocabulary(counts, 9, file, overwrite=True)) == 4
    with pytest.raises(UserError, match="no pair has tags"):
        write_vocabulary(type(counts)(), 9, tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"dog\ncat\nDog\n", "line 3: 'dog' is there already"),
        (b"\n \n", "holds no word"),
        (b"caf\xe9\n", "no vocabulary of tags"),
        (None, "no vocabulary of tags .* make one with clipkit shards tags"),
    ],
)
def test_vocabularies_that_cannot_be_right(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        vocabulary(str(tmp_path / "bad.txt"))


def test_terms_say_what_they_need() -> None:
    terms = {
        "stc": {},
        "class_similarity": {},
        "tcl": {"positives": "label"},
        "infonce": {"mask_same_label": True},
        "spurious": {},
    }
    with pytest.raises(UserError) as caught:
        configuration.validate({"objective": terms, "data": {"negatives": 1}})
    assert str(caught.value).splitlines()[1:] == [
        "  objective.stc needs data.tags and model.heads.tags.vocabulary (words: clipkit shards tags), got none",
        "  objective.class_similarity needs data.labels: true, got false",
        "  objective.tcl needs data.labels: true, got false",
        "  objective.infonce needs data.labels: true, got false",
        "  objective.spurious needs data.positives ≥ 1, got 0",
    ]
    heads = {"data": {"tags": "a.txt"}, "model": {"heads": {"tags": {"vocabulary": "b.txt"}}}}
    with pytest.raises(UserError, match=r"model\.heads\.tags\.vocabulary: should be the file of data\.tags, a\.txt"):
        configuration.validate(heads)
