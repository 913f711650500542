"""Zero-shot: the classifier recipe, metrics, ties, and `classify` on what users hand over."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest

from clipkit.errors import UserError
from clipkit.evaluation import benchmark as data
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.folders import export
from clipkit.evaluation.gallery import write_gallery
from clipkit.evaluation.labelled import read_labelled
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.sheet import Rows, read_answers, write_answers
from clipkit.evaluation.zeroshot import NONE, Answers, classify, collect, each, fit_scale, prepare, weights
from tests.evaluation.fakes import Constant, Counting, Random, name_of, picture
from tests.markup import CHROMIUM, Markup, browse

CLASSES = ["red_fox", "cat", "dog", "cow", "owl", "bee", "elk"]


@pytest.fixture
def folder(tmp_path):
    """Class c has 4 + c pictures; pictures are told apart by their number."""
    number = 0
    for c, name in enumerate(CLASSES):
        for _ in range(4 + c):
            path = tmp_path / "set" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
            number += 1
    (tmp_path / "set" / "about.txt").write_text("not a picture")
    return tmp_path


class Knows(Counting):
    """Pictures of class c lie on axis c; `wrong` pictures on the next one."""

    def __init__(self, wrong=()):
        super().__init__()
        labels = np.repeat(np.arange(7), np.arange(4, 11))
        self.place = {name_of(picture(n)): int(c) + (n in wrong) for n, c in enumerate(labels)}

    def vector(self, key):
        if key in self.place:
            return np.eye(7)[self.place[key] % 7]
        words = [name.replace("_", " ") for name in CLASSES]
        return np.eye(7)[next(c for c, word in enumerate(words) if word in key)] + len(key) / 100


def run(folder, model, tie="official", allow_missing=False, **changes):
    fields = {"name": "own", "kind": "zeroshot", "version": "1", "title": "own", "images": ["src:set"]}
    fields |= {"classes": CLASSES, "templates": ["a {}", "the {} here"]} | changes
    (folder / "own.yaml").write_text(json.dumps(fields))
    roots = Roots({"src": folder})
    task = prepare(data.load(folder / "own.yaml"), roots, allow_missing)
    return task.score(Embedder(model, roots), tie)


def test_oracle(folder):
    result = run(folder, Knows())
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        "top1": 1.0,
        "mean_per_class": 1.0,
        "top5": 1.0,
    }
    assert result.n == sum(range(4, 11)) and result.headline == "top1"
    assert result.details["confusions"] == []


def test_calibration_of_the_class_chosen(folder):
    model = Knows(wrong=range(4))
    model.scale = 1000.0  # sure of everything, and wrong of 4 in 49
    found = run(folder, model).details["calibration"]
    assert found["scale"] == 1000.0 and found["ece"] == pytest.approx(4 / 49, abs=1e-6)


def test_mean_per_class_and_confusions(folder):
    # All four red foxes are taken for cats.
    result = run(folder, Knows(wrong=range(4)))
    assert result.metrics["top1"].value == pytest.approx(45 / 49)
    assert result.metrics["mean_per_class"].value == pytest.approx(6 / 7)
    assert result.metrics["top1"].chance == pytest.approx(1 / 7)
    assert result.details["confusions"] == [{"class": "red fox", "taken_for": "cat", "count": 4, "share": 1.0}]
    assert result.by_category["red fox"]["top1"].value == 0.0
    item = result.items[0]
    assert (item["category"], item["choice"], item["correct"]) == ("bee", "bee", 1.0)
    wrong = [example for example in result.examples if example["correct"] == 0.0]
    assert len(wrong) == 4 and len(result.examples) == 16
    assert wrong[0]["texts"][wrong[0]["choice"][0]] == "cat" and [1] in [[m for m in wrong[0]["match"][0] if m]]


def test_constant_and_random(folder):
    strict = run(folder, Constant())
    assert strict.metrics["top1"].value == strict.metrics["top5"].value == strict.metrics["mean_per_class"].value == 0
    assert strict.tie["rate"] == 1.0
    half = run(folder, Constant(), "half")
    assert half.metrics["top1"].value == pytest.approx(1 / 7) and half.metrics["top5"].value == pytest.approx(5 / 7)
    assert run(folder, Constant(), "lenient").metrics["top1"].value == 1.0
    for seed in range(3):
        metric = run(folder, Random(seed)).metrics["top1"]
        assert metric.low - 0.05 <= 1 / 7 <= metric.high + 0.05


def test_classes_of_one_name_tie(folder):
    result = run(folder, Random(), classes={name: "thing" if n < 2 else name for n, name in enumerate(CLASSES)})
    assert result.by_category["thing"]["top1"].value == 0.0


def test_same_from_a_tar(folder):
    with tarfile.open(folder / "set.tar", "w") as tar:
        tar.add(folder / "set", arcname=".")
    (folder / "own.yaml").unlink(missing_ok=True)
    expected = run(folder, Random())
    roots = Roots({"src": folder / "set.tar"})
    fields = json.loads((folder / "own.yaml").read_text()) | {"images": ["src:"]}
    (folder / "own.yaml").write_text(json.dumps(fields))
    task = prepare(data.load(folder / "own.yaml"), roots)
    assert task.score(Embedder(Random(), roots), "official").metrics == expected.metrics


def test_several_sets_are_told_apart(folder):
    shutil.copytree(folder / "set", folder / "other")
    result = run(folder, Knows(), images=["src:set", "src:other"])
    assert {place: scores["top1"].n for place, scores in result.breakdowns["images"].items()} == {
        "set": 49,
        "other": 49,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [*CLASSES[:-1], "elks"]}, "folder elk is no class; did you mean elks"),
        ({"classes": [*CLASSES, "ant"]}, "1 of 8 classes have no picture .* the first is ant"),
        ({"images": ["src:sets"]}, "7 of 7 classes have no picture"),
        ({"templates": ["a photo"]}, "template 'a photo': should hold {}"),
    ],
)
def test_mistakes(folder, changes, message):
    with pytest.raises(UserError, match=message):
        run(folder, Random(), **changes)


def test_allow_missing_reports_the_coverage(folder):
    result = run(folder, Knows(), allow_missing=True, classes=[*CLASSES, "cat house"])
    assert result.coverage["share"] == pytest.approx(7 / 8)
    assert result.metrics["mean_per_class"].value == 1.0


def test_classifier_is_the_mean_of_unit_prompts():
    model = Random()
    prompts = [["a cat", "the cat"], ["a dog"]]
    rows = weights(Embedder(model, Roots()), prompts)
    unit = {p: model.vector(p) / np.linalg.norm(model.vector(p)) for group in prompts for p in group}
    mean = (unit["a cat"] + unit["the cat"]) / 2
    assert np.allclose(rows, [mean / np.linalg.norm(mean), unit["a dog"]], atol=1e-6)


def test_classify(folder):
    model = Knows()
    model.scale = 10.0
    (first,) = classify(model, folder / "set" / "cat" / "4.png", CLASSES, ["a {}"], top=2)
    assert first["image"] == str(folder / "set" / "cat" / "4.png")
    assert first["classes"][0]["class"] == "cat" and len(first["classes"]) == 2
    similarities = np.array(
        [c["similarity"] for c in classify(model, picture(4), CLASSES, ["a {}"], top=7)[0]["classes"]]
    )
    expected = np.exp(10 * similarities) / np.exp(10 * similarities).sum()
    assert first["classes"][0]["probability"] == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("scale", [None, 100.0])
def test_scale_is_100_where_a_model_has_none(scale):
    model = Random()
    if scale:
        model.scale = scale
    assert classify(model, picture(0), ["a", "b"]) == classify(Random(), picture(0), ["a", "b"])


def test_classify_takes_folders_globs_lists_and_files_of_names(folder):
    names = folder / "classes.txt"
    names.write_text("\n".join(CLASSES) + "\n\n")
    by_folder = classify(Random(), folder / "set", names)
    by_glob = classify(Random(), f"{folder}/set/**/*.png", ",".join(CLASSES))
    several = [folder / "set" / "cat", picture(0)]
    by_list = classify(Random(), several, {name: name.replace("_", " ") for name in CLASSES}, batch_size=2)
    assert len(by_folder) == 49 and by_folder == by_glob
    assert [row["image"] for row in by_list][-2:] == [str(folder / "set" / "cat" / "8.png"), "picture 5"]
    assert by_list[0] == next(row for row in by_folder if row["image"].endswith("/4.png"))


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        ("none/*.png", "a,b", r"none/\*.png: no picture found"),
        ([], "a,b", "no picture found"),
        (picture(0), "a", "give at least two different names"),
        (picture(0), "names.txt", "classes: no such file names.txt"),
    ],
)
def test_classify_mistakes(images, classes, message):
    with pytest.raises(UserError, match=message):
        classify(Random(), images, classes)


def test_classify_names_the_unreadable_picture(folder):
    (folder / "set" / "cat" / "4.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read picture .*/cat/4.png"):
        classify(Random(), folder / "set", CLASSES)


def test_none_of_these(folder):
    best = classify(Random(), folder / "set" / "cat", CLASSES)
    floor = float(np.median([one["classes"][0]["similarity"] for one in best]))
    judged = classify(Random(), folder / "set" / "cat", CLASSES, none_below=floor, top=2)
    for plain, one in zip(best, judged):
        near = plain["classes"][0]["similarity"] >= floor
        assert one["classes"][0]["class"] == (plain["classes"][0]["class"] if near else NONE)
        assert len(one["classes"]) == 2 and one["classes"][0]["similarity"] == plain["classes"][0]["similarity"]
    with pytest.raises(UserError, match="is what a picture of no class is called"):
        classify(Random(), picture(0), ["cat", NONE])


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_answers_on_disk_go_on_where_they_ended(folder, tmp_path, form):
    file, pictures = tmp_path / f"found.{form}", collect(folder / "set")
    whole = tmp_path / f"whole.{form}"
    answers = Answers(Random(), CLASSES, top=2, batch_size=8)
    assert write_answers(answers, pictures, whole) == {"pictures": 49, "there already": 0, "unreadable": 0}
    write_answers(answers, pictures[:20], file)
    file.write_text(file.read_text()[:-9])  # interrupted in the middle of a row
    assert write_answers(answers, pictures, file) == {"pictures": 49, "there already": 19, "unreadable": 0}
    assert file.read_text() == whole.read_text()
    plain = classify(Random(), folder / "set", CLASSES, top=2)
    if form == "jsonl":
        assert [json.loads(line) for line in file.read_text().splitlines()] == plain
    else:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert [(r["image"], r["class"], r["class_2"]) for r in rows] == [
            (one["image"], *(c["class"] for c in one["classes"])) for one in plain
        ]
    with pytest.raises(UserError, match="holds answers of another model, other classes or settings"):
        write_answers(Answers(Random(), CLASSES, top=3), pictures, file)


def test_answers_on_disk_survive_being_killed(folder, tmp_path, monkeypatch):
    """Rows without their batch's end in the note are made again: the file is that of a call left in peace."""
    pictures, whole, file = collect(folder / "set"), tmp_path / "whole.jsonl", tmp_path / "found.jsonl"
    answers = Answers(Random(), CLASSES, top=2, batch_size=8)
    write_answers(answers, pictures, whole)
    commit, times = Rows._commit, iter(range(100))

    def killed(self):
        if next(times) == 4:
            raise KeyboardInterrupt
        commit(self)

    monkeypatch.setattr(Rows, "_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        write_answers(answers, iter(pictures), file)
    monkeypatch.setattr(Rows, "_commit", commit)
    assert len(file.read_text().splitlines()) == 32
    assert write_answers(answers, iter(pictures), file)["there already"] == 24
    assert file.read_bytes() == whole.read_bytes()
    assert write_answers(answers, iter(pictures), file)["there already"] == 49
    assert file.read_bytes() == whole.read_bytes()


def test_pictures_are_taken_as_they_are_needed(folder, tmp_path):
    """Memory: no more pictures are asked for than a few batches ahead of what is written."""
    pictures, file = collect(folder / "set"), tmp_path / "found.jsonl"
    ahead = []

    def one_by_one():
        for number, one in enumerate(pictures):
            ahead.append(number - len(file.read_text().splitlines()))
            yield one

    write_answers(Answers(Random(), CLASSES, batch_size=4), one_by_one(), file)
    assert len(ahead) == 49 and max(ahead) <= 16


def test_parquet_answers(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "set" / "cat" / "4.png").write_bytes(b"nothing")
    file, pictures = tmp_path / "found.parquet", collect(folder / "set")
    answers = Answers(Random(), CLASSES, top=2)
    write_answers(answers, pictures[:20], file)
    assert write_answers(answers, pictures, file)["there already"] == 20
    rows = parquet.read_table(file).to_pylist()
    said = list(read_answers(file))
    assert [row["image"] for row in rows] == [str(picture) for picture in pictures] == [one["image"] for one in said]
    assert [row["class_2"] for row in rows] == [one["classes"][1]["class"] if one["classes"] else None for one in said]
    assert [bool(row["error"]) for row in rows] == ["error" in one for one in said]
    assert [row["image"] for row in rows if row["error"]] == [str(folder / "set" / "cat" / "4.png")]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"parquet files need pyarrow: pip install 'clipkit\[sets\]'"):
        write_answers(Answers(Random(), CLASSES), [], tmp_path / "found.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_answers_are_read_back(folder, tmp_path, form):
    answers, file = Answers(Random(), CLASSES, top=3), tmp_path / f"found.{form}"
    write_answers(answers, collect(folder / "set"), file)
    assert list(read_answers(file)) == answers.to(folder / "set")


def test_walking_finds_what_collecting_does(folder):
    (folder / "set" / "cat" / "words.txt").write_text("no picture")
    for images in (["set"], ["set/cat", "set/*/1.png"], ["set/cat/4.png"]):
        given = [str(folder / one) for one in images]
        assert sorted(each(given)) == sorted(collect(given))
    with pytest.raises(UserError, match="no picture found"):
        list(each([str(folder / "nothing*")]))


def test_fitted_scale_has_the_highest_likelihood():
    """Against a grid; and of similarities drawn at a known scale it finds that one."""
    draw = np.random.default_rng(0)
    s = draw.normal(0.2, 0.05, (4000, 5)).astype(np.float32)
    chances = np.exp(30 * s) / np.exp(30 * s).sum(1, keepdims=True)
    labels = np.array([draw.choice(5, p=row / row.sum()) for row in chances.astype(np.float64)])
    found = fit_scale(s, labels)

    def likelihood(scale):
        logits = scale * s.astype(np.float64)
        return (logits[np.arange(len(s)), labels] - np.log(np.exp(logits).sum(1))).mean()

    assert found == pytest.approx(30, rel=0.15)
    assert all(likelihood(found) >= likelihood(scale) for scale in np.geomspace(1, 300, 60))


def test_calibrated_probabilities(folder):
    """A model that guesses should not be sure: the fitted scale is low, and the error with it."""
    answers = Answers(Random(), CLASSES)
    known = read_labelled(str(folder / "set"))
    found = answers.calibrate(known)
    assert found["scale"] == 100 and answers.scale == found["fitted scale"] < 10
    assert found["its calibration error"] < 0.2 < found["calibration error"]
    best = answers.to(folder / "set" / "cat")[0]["classes"][0]
    assert best["probability"] < 0.5
    with pytest.raises(UserError, match="is no class"):
        Answers(Random(), ["cat", "dog"]).calibrate(known)


def test_gallery_shows_both_ends_of_every_class(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "x.png").write_bytes(b"nothing")

    def row(n, sure, name="0.png"):
        classes = [{"class": "cat" if n % 2 else "do<g", "probability": sure, "similarity": 0.1}]
        return {"image": str(tmp_path / name), "classes": classes}

    rows = [row(n, 0.5 + n / 200) | {"image": f"{tmp_path}/0.png" if n else f"{tmp_path}/x.png"} for n in range(60)]
    rows = [one | {"image": one["image"].replace("/0.png", f"/./{'./' * n}0.png")} for n, one in enumerate(rows)]
    done = write_gallery([*rows, {"image": "bad.png", "classes": [], "error": "?"}], tmp_path / "s" / "sheet.html", "x")
    assert done == {"pictures": 60, "classes": 2, "unreadable": 1}
    page = Markup((tmp_path / "s" / "sheet.html").read_text())
    assert len(page.all("figure")) == 48 and len(page.all("img")) == 47  # one is no picture any more
    shares = [int(text[:-2]) for text in page.text if text.endswith("\u00a0%")]
    cats, dogs = shares[:24], shares[24:]
    assert max(cats) == cats[0] and cats[:12] == sorted(cats[:12], reverse=True)  # the surest first
    assert min(cats) == cats[12] and cats[12:] == sorted(cats[12:])  # then the least sure
    assert dogs[0] == max(dogs) and "least sure" in page.text
    assert "do<g" in page.text
    if CHROMIUM:
        checks = "parent.postMessage({wide: document.documentElement.scrollWidth > innerWidth}, '*')"
        (tmp_path / "b").mkdir()
        found = Markup(browse(tmp_path / "s" / "sheet.html", checks, tmp_path / "b", 390, "--dump-dom"))
        assert json.loads(found.all("html")[0]["data-found"] or "") == {"wide": False}


def test_answers_on_disk_name_what_cannot_be_read(folder, tmp_path):
    (folder / "set" / "cat" / "4.png").write_bytes(b"nothing")
    file = tmp_path / "found.jsonl"
    done = write_answers(Answers(Random(), CLASSES), collect(folder / "set" / "cat"), file)
    assert done["unreadable"] == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["classes"] == [] for row in rows] == ["error" in row for row in rows] == [True] + [False] * 4
    with pytest.raises(UserError, match="should end in .csv, .jsonl, .parquet"):
        write_answers(Answers(Random(), CLASSES), [], tmp_path / "found.txt")


class Toy:
    """What torchvision's datasets look like."""

    def __init__(self, root, split="train", download=False):
        if split != "test":
            raise RuntimeError("Dataset not found")
        self.labels = [0, 1, 2, 1]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return picture(number), self.labels[number]


def test_torchvision_sets_become_class_folders(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "Toy", Toy, raising=False)
    monkeypatch.setattr(datasets, "__all__", ("Toy",))
    fields = {
        "name": "toy",
        "kind": "zeroshot",
        "version": "1",
        "title": "toy",
        "images": ["toy:"],
        "templates": ["a {}"],
    }
    fields |= {"classes": {f"{n:04}": name for n, name in enumerate(("ant", "bee", "cow"))}}
    file = tmp_path / "toy.yaml"

    def exported(**changes):
        file.write_text(json.dumps(fields | {"torchvision": {"name": "Toy", "split": "test"}} | changes))
        return export(str(file), tmp_path, tmp_path)

    assert exported() == {"tar": str(tmp_path / "toy.tar"), "pictures": 4, "classes": 3}
    task = prepare(data.load(file), Roots({"toy": tmp_path / "toy.tar"}))
    assert task.labels.tolist() == [0, 1, 1, 2]
    opened = [Embedder(Random(), Roots({"toy": tmp_path / "toy.tar"})).open(p) for p in task.pictures]
    assert [name_of(image) for image in opened] == [name_of(picture(n)) for n in (0, 1, 3, 2)]
    with pytest.raises(UserError, match="finds no data there: Dataset not found"):
        exported(torchvision={"name": "Toy"})
    with pytest.raises(UserError, match="toy: torchvision has no dataset Tay; did you mean Toy"):
        exported(torchvision={"name": "Tay"})
    with pytest.raises(UserError, match="has 2 classes, but picture 2 is of class 2"):
        exported(classes={"0000": "ant", "0001": "bee"})
    with pytest.raises(UserError, match="has 4 classes, but the dataset has pictures of 3 only"):
        exported(classes=fields["classes"] | {"0003": "dog"})
    assert [path.name for path in tmp_path.glob(".toy*")] == []
