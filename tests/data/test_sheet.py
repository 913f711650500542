"""Contact sheets: what stands on them is what the shards hold and what training gets, and no caption can break them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from clipkit.config import Config
from clipkit.data.build import Sample, encode_jpeg, write_shard
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
from clipkit.data.sheet import drawing, drawn_sheet, show_shard, stored_sheet, write_html, write_png
from clipkit.data.sheet.words import bytes_of, changes, printable
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from tests.markup import CHROMIUM, Markup, browse

from .conftest import noise_picture

HOSTILE = '</span><script>alert(1)</script><img src="http://example.org/x.png" onerror=alert(1)>'
FOREIGN = ["две собаки бегут", "二匹の犬が走っている" * 30, "كلبان يجريان \u202e", "🐕 \x00 dogs", "x" * 3000]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A pair whose captions, negatives, group and extra fields are what the world offers; and one without picture."""
    captions = [HOSTILE, "", *FOREIGN]
    negatives = [[{"text": text + " not", "kind": HOSTILE, "source": HOSTILE}] for text in captions]
    record = {"captions": captions, "negatives": negatives, "group": HOSTILE, "note": [HOSTILE]}
    members = [("a.jpg", encode_jpeg(noise_picture(1))), ("a.json", json.dumps(record).encode())]
    write = write_members(tmp_path / "x.tar", [*members, ("b.jpg", b"none"), ("b.txt", b"a dog")])
    return write


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Any members, in order, as a tar."""
    import tarfile

    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def config(folder: Path, **data: object) -> Config:
    """A run on the small shards."""
    return Config.model_validate({"batch_size": 8, "seed": 5, "data": {"train": [str(folder)], "lanes": 4, **data}})


def test_changed_words_are_marked() -> None:
    def marked(caption: str, negative: str) -> str:
        signs = {"same": "", "new": "+", "gone": "-"}
        return " ".join(signs[mark] + word for word, mark in changes(caption, negative))

    assert marked("A red dog runs", "a blue dog runs") == "a +blue dog runs"
    assert marked("a dog on the grass", "a dog grass") == "a dog -on -the grass"
    assert marked("two dogs", "two big dogs") == "two +big dogs"
    assert marked("a dog bites a man", "a man bites a dog") == "a +man bites a +dog"
    assert "-" not in marked("one two three four", "four one two three")
    assert marked("same", "same") == "same" and marked("", "new words") == "+new +words"
    assert marked("w " * 300, "v") == "v"  # too long to compare


def test_what_cannot_be_printed_is_replaced() -> None:
    assert printable("a\x00b\ud800c\n") == "a\ufffdb\ufffdc\n"
    assert [bytes_of(n) for n in (0, 999, 1234, 10**7, 10**13)] == ["0 B", "999 B", "1.23 kB", "10 MB", "10 TB"]


def test_pairs_are_chosen_by_place_or_by_seed(shard_folder: Path) -> None:
    def ids(**choice: int) -> list[int]:
        return [pair["id"] for pair in show_shard(shard_folder, **choice)]

    assert ids(n=2, start=1) == [1, 2] and ids(n=9, start=21) == [21, 22] and ids(start=23) == []
    chosen = ids(n=5, random=1)
    assert chosen == ids(n=5, random=1) != ids(n=5, random=2) and len(set(chosen)) == 5
    assert sorted(ids(n=99, random=1)) == list(range(23)) and min(ids(n=9, start=14, random=3)) == 14


def test_a_stored_sheet_shows_everything(shard_folder: Path, tmp_path: Path) -> None:
    sheet = stored_sheet(shard_folder, 3, start=6)
    assert sheet.kinds() == {"swap": 9, "replace": 3}
    write_html(sheet, tmp_path / "sheet.html")
    page = Markup((tmp_path / "sheet.html").read_text())
    assert len(page.all("article")) == len(page.all("img")) == 3 and len(page.all("ol")) == 3
    said = " ".join(" ".join(page.text).split())
    assert "3 of 23 pairs, as stored" in said and "Negatives by kind: swap 9, replace 3" in said
    for number in (6, 7, 8):
        assert f"picture {number} first words" in said and f"the other words of picture number {number}" in said
    assert "s-1.tar/k00007" in said and "40x30" in said
    first = base64.b64decode((page.all("img")[0]["src"] or "").removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(first)).size == (40, 30)


@pytest.mark.parametrize("settings", [{"augment": "crop", "crop_scale": 0.3}, {"augment": "none", "caption": "first"}])
def test_a_batch_is_the_loaders(shard_folder: Path, settings: dict[str, str]) -> None:
    run, step, tokenizer = config(shard_folder, negatives=2, workers=0, **settings), 3, Tokenizer()
    index = Index.load(shard_folder)
    plan = Plan(index, batch_size=8, seed=5, lanes=4)
    loader = Loader(index, plan, data=run.data, preprocess=Preprocess(16), tokenizer=tokenizer, seed=5)
    (batch,) = loader.steps(step, step + 1)
    pairs = drawn_sheet(run, Preprocess(16), step).pairs
    drawn = [pair.drawn for pair in pairs if pair.drawn]
    assert [pair.id for pair in pairs] == batch.id.tolist() and len(drawn) == 8
    assert [d.group for d in drawn] == batch.group.tolist()
    for row, one in enumerate(drawn):
        assert batch.image is not None and batch.negative_text is not None and batch.valid is not None
        assert np.array_equal(np.array(one.picture), batch.image[row].permute(1, 2, 0).numpy())
        texts = [one.caption, *(negative["text"] for negative in one.negatives)]
        expected = [batch.text[row], *batch.negative_text[row][batch.valid[row]]]
        assert [[t for t in tokenizer([text])[0].tolist() if t] for text in texts] == [
            [t for t in tokens.tolist() if t] for tokens in expected
        ]
        assert all(negative["kind"] in ("swap", "replace") for negative in one.negatives)
        assert one.caption in pairs[row].captions


def test_a_drawn_sheet_on_paper(shard_folder: Path, tmp_path: Path) -> None:
    sheet = drawn_sheet(config(shard_folder, negatives=1), Preprocess(16), step=1, n=2, start=1, random=4)
    assert sheet.pairs[0].to_json()["drawn"]["picture"] == "16x16" and json.dumps(sheet.pairs[0].to_json())
    write_html(sheet, tmp_path / "sheet.html")
    said = " ".join(Markup((tmp_path / "sheet.html").read_text()).text)
    assert "2 of the 8 pairs of step 1" in said and "Not drawn:" in said and "seen as 16x16" in said
    assert all(pair.drawn and pair.drawn.caption in said for pair in sheet.pairs)


def test_stored_features_come_from_whole_pictures(shard_folder: Path) -> None:
    crops = drawn_sheet(config(shard_folder, crop_scale=0.1), Preprocess(16), n=1)
    whole = drawn_sheet(config(shard_folder, crop_scale=0.1, cache_image_features=True), Preprocess(16), n=1)
    plain = drawn_sheet(config(shard_folder, augment="none"), Preprocess(16), n=1)
    pictures = [np.array(s.pairs[0].drawn.picture) for s in (crops, whole, plain) if s.pairs[0].drawn]
    assert np.array_equal(pictures[1], pictures[2]) and not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(("on_error", "said"), [("raise", "ends the run"), ("skip", "takes the place of")])
def test_what_training_does_with_an_unreadable_pair(tmp_path: Path, on_error: str, said: str) -> None:
    good = encode_jpeg(noise_picture(1))
    samples = [Sample(f"{n}", b"\xff\xd8\xff" if n == 2 else good, "jpg", [f"text {n}"]) for n in range(8)]
    write_shard(samples, tmp_path / "x.tar")
    pairs = drawn_sheet(config(tmp_path, on_error=on_error), Preprocess(16)).pairs
    (bad,) = [pair for pair in pairs if said in pair.problem + pair.note]
    assert bool(bad.drawn) == (on_error == "skip") and len(pairs) == 8
    assert bad.where == ("x.tar/2" if on_error == "raise" else "x.tar/3") and "unreadable picture" in str(bad.to_json())


def test_no_text_becomes_markup(foreign: Path, tmp_path: Path) -> None:
    write_html(stored_sheet(foreign, 9), tmp_path / "sheet.html")
    text = (tmp_path / "sheet.html").read_text()
    page = Markup(text)
    assert HOSTILE not in text and page.all("script") == [] and len(page.all("img")) == 1
    assert (page.all("img")[0]["src"] or "").startswith("data:image/jpeg;base64,")
    assert [a["href"] for a in page.all("link")] == ["data:,"] and "script-src &#x27;none&#x27;" in text
    assert "две" in text and "🐕" in text and "1 of these pairs cannot be used" in " ".join(page.text)
    assert "⚠ unreadable picture" in text and "a dog" in text


def test_no_text_breaks_a_drawing(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = stored_sheet(foreign, 9)
    write_png(sheet, tmp_path / "sheet.png")
    drawn = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert drawn.width == 1322 and len(drawn.getcolors(1 << 20) or ()) > 1000
    assert drawn.getpixel((1310, drawn.height - 1)) == (255, 255, 255)
    monkeypatch.setattr(drawing, "_font", ImageFont.load_default_imagefont)  # Pillow without FreeType
    write_png(sheet, tmp_path / "plain.png")
    with Image.open(tmp_path / "plain.png") as plain:
        assert plain.height > 300


def test_a_drawing_has_bounds(shard_folder: Path, tmp_path: Path) -> None:
    sheet = stored_sheet(shard_folder, 1)
    sheet.pairs *= 201
    with pytest.raises(UserError, match="at most 200 pairs, not 201"):
        write_png(sheet, tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(("width", "options"), [(1280, []), (390, ["--blink-settings=preferredColorScheme=0"])])
def test_in_a_browser(foreign: Path, tmp_path: Path, width: int, options: list[str]) -> None:
    write_html(stored_sheet(foreign, 9), tmp_path / "sheet.html")
    checks = """parent.postMessage({
      wide: document.documentElement.scrollWidth > innerWidth, width: innerWidth,
      pictures: [...document.images].every((i) => i.naturalWidth > 0), marks: document.querySelectorAll("mark").length,
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
    }, "*");"""
    markup = Markup(browse(tmp_path / "sheet.html", checks, tmp_path, width, "--dump-dom", *options))
    found = json.loads(markup.all("html")[0]["data-found"] or "")
    assert found["width"] == width and not found["wide"] and found["pictures"] and found["marks"] > 5
    assert found["dark"] == bool(options)
