from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from clipkit.data.build import Sample, write_shard
from clipkit.data.members import SHEETS, Sheet, read_sheet
from clipkit.data.shards import Index
from clipkit.errors import UserError
from clipkit.negatives.audit import ALL, Audit, audit
from clipkit.negatives.audit.balancing import Balance, balance, write_balanced
from clipkit.negatives.audit.guide import alike, by_kind
from clipkit.negatives.audit.page import page
from clipkit.negatives.audit.stored import UNNAMED, Stored, read_stored
from clipkit.negatives.make import Recipe, make, negatives
from tests.markup import Markup
from tests.typed import well, wrong

COLOURS = ("red", "blue", "green", "black")
THINGS = ("ball", "box", "cup", "hat", "coat", "car")


def samples(count: int, seed: int = 0) -> Iterator[Sample]:
    """Each caption has a fair negative (another colour); two thirds have one that a word gives away."""
    rng = Random(seed)
    for number in range(count):
        colour, other = rng.sample(COLOURS, 2)
        thing = rng.choice(THINGS)
        made = [{"text": f"a {other} {thing}", "kind": "fair"}]
        if number % 3:
            made.append({"text": f"a {other} {thing} <b>beneath</b>", "kind": "told", "source": "llm"})
        elif number % 2:
            made.append({"text": f"a {other} {thing} again"})
        yield Sample(f"p{number:04d}", b"\xff\xd8", "jpg", ["", f"a {colour} {thing}"], {"negatives": [[], made]})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    write_shard(samples(150), folder / "a.tar")
    write_shard((replace(s, key=f"q{s.key}") for s in samples(120, 1)), folder / "b.tar")
    return folder


@pytest.fixture(scope="module")
def found(shards: Path) -> Audit:
    return audit(read_stored(shards))


@pytest.fixture(scope="module")
def balanced(shards: Path) -> Balance:
    return balance(read_stored(shards), 0.65)


def test_what_gives_a_kind_away_is_found(found: Audit) -> None:
    assert found.captions == found.pictures == 270
    assert list(found.kinds) == [ALL, "fair", "told", UNNAMED]
    fair, told = found.kinds["fair"], found.kinds["told"]
    assert told.told.auc > 0.99 and told.told.pairs > 0.99
    assert fair.told.low < 0.55 and fair.told.high > 0.45
    assert fair.covered == 1 and told.count == 180 and fair.kept is None
    assert {cue.cue: (cue.negatives, cue.captions) for cue in told.cues}["beneath"] == (1, 0)
    assert not [cue for cue in fair.cues if cue.cue in COLOURS]
    assert (fair.words, told.words, told.caption_words) == (3, 4, 3)
    assert len(told.samples) == 30 and all("beneath" in sample.text for sample in told.samples)
    assert json.loads(json.dumps(found.to_json()))["kinds"]["told"]["count"] == 180


def test_balanced_shards_lack_what_is_told(shards: Path, balanced: Balance, tmp_path: Path) -> None:
    stored = read_stored(shards)
    assert balanced.kinds["told"].left == 0 and balanced.kinds["told"].after is None
    assert balanced.kinds["fair"].left >= 0.8 * 270
    after = balanced.kinds[ALL].after
    assert after and after.auc <= 0.65 < balanced.kinds[ALL].before.auc
    assert write_balanced(shards, tmp_path / "out", balanced.stays) == 2
    again = read_stored(tmp_path / "out")
    assert again.texts == [text for text, stays in zip(stored.texts, balanced.stays) if stays]
    assert again.captions == stored.captions
    for source in sorted(shards.glob("*.tar")):
        old, new = Index.load(source), Index.load(tmp_path / "out" / source.name)
        for id in range(0, len(old), 50):
            before, now = json.loads(old.read(id)["json"]), json.loads(new.read(id)["json"])
            assert old.read(id)["jpg"] == new.read(id)["jpg"]
            assert {k: v for k, v in before.items() if k != "negatives"} == {
                k: v for k, v in now.items() if k != "negatives"
            }
            assert len(now["negatives"]) == 2  # still one list a caption
    with pytest.raises(UserError, match="is there already"):
        write_balanced(shards, tmp_path / "out", balanced.stays)
    with pytest.raises(UserError, match="between 0.5"):
        balance(stored, 0.5)


@pytest.mark.parametrize("by", ["drop", "weight"])
@pytest.mark.parametrize("count, message", [(60, "60 negatives are too few"), (120, "leaves none of 120 negatives")])
def test_nothing_is_written_where_nothing_could_be_left(tmp_path: Path, count: int, message: str, by: str) -> None:
    made = [{"text": "a ball beneath", "kind": "told"}]
    pairs = (Sample(f"p{n}", b"\xff\xd8", "jpg", ["a ball"], {"negatives": [made]}) for n in range(count))
    write_shard(pairs, tmp_path / "s.tar")
    files = ["--out", tmp_path / "out", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html"]
    assert message in wrong("negatives", "audit", tmp_path / "s.tar", "--balance", "0.65", "--by", by, *files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.tar"]


def test_places_are_looked_at_before_the_work(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.negatives.audit.stored.read_stored", lambda *_, **__: pytest.fail("worked"))
    call = ["negatives", "audit", shards]
    for option in ("--html", "--json"):
        assert f"{tmp_path}: is a folder; name a file in it" in wrong(*call, option, tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert "a.tar: is a file" in wrong(*call, "--balance", "0.65", "--out", tmp_path / "a.tar")
    assert "a.tar: is there already" in wrong(*call, "--balance", "0.65", "--out", tmp_path)


@pytest.mark.parametrize(
    "words, owner",
    [
        (["--by", "weight"], "--balance AUC"),
        (["--alike", "0.9"], "--guide MODEL"),
        (["--nats", "1"], "--plausible MODEL"),
        (["--overwrite"], "--out DIR"),
    ],
)
def test_options_that_would_be_ignored(shards: Path, words: list[str], owner: str) -> None:
    assert f"{words[0]}: belongs to {owner}" in wrong("negatives", "audit", shards, *words)


def test_kinds_that_are_not_balanced_are_named(found: Audit, balanced: Balance) -> None:
    few = "too few to be balanced alone, above the target"
    notes = {name: kind.note for name, kind in balanced.kinds.items()}
    assert notes == {ALL: "", "fair": "", "told": "left out", UNNAMED: few}
    assert balanced.kinds[UNNAMED].row(UNNAMED)[-1] == few and few in page(found, "", balanced)


def test_page_holds_everything_and_no_markup_of_others(found: Audit, balanced: Balance) -> None:
    text = page(found, "mine & yours", balanced)
    Markup(text)
    assert "<b>beneath" not in text and "&lt;b&gt;beneath" in text and "Balanced" in text


def test_sampled_and_counted(shards: Path, tmp_path: Path) -> None:
    some = read_stored(shards, sample=50, seed=3)
    assert len(some.captions) == 50 and some.captions == read_stored(shards, sample=50, seed=3).captions
    write_shard([Sample("a", b"\xff\xd8", "jpg", ["a cat"])], tmp_path / "none.tar")
    with pytest.raises(UserError, match="no negatives there"):
        read_stored(tmp_path / "none.tar")
    report = make(tmp_path / "none.tar", tmp_path / "made", kinds=["replace_nouns"], workers=1, progress=False)
    made = read_stored(tmp_path / "made")
    assert made.made == report.kinds and made.counts(False, "replace_nouns")[0] == 1


def test_what_filters_dropped_is_told(tmp_path: Path) -> None:
    captions = ["a cat on a dog", "a dog on a cat"]  # each is what the other becomes
    write_shard([Sample("a", b"\xff\xd8", "jpg", captions)], tmp_path / "s.tar")
    make(tmp_path / "s.tar", tmp_path / "made", kinds=["swap_nouns", "reshuffle"], workers=1, progress=False)
    files = ["--json", tmp_path / "a.json", "--html", tmp_path / "a.html"]
    well("negatives", "audit", tmp_path / "made", *files)
    dropped = json.loads((tmp_path / "a.json").read_text())["dropped"]
    assert sum(dropped["swap_nouns"].values()) >= 2
    assert "Candidates dropped" in (tmp_path / "a.html").read_text()


class Guide:
    """To it texts with the same words, in whatever order, are one."""

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        words = ["a", "red", "ball", "blue", "box", "big"]
        counts = torch.tensor([[float(text.split().count(word)) for word in words] for text in texts])
        return torch.nn.functional.normalize(counts, dim=-1)


def test_guide_finds_what_stays_true() -> None:
    sheet = Sheet(["a red ball", "", "a blue box"], [], [])
    sheet.negatives = [
        [{"text": "ball a red", "kind": "swap"}, {"text": "a red box", "kind": "replace"}],
        [],
        [{"text": "a box blue", "kind": "swap"}, {"text": "a big box", "kind": "replace"}],
    ]
    stored = Stored()
    stored.add(sheet, "p")

    gone = alike(stored, Guide(), 0.9)
    assert gone.tolist() == [True, False, True, False] and by_kind(stored, gone) == {"swap": 2}
    left = stored.without(gone)
    assert left.texts == ["a red box", "a big box"] and left.owners == [0, 1] and left.captions == stored.captions
    assert alike(stored, Guide(), 0.6).all()
    with pytest.raises(UserError, match="is a cosine"):
        alike(stored, Guide(), 1.5)


def test_real_captions_before_and_after(shared: Path) -> None:
    """Relations that rules replaced in Flickr8k captions are told from the text; fewer of them hardly."""
    index, stored = Index.load(shared / "data" / "flickr8k_dev-000.tar"), Stored()
    for id in range(0, len(index), 6):
        sheet = read_sheet(index.read(id, SHEETS))
        sheet.negatives = [negatives(caption, Recipe(("replace_relations",), 1, 0)) for caption in sheet.captions]
        stored.add(sheet, index.key(id))
    (kind,) = {name: k for name, k in balance(stored, 0.65).kinds.items() if name != ALL}.values()
    assert kind.before.low > 0.8
    assert kind.after is None or kind.after.low <= 0.65
    assert kind.left < kind.count
