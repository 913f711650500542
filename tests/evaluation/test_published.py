"""Published benchmarks: the counts of their papers, official rules and metrics, and what every benchmark must show."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import load, packaged, read_rows
from clipkit.evaluation.compositional import Compositional, prepare
from clipkit.evaluation.convert import CONVERTERS, convert
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.scores import SCORES, chance, tot
from clipkit.evaluation.table import Table
from tests.evaluation.fakes import Constant, Oracle, Random, picture

SOURCES = {
    "sugarcrepe": "sugar_crepe/data",
    "sugarcrepe_pp": "sugar_crepe_pp/data",
    "valse": "valse",
    "vsr_zeroshot": "vsr",
    "vsr_random": "vsr",
    "bivlc": "bivlc",
    "cola": "cola",
    "colorswap": "colorswap",
    "nlvr": "nlvr",
    "nlvr_orders": "nlvr",
    "nlvr_pairs": "nlvr",
    "coco_order": "aro",
}
"""Benchmark -> its annotations below shared/annotations."""

KINDS = {"replace_att": 788, "replace_obj": 1652, "replace_rel": 1406, "swap_att": 666, "swap_obj": 245}
VALSE = {
    "existence": (534, 505), "plurals": (1000, 851), "counting-hard": (1000, 868), "counting-small-quant": (1000, 900),
    "counting-adversarial": (756, 691), "relations": (614, 535), "action-replacement": (779, 648),
    "actant-swap": (1042, 949), "coreference-standard": (916, 708), "coreference-hard": (141, 104),
    "foil-it": (1000, 943),
}  # fmt: skip
"""Instrument -> all rows, valid rows."""
COUNTS = {
    "sugarcrepe": KINDS | {"add_att": 692, "add_obj": 2062},
    "sugarcrepe_pp": KINDS,
    "valse": {name: everything for name, (everything, _) in VALSE.items()},
    "vsr_zeroshot": {"all": 1222},
    "vsr_random": {"all": 2195},
    "bivlc": {
        "replace_obj": 1200,
        "replace_rel": 462,
        "replace_att": 437,
        "add_obj": 399,
        "swap_att": 278,
        "swap_obj": 81,
        "add_att": 76,
    },
    "cola": {"multi_object": 210},
    "colorswap": {"all": 300},
    "nlvr": {"all": 989},
    "nlvr_orders": {"all": 6 * 989},
    "nlvr_pairs": {"all": 834},
    "coco_order": {"order": 25010 - 164},
}
PICTURES = {"sugarcrepe": 1560, "sugarcrepe_pp": 1542, "valse": 6123, "cola": 218, "bivlc": 2 * 2933, "nlvr": 989}


class Everywhere(Roots):
    """Every picture is there."""

    def has(self, src: str, path: str) -> bool:
        return True


class Named:
    """Embeds pictures by their names, so that none need exist."""

    def __init__(self, model):
        self.model = model

    def pictures(self, pictures):
        return self.texts([repr(p) for p in pictures])

    def texts(self, texts):
        rows = np.stack([self.model.vector(text) for text in texts]).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def open(self, which):
        return picture(0)


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("published")
    return out, {name: convert(name, shared / "annotations" / source, out) for name, source in SOURCES.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_counts_are_those_of_the_paper(converted, name: str):
    out, found = converted
    benchmark = load(name)
    assert benchmark.sha256[f"published:{name}.jsonl"] == found[name]["sha256"]
    assert found[name]["by_category"] == COUNTS[name]
    rows = read_rows(benchmark, Roots({"published": out}))
    assert {p.src for row in rows for p in row.pictures} <= benchmark.sources.keys()
    if name in PICTURES:
        assert len({p for row in rows if row.valid for p in row.pictures}) == PICTURES[name]


def test_valse_keeps_what_two_of_three_annotators_prefer(converted):
    rows = read_rows(load("valse"), Roots({"published": converted[0]}))
    assert Counter(row.category for row in rows if row.valid) == {name: valid for name, (_, valid) in VALSE.items()}
    assert sum(row.valid for row in rows) == 7702
    sources = {row.category: Counter() for row in rows}
    for row in rows:
        sources[row.category][row.images[0].src] += row.valid
    assert sources["coreference-standard"] == {"coco_train2014": 493, "coco_val2014": 215}
    assert {category: next(iter(found)) for category, found in sources.items() if len(found) == 1} == {
        "existence": "visual7w",
        "counting-hard": "visual7w",
        "counting-small-quant": "visual7w",
        "counting-adversarial": "visual7w",
        "plurals": "coco_val2017",
        "relations": "coco_val2017",
        "action-replacement": "swig",
        "actant-swap": "swig",
        "coreference-hard": "visdial_val2018",
        "foil-it": "coco_val2014",
    }


def test_captions_left_out_of_an_order_are_counted(converted):
    assert converted[1]["coco_order"]["dropped"] == {"a shuffle cannot differ": 164}


def task_of(name: str, out: Path, rows: int = 0) -> Compositional:
    """The benchmark ready to be scored; with `rows`, about so many of them, evenly."""
    task = prepare(load(name), Everywhere({"published": out}))
    if not rows:
        return task
    kept = task.rows[:: max(1, len(task.rows) // rows)]
    pictures = list(dict.fromkeys(p for row in kept for p in row.pictures))
    texts = list(dict.fromkeys(text for row in kept for text in row.texts))
    return Compositional(task.benchmark, kept, task.categories, task.coverage, pictures, texts)


def knows(task: Compositional) -> Oracle:
    truth = defaultdict(set, {text: set() for text in task.texts})
    for row in task.rows:
        for which, line in zip(row.pictures, row.match):
            for text, right in zip(row.texts, line):
                truth[text] |= {repr(which)} if right else set()
    return Oracle(truth)


@pytest.mark.parametrize("name", SOURCES)
def test_constant_random_and_oracle(converted, name: str):
    task = task_of(name, converted[0], rows=3000)
    constant = task.score(Named(Constant()), "strict")  # type: ignore[arg-type]
    assert {metric.value for metric in constant.metrics.values()} == {0.0}
    # Rows that share pictures are right together: one random encoder says little about a few hundred of them.
    seeds = range(16 if len(task.rows) < 500 else 1)
    guessed = [task.score(Named(Random(seed)), "strict") for seed in seeds]  # type: ignore[arg-type]
    said = {key for key, metric in guessed[0].metrics.items() if key.endswith("/micro") and metric.chance is not None}
    for key in {guessed[0].headline, *said}:
        value = float(np.mean([result.metrics[key].value for result in guessed]))
        metric = guessed[0].metrics[key]
        slack = 0.8 * (metric.high - metric.low) / len(guessed) ** 0.5
        # On true/false rows chance is the commoner answer; a threshold fitted to noise gives between 1/2 and that.
        assert metric.chance is not None
        least = 0.5 if key.startswith("binary") else metric.chance
        assert value - slack <= metric.chance and least <= value + slack, key
    few = task_of(name, converted[0], rows=600)
    right = few.score(Named(knows(few)), "strict")  # type: ignore[arg-type]
    assert {key: metric.value for key, metric in right.metrics.items() if metric.value != 1.0} == {}


def test_blind_baselines_solve_the_added_words(converted):
    # "Shorter is right" needs no model: 99.6 and 99.0 % of SugarCrepe's additions, half of its swaps.
    result = task_of("sugarcrepe", converted[0]).score(Named(Random()), "strict")  # type: ignore[arg-type]
    shorter = {kind: scores["i2t"] for kind, scores in result.baselines["shorter_text"]["by_category"].items()}
    assert {kind: round(100 * value, 1) for kind, value in shorter.items()} == {
        "add_att": 99.6, "add_obj": 99.0, "replace_att": 53.4, "replace_obj": 50.5, "replace_rel": 64.2,
        "swap_att": 49.2, "swap_obj": 54.9,
    }  # fmt: skip


# Official metrics, each as its own script defines it, on one row's scores s[picture][text].

FORMS = {
    "pair": ((1, 0),),
    "four": ((1, 0, 0, 0),),
    "five": ((1, 0, 0, 0, 0),),
    "six": ((1, 0, 0, 0, 0, 0),),
    "two right": ((1, 1, 0),),
    "winoground": ((1, 0), (0, 1)),
    "pictures": ((1,), (0,)),
}


def text_score(s):
    return s[0][0] > s[0][1] and s[1][1] > s[1][0]


def image_score(s):
    return s[0][0] > s[1][0] and s[1][1] > s[0][1]


def first_of_equals(s):
    return int(np.argmax(s[0])) == 0


OFFICIAL = [
    ("sugarcrepe", "pair", "i2t", lambda s: s[0][0] > s[0][1]),
    ("valse", "pair", "i2t", lambda s: s[0][0] > s[0][1]),
    ("vg_relation", "pair", "i2t", lambda s: int(np.argmax([s[0][1], s[0][0]])) == 1),  # [false, true]
    ("vg_attribution", "pair", "i2t", lambda s: int(np.argmax([s[0][1], s[0][0]])) == 1),
    ("coco_order", "five", "i2t", first_of_equals),
    ("flickr30k_order", "five", "i2t", first_of_equals),
    ("whatsup", "four", "i2t", first_of_equals),
    ("whatsup", "pair", "i2t", first_of_equals),
    ("sugarcrepe_pp", "two right", "i2t_all", lambda s: s[0][0] > s[0][2] and s[0][1] > s[0][2]),
    ("winoground", "winoground", "i2t", text_score),
    ("winoground", "winoground", "t2i", image_score),
    ("winoground", "winoground", "group", lambda s: text_score(s) and image_score(s)),
    ("bivlc", "winoground", "group", lambda s: text_score(s) and image_score(s)),
    ("colorswap", "winoground", "group", lambda s: text_score(s) and image_score(s)),
    ("cola", "winoground", "t2i", image_score),
    ("svo_probes", "pictures", "t2i", lambda s: s[0][0] > s[1][0]),
    ("nlvr_pairs", "pictures", "t2i", lambda s: s[0][0] > s[1][0]),
    ("mmvp_vlm", "winoground", "t2i", lambda s: s[0][0] > s[1][0] and not s[0][1] > s[1][1]),
    ("eqben", "winoground", "group", lambda s: text_score(s) and image_score(s)),
    ("crepe", "six", "i2t", lambda s: s[0][0] > max(s[0][1:])),
    ("vl_checklist", "pair", "i2t", lambda s: s[0][0] > s[0][1]),
    ("inpaint_coco", "winoground", "group", lambda s: text_score(s) and image_score(s)),
]
TIES_ARE_RIGHT = {"coco_order", "flickr30k_order", "whatsup"}


@pytest.mark.parametrize(("name", "form", "score", "rule"), OFFICIAL, ids=lambda value: str(value)[:20])
def test_official_metric(name: str, form: str, score: str, rule):
    match, benchmark = FORMS[form], load(name)
    # Three levels: most rows hold ties, among them such as decide.
    tables = np.random.default_rng(0).integers(0, 3, (3000, len(match), len(match[0]))).astype(np.float32)
    credit = SCORES[score](tables, match, tie=benchmark.official.tie).credit
    assert credit.tolist() == [float(rule(s)) for s in tables]
    equal = SCORES[score](np.zeros((1, *tables.shape[1:])), match, tie=benchmark.official.tie)
    assert equal.credit.tolist() == [float(name in TIES_ARE_RIGHT)] and equal.tied.all()


def test_every_published_benchmark_has_its_metric_tried():
    # Their authors train a classifier, or rank many pictures: see test_official.py.
    thresholds = {"vsr_zeroshot", "vsr_random", "nlvr", "nlvr_orders", "cola_gqa", "cola_clevr", "cola_paco"}
    published = {name for name in packaged() if any(row.startswith("published:") for row in load(name).rows)}
    assert {name for name, *_ in OFFICIAL} | thresholds == published
    headlines = {name: load(name).official.headline.partition("/")[0] for name in published}
    assert all(headlines[name] in {s for n, _, s, _ in OFFICIAL if n == name} for name in published - thresholds)
    assert published <= CONVERTERS.keys()


def test_text_only_score():
    """SugarCrepe++'s TOT: the right texts are nearer to each other than each is to the wrong one."""
    upper = np.random.default_rng(0).integers(0, 3, (3000, 3, 3))
    s = np.triu(upper, 1) + np.triu(upper, 1).transpose(0, 2, 1).astype(np.float32)
    decision = tot(s, FORMS["two right"], tie="strict")
    assert decision is not None
    assert decision.credit.tolist() == [float(t[0, 1] > t[0, 2] and t[0, 1] > t[1, 2]) for t in s]
    for tie, worth in (("strict", 0.0), ("half", 1 / 3), ("lenient", 1.0)):
        equal = tot(np.zeros((1, 3, 3)), FORMS["two right"], tie=tie)  # type: ignore[arg-type]
        assert equal is not None and equal.credit[0] == pytest.approx(worth)
    assert chance(FORMS["two right"], "tot") == pytest.approx(1 / 3)
    assert tot(s, FORMS["pair"]) is None and np.isnan(chance(FORMS["winoground"], "tot"))


def test_references_follow_from_the_published_items(converted, shared):
    """OpenAI's ViT-B/32, row by row: every reference of sugarcrepe.yaml, through its own aggregates."""
    benchmark = load("sugarcrepe")
    rows = read_rows(benchmark, Roots({"published": converted[0]}))
    with (shared / "annotations/bivlc/results/SUGARCREPE_CORRECT_ViT-B-32.csv").open(newline="") as file:
        items = {
            (i["filename"], i["caption"], i["negative_caption"]): float(i["correct"]) for i in csv.DictReader(file)
        }
    credit = np.array([items[(row.images[0].path, *row.texts)] for row in rows])
    values = Table(benchmark, rows, {row.category for row in rows}).values({"i2t": credit})
    by_kind = Table(benchmark, rows, {row.category for row in rows}).values_by("category", {"i2t": credit})
    values |= {f"i2t/{kind}": scores["i2t"] for kind, scores in by_kind.items()}
    references = [r for r in benchmark.reference if r.model == "OpenAI ViT-B/32"]
    assert len(references) == 11
    for reference in references:
        assert values[reference.metric] == pytest.approx(reference.value, abs=0.00015), reference.metric


# Benchmarks whose annotations everyone has to fetch: their published form, in small.


def rows_of(name: str, out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


BOX = {"bbox_x": 5, "bbox_y": 0, "bbox_w": 496, "bbox_h": 20, "image_path": "7.jpg", "true_caption": "a on b"}


def test_vg_relation_crops_and_counts(tmp_path: Path):
    items = [BOX | {"false_caption": "b on a", "relation_name": name} for name in ("on", "near", "on")]
    source = write_json(tmp_path / "visual_genome_relation.json", items)
    convert("vg_relation", source, tmp_path, excluded=str(write_json(tmp_path / "out.json", ["near"])))
    task = task_of("vg_relation", tmp_path)
    assert task.pictures == [("visual_genome", "7.jpg", (5, 0, 496, 20))]
    metrics = task.score(Named(Random()), "official").metrics  # type: ignore[arg-type]
    assert (metrics["i2t/relations"].n, metrics["i2t/notebook"].n) == (3, 2)
    convert("vg_relation", source, tmp_path)
    assert "i2t/notebook" not in task_of("vg_relation", tmp_path).score(Named(Random()), "official").metrics  # type: ignore[arg-type]


def test_vg_attribution_averages_pairs_with_25_rows(tmp_path: Path):
    items = [BOX | {"false_caption": "b", "attributes": ["red", "big"]} for _ in range(25)]
    items += [BOX | {"false_caption": "c", "attributes": ["red", "small"]} for _ in range(24)]
    convert("vg_attribution", write_json(tmp_path / "visual_genome_attribution.json", items), tmp_path)
    result = task_of("vg_attribution", tmp_path).score(Named(Random()), "official")  # type: ignore[arg-type]
    assert result.score.n == 25 and result.metrics["i2t/micro"].n == 49


def test_winoground_tells_the_clean_rows(tmp_path: Path, shared: Path):
    lines = [
        {"id": n, "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1", "caption_0": f"{n} a", "caption_1": f"{n} b"}
        for n in range(400)
    ]
    source = tmp_path / "examples.jsonl"
    source.write_text("".join(json.dumps(line | {"collapsed_tag": "Object"}) + "\n" for line in lines))
    tags = shared / "annotations/winoground_tags/new_tag_assignments.json"
    convert("winoground", source, tmp_path, tags=str(tags))
    rows = rows_of("winoground", tmp_path)
    assert [image["path"] for image in rows[0]["images"]] == ["ex_0_img_0.png", "ex_0_img_1.png"]
    assert Counter(row["meta"]["clean"] for row in rows) == {"yes": 172, "no": 228}
    tagged = Counter(tag for row in rows for tag in row["meta"]["tag"].split(", ") if tag)
    assert tagged == {
        "Complex Reasoning": 78, "Unusual Image": 56, "Unusual Text": 50, "Ambiguously Correct": 46,
        "Visually Difficult": 38, "Non Minimal": 30,
    }  # fmt: skip
    result = task_of("winoground", tmp_path).score(Named(Random()), "official")  # type: ignore[arg-type]
    assert result.metrics["group/clean"].n == 172
    convert("winoground", source, tmp_path)
    assert "group/clean" not in task_of("winoground", tmp_path).score(Named(Random()), "strict").metrics  # type: ignore[arg-type]


def test_whatsup_has_six_sets(tmp_path: Path):
    for kind in ("images", "clevr"):
        item = {
            "image_path": f"data/controlled_{kind}/a_on_b.jpeg",
            "caption_options": ["on", "under", "left", "right"],
        }
        write_json(tmp_path / f"controlled_{kind}_dataset.json", [item])
    for photos in ("coco", "vg"):
        for count in ("one", "two"):
            write_json(tmp_path / f"{photos}_qa_{count}_obj.json", [[42, "on the left", "on the right"]])
    convert("whatsup", tmp_path, tmp_path)
    rows = {row["category"]: row for row in rows_of("whatsup", tmp_path)}
    assert rows["controlled_a"]["images"] == [{"src": "whatsup", "path": "controlled_images/a_on_b.jpeg"}]
    assert rows["controlled_b"]["match"] == [[1, 0, 0, 0]]
    assert rows["coco_two"]["images"] == [{"src": "coco_val2017", "path": "000000000042.jpg"}]
    assert rows["vg_one"]["images"] == [{"src": "visual_genome", "path": "42.jpg"}]
    result = task_of("whatsup", tmp_path).score(Named(Constant()), "official")  # type: ignore[arg-type]
    assert result.score.value == 1.0 and result.score.chance == pytest.approx((0.25 + 0.25 + 4 * 0.5) / 6)


SVO = "sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\n"


def test_svo_probes_choose_a_picture(tmp_path: Path):
    source = tmp_path / "svo_probes.csv"
    source.write_text(SVO + '"A dog, running",1,2,False,True,False\nA cat,3,4,True,False,False\n')
    convert("svo_probes", source, tmp_path)
    first, second = rows_of("svo_probes", tmp_path)
    assert (first["category"], second["category"]) == ("verb", "subject")
    assert first["match"] == [[1], [0]] and first["texts"] == ["A dog, running"]
    assert [image["path"] for image in first["images"]] == ["1.jpg", "2.jpg"]
    source.write_text(SVO + "A cat,3,4,True,True,False\n")
    with pytest.raises(UserError, match=r"row 1 should differ in one word, found \['subject', 'verb'\]"):
        convert("svo_probes", source, tmp_path)
    source.write_text("sentence,pos_image_id\nA cat,3\n")
    with pytest.raises(UserError, match="no column neg_image_id, obj_neg, subj_neg, verb_neg"):
        convert("svo_probes", source, tmp_path)


def test_flickr30k_order_reads_the_retrieval_file(tmp_path: Path):
    item = {"image": "flickr30k-images/77.jpg", "caption": ["Two dogs, one black and one white, run on the grass ."]}
    convert("flickr30k_order", write_json(tmp_path / "flickr30k_test.json", [item]), tmp_path)
    (row,) = rows_of("flickr30k_order", tmp_path)
    assert row["id"] == "77/0" and row["images"] == [{"src": "flickr30k", "path": "77.jpg"}]


def test_bivlc_takes_the_choice_not_the_candidates(tmp_path: Path):
    columns = "caption,negative_caption,type,subtype\na,b,add,obj\n"
    (tmp_path / "BiVLC_negative_imgs.csv").write_text(columns + "c,d,add,obj\n")
    with pytest.raises(UserError, match=r"should hold a file bivlc\*\.csv"):
        convert("bivlc", tmp_path, tmp_path)
    (tmp_path / "BiVLC.csv").write_text(columns)
    assert convert("bivlc", tmp_path, tmp_path)["n"] == 1
    assert rows_of("bivlc", tmp_path)[0]["images"][1] == {"src": "bivlc", "path": "0000_negative_image.jpg"}
