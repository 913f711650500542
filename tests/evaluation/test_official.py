"""Whole benchmarks against their authors' scripts: the numbers they print, computed their way from the same scores.

`test_published.py` tries the rule of one row; here are sums, denominators, groups, thresholds and averages. Scores come
from an encoder with eight coarse directions, so that equal scores are common and rules for them matter.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Benchmark, load, packaged
from clipkit.evaluation.convert import convert
from clipkit.evaluation.judged import Pairs
from clipkit.evaluation.scores import SCORES, chance, judged
from tests.evaluation.fakes import Constant, Oracle, Random
from tests.evaluation.test_published import BOX, OFFICIAL, SOURCES, SVO, Named, knows, task_of, write_json
from tests.evaluation.test_published_more import WRITE, crepe, eqben, mmvp_vlm


class Coarse(Random):
    """Four numbers of ±1/2: cosines are -1, -1/2, 0, 1/2 or 1, exactly."""

    def vector(self, key: str):
        return np.sign(super().vector(key)[:4]) / 2


def scored(name: str, folder: Path, seed: int = 0, tie: str = "official"):
    """(result of the coarse encoder, [row of the file, its scores s[picture][text]])."""
    task, model = task_of(name, folder), Coarse(seed)
    result = task.score(Named(model), tie)  # type: ignore[arg-type]
    table = [
        (row, np.array([[model.vector(repr(p)) @ model.vector(t) for t in row.texts] for p in row.pictures]))
        for row in task.rows
    ]
    return result, table


def test_mmvp_takes_the_second_of_equal_pictures(tmp_path: Path):
    """evaluate_vlm.py: a statement names img1 if strictly nearer, else img2; both must be right; per category of 15."""
    convert("mmvp_vlm", mmvp_vlm(tmp_path), tmp_path)
    result, table = scored("mmvp_vlm", tmp_path)
    right: dict[str, int] = defaultdict(int)
    ties = 0
    for row, s in table:
        first, second = ("img1" if s[0, t] > s[1, t] else "img2" for t in (0, 1))
        right[row.category] += first == "img1" and second == "img2"
        ties += s[0, 1] == s[1, 1] and first == "img1"
    assert ties > 5  # the rule matters
    shares = {kind: right[kind] / 15 for kind in right}
    assert {kind: scores["t2i"].value for kind, scores in result.by_category.items()} == pytest.approx(shares)
    assert result.score.value == pytest.approx(np.mean([*shares.values()])) and len(shares) == 9
    assert result.tie["rule"] == "last"


@pytest.mark.parametrize("tie", ["first", "last"])
def test_first_and_last_are_arg_max_from_either_end(tmp_path: Path, tie: str):
    match = ((0, 1, 0, 1),)
    s = np.random.default_rng(0).integers(0, 3, (400, 1, 4)).astype(np.float32)
    ends = {
        "first": lambda line: int(np.argmax(line)),
        "last": lambda line: len(line) - 1 - int(np.argmax(line[::-1])),
    }
    expected = [float(match[0][ends[tie](line[0])] == 1) for line in s]
    assert SCORES["i2t"](s, match, tie=tie).credit.tolist() == expected
    assert set(SCORES["i2t"](s, match, tie=tie).credit) == {0.0, 1.0}
    tree = load("cifar10").model_dump(exclude_none=True) | {"official": {"tie": tie}}
    with pytest.raises(UserError, match="official.tie"):
        load(write_json(tmp_path / "own.yaml", tree))


def test_nlvr_precision_and_consistency(shared: Path, tmp_path: Path):
    """metrics_images.py: over six orders of every picture; a sentence is consistent if all predictions are right."""
    convert("nlvr_orders", shared / "annotations/nlvr", tmp_path)
    task = task_of("nlvr_orders", tmp_path)
    result = task.score(Named(Random()), "official")  # type: ignore[arg-type]
    labels = {row.id: row.match[0][0] == 1 for row in task.rows}
    right = {item["id"]: item["decisions"]["binary"] == 1 for item in result.items}
    predictions = {key: labels[key] == right[key] for key in labels}  # what must have been answered
    lines = (shared / "annotations/nlvr/dev.json").read_text().splitlines()
    correct, consistent = 0.0, {}
    for example in map(json.loads, filter(None, lines)):
        sentence = example["identifier"].split("-")[0]
        consistent.setdefault(sentence, True)
        for k in range(6):
            if predictions[f"{example['identifier']}-{k}"] == (example["label"] == "true"):
                correct += 1
            else:
                consistent[sentence] = False
    assert result.metrics["binary/micro"].value == pytest.approx(correct / (6 * 989))
    assert result.metrics["binary/consistency"].value == pytest.approx(np.mean([*consistent.values()]))
    assert result.metrics["binary/consistency"].n == len(consistent) == 267
    whole = task.score(Named(knows(task)), "strict")  # type: ignore[arg-type]
    assert whole.metrics["binary/consistency"].value == 1.0


def average_precision(scores: list[float], labels: list[int]) -> float:
    """Sum over thresholds of the gain in recall times precision, as torchmetrics and scikit-learn have it."""
    total, found, before = sum(labels), 0, 0.0
    value = 0.0
    for cut in sorted(set(scores), reverse=True):
        kept = [label for s, label in zip(scores, labels) if s >= cut]
        found = sum(kept)
        value += (found / total - before) * (found / len(kept))
        before = found / total
    return value


@pytest.mark.parametrize("name", ["gqa", "clevr", "paco"])
def test_cola_single_objects(tmp_path: Path, name: str):
    """ColaSingleObjAP: per phrase over its hard pictures; phrases without any are passed over."""
    rng = np.random.default_rng(0)
    phrases = [f"phrase {n}" for n in range(12)]
    there = rng.integers(0, 2, (40, 12))
    hard = rng.integers(0, 2, (40, 12)) | (there & rng.integers(0, 2, (40, 12)))
    there[:, 3] = 0
    hard[:, 5] = 0
    objects = [] if name == "paco" else [{"square": ["red"]}]
    pictures = [[f"x/{p}.jpg", *objects, there[p].tolist(), hard[p].tolist()] for p in range(40)]
    file = tmp_path / f"COLA_singleobjects_benchmark_{name.upper()}.json"
    for tree in ([phrases, pictures], {"labels": phrases, "data": pictures}):
        found = convert(f"cola_{name}", write_json(file, tree), tmp_path)
    assert found["dropped"] == {"no right picture, no wrong one, or two in all": 2}
    result, table = scored(f"cola_{name}", tmp_path)
    model = Coarse()
    values = []
    for p, phrase in enumerate(phrases):
        chosen = np.flatnonzero(hard[:, p])
        if not there[:, p].any() or not len(chosen):
            continue
        src = table[0][0].images[0].src
        pixels = [model.vector(repr(type(table[0][0].pictures[0])(src, f"{k}.jpg"))) for k in chosen]
        scores = [float(one @ model.vector(phrase)) for one in pixels]
        values.append(average_precision(scores, there[chosen, p].tolist()))
    assert result.score.value == pytest.approx(np.mean(values)) and result.score.n == 10
    task = task_of(f"cola_{name}", tmp_path)
    few = Named(Oracle(knows(task).truth))
    assert task.score(few, "strict").score.value == 1.0  # type: ignore[arg-type]
    assert task.score(Named(Constant()), "strict").score.value == 0.0  # type: ignore[arg-type]
    guessed = np.mean([task.score(Named(Random(k)), "strict").score.value for k in range(30)])  # type: ignore[arg-type]
    assert guessed == pytest.approx(result.score.chance, abs=0.04)


def test_chance_of_average_precision():
    for n, p in ((3, 1), (5, 2), (9, 8)):
        match = tuple((int(k < p),) for k in range(n))
        s = np.random.default_rng(n).random((20000, n, 1))
        assert chance(match, "ap") == pytest.approx(SCORES["ap"](s, match).credit.mean(), abs=0.01)
    assert SCORES["ap"](np.zeros((1, 2, 1)), ((1,), (0,))) is None


def test_valse_by_threshold(shared: Path, tmp_path: Path):
    """lxmert_valse_eval.py: p_c, p_f, acc = (p_c + p_f) / 2, acc_r, per instrument; its table adds min and AUROC."""
    convert("valse", shared / "annotations/valse", tmp_path)
    task = task_of("valse", tmp_path, rows=1500)
    model = Random(1)
    result = task.score(Named(model), "strict")  # type: ignore[arg-type]
    unit = {key: v / np.linalg.norm(v) for key, v in ((k, model.vector(k)) for k in set(model_keys(task)))}
    s = np.array([[unit[repr(row.pictures[0])] @ unit[t] for t in row.texts] for row in task.rows])
    everything = Pairs(np.arange(len(s)), s[:, 0].astype(np.float32), s[:, 1].astype(np.float32))
    cuts = everything.thresholds([row.cluster for row in task.rows])
    for kind in {row.category for row in task.rows}:
        count = fits = detected = pairwise = 0
        for (caption, foil), cut, row in zip(s, cuts, task.rows):
            if row.category == kind:
                count, fits, detected = count + 1, fits + (caption > cut), detected + (foil <= cut)
                pairwise += caption > foil
        found = {key: metric.value for key, metric in result.by_category[kind].items()}
        assert found["i2t"] == pytest.approx(pairwise / count)
        assert (found["p_right"], found["p_wrong"]) == pytest.approx((fits / count, detected / count))
        assert found["judged"] == pytest.approx((fits + detected) / 2 / count)
        assert found["worse"] == pytest.approx(min(fits, detected) / count)
        mine = s[[row.category == kind for row in task.rows]]
        assert found["auroc"] == pytest.approx(np.mean(mine[:, :1] > mine[:, 1][None]), abs=1e-6)
    for score in ("worse", "auroc", "judged"):
        mean = np.mean([scores[score].value for scores in result.by_category.values()])
        assert result.metrics[f"{score}/macro"].value == pytest.approx(mean)
        metric = result.metrics[f"{score}/macro"]
        assert metric.low < metric.value + 0.02 and metric.value - 0.02 < metric.high
    assert result.metrics["p_right/micro"].chance is None and result.metrics["judged/micro"].chance == 0.5


def model_keys(task):
    return [*map(repr, task.pictures), *task.texts]


def test_thresholds_are_of_the_other_half():
    rng = np.random.default_rng(0)
    s = rng.normal(size=(60, 2)) + np.array([0.5, 0])
    pairs, clusters = Pairs(np.arange(60), s[:, 0], s[:, 1]), [str(n // 2) for n in range(60)]
    cuts = pairs.thresholds(clusters)
    assert len(set(cuts)) == 2
    for cut in set(cuts):
        other = s[cuts != cut]
        best = max((np.mean(other[:, 0] > t) + np.mean(other[:, 1] < t)) / 2 for t in np.linspace(-4, 4, 4001))
        assert (np.mean(other[:, 0] > cut) + np.mean(other[:, 1] < cut)) / 2 >= best - 1e-9
    equal = judged(np.ones((2, 1, 2)), ((1, 0),), np.ones(2), tie="half")
    assert equal is not None and equal["judged"].credit.tolist() == [0.5, 0.5] and equal["p_right"].tied.all()
    assert judged(np.ones((2, 1, 3)), ((1, 0, 0),), np.ones(2)) is None


def test_svo_probes_binary_accuracy(tmp_path: Path):
    """Right pictures said to fit, wrong ones said not to, and the mean of both accuracies."""
    source = tmp_path / "svo_probes.csv"
    kinds = ("True,False,False", "False,True,False", "False,False,True")
    source.write_text(SVO + "".join(f"sentence {n},{2 * n},{2 * n + 1},{kinds[n % 3]}\n" for n in range(90)))
    convert("svo_probes", source, tmp_path)
    result, table = scored("svo_probes", tmp_path)
    s = np.array([scores[:, 0] for _, scores in table])
    cuts = Pairs(np.arange(90), s[:, 0], s[:, 1]).thresholds([row.cluster for row, _ in table])
    right, wrong = np.mean(s[:, 0] > cuts), np.mean(s[:, 1] < cuts)
    values = {key: result.metrics[f"{key}/micro"].value for key in ("p_right", "p_wrong", "judged", "t2i")}
    expected = {"p_right": right, "p_wrong": wrong, "judged": (right + wrong) / 2, "t2i": np.mean(s[:, 0] > s[:, 1])}
    assert values == pytest.approx(expected)
    assert result.score.value == pytest.approx(np.mean([np.mean((s[:, 0] > s[:, 1])[k::3]) for k in range(3)]))


@pytest.mark.parametrize("name", ["vsr_zeroshot", "vsr_random"])
def test_vsr_accuracy_at_a_threshold(shared: Path, tmp_path: Path, name: str):
    convert(name, shared / "annotations/vsr", tmp_path)
    task = task_of(name, tmp_path)
    model = Random(2)
    result = task.score(Named(model), "official")  # type: ignore[arg-type]
    unit = {key: v / np.linalg.norm(v) for key, v in ((k, model.vector(k)) for k in set(model_keys(task)))}
    s = np.array([unit[repr(row.pictures[0])] @ unit[row.texts[0]] for row in task.rows])
    truth = np.array([row.match[0][0] == 1 for row in task.rows])
    right = np.array([item["decisions"]["binary"] for item in result.items])
    answers = truth == (right == 1)
    # One threshold for each half: within a half, all that is said to be true scores above all that is not.
    from clipkit.evaluation.stats import halves

    side = halves([row.cluster for row in task.rows])
    for half in (0, 1):
        here, there = side == half, side != half
        assert s[here & answers].min() > s[here & ~answers].max()
        cut = (s[here & answers].min() + s[here & ~answers].max()) / 2
        accuracy = max(np.mean((s[there] > c) == truth[there]) for c in np.unique(s[there])[::5])
        assert np.mean((s[there] > cut) == truth[there]) > accuracy - 0.02
    assert result.score.value == pytest.approx(right.mean())
    relations = {row.meta["relation"] for row in task.rows}
    means = [np.mean([r for r, row in zip(right, task.rows) if row.meta["relation"] == which]) for which in relations]
    assert result.metrics["binary/relations"].value == pytest.approx(np.mean(means))


def test_sugarcrepe_pp_itt_and_tot(shared: Path, tmp_path: Path):
    """test_NegCLIP.py: both captions above the negative; the captions nearer to each other than to the negative."""
    convert("sugarcrepe_pp", shared / "annotations/sugar_crepe_pp/data", tmp_path)
    result, table = scored("sugarcrepe_pp", tmp_path)
    model, itt, tot = Coarse(), defaultdict(list), defaultdict(list)
    for row, s in table:
        p1, p2, n = (model.vector(text) for text in row.texts)
        itt[row.category].append(s[0, 0] > s[0, 2] and s[0, 1] > s[0, 2])
        tot[row.category].append(p1 @ p2 > p1 @ n and p1 @ p2 > p2 @ n)
    for score, found in (("i2t_all", itt), ("tot", tot)):
        shares = {kind: float(np.mean(values)) for kind, values in found.items()}
        assert {kind: result.by_category[kind][score].value for kind in shares} == pytest.approx(shares)
        assert result.metrics[f"{score}/macro"].value == pytest.approx(np.mean([*shares.values()]))
    alike = [np.sign(s[0, 0] - s[0, 2]) * np.sign(s[0, 1] - s[0, 2]) > 0 for _, s in table]
    assert result.metrics["same/micro"].value == pytest.approx(np.mean(alike))
    assert result.metrics["same/micro"].chance == pytest.approx(2 / 3)


def test_aro_macros(shared: Path, tmp_path: Path):
    """The notebook: mean over relations outside its list of 157; VG-A: over pairs of attributes with 25 rows."""
    excluded = shared / "annotations/aro/vgr_excluded_relations_157.json"
    out = json.loads(excluded.read_text())
    assert len(out) == 157
    names = [*out[:3], "on", "holding", "under", "eating"]
    items = [
        BOX | {"false_caption": f"b on a {n}", "true_caption": f"a on b {n}", "relation_name": names[n % 7]}
        for n in range(150)
    ]
    convert(
        "vg_relation", write_json(tmp_path / "visual_genome_relation.json", items), tmp_path, excluded=str(excluded)
    )
    result, table = scored("vg_relation", tmp_path)
    by: dict[str, list[bool]] = defaultdict(list)
    for row, s in table:
        by[row.meta["relation"]].append(int(np.argmax([s[0, 1], s[0, 0]])) == 1)
    assert result.metrics["i2t/notebook"].value == pytest.approx(np.mean([np.mean(by[k]) for k in by if k not in out]))
    assert result.metrics["i2t/relations"].value == pytest.approx(np.mean([np.mean(v) for v in by.values()]))
    assert result.score is result.metrics["i2t/relations"]
    items = [
        BOX | {"false_caption": f"b {n}", "true_caption": f"a {n}", "attributes": ["red", str(n % 9 // 4)]}
        for n in range(150)
    ]
    convert("vg_attribution", write_json(tmp_path / "visual_genome_attribution.json", items), tmp_path)
    result, table = scored("vg_attribution", tmp_path)
    by = defaultdict(list)
    for row, s in table:
        by[row.meta["attributes"]].append(bool(s[0, 0] > s[0, 1]))
    assert sorted(map(len, by.values())) == [16, 66, 68]
    assert result.score.value == pytest.approx(np.mean([np.mean(v) for v in by.values() if len(v) >= 25]))


def test_whatsup_pairs_and_sets_as_its_script_counts(tmp_path: Path):
    """aro_datasets.py: both of left/right and of on/under right, over n/2; all four right, over n/4."""
    places = ("left_of", "right_of", "on", "under")
    things = [(a, b) for a in ("mug", "cap", "bowl") for b in ("plate", "box", "chair")]
    for kind in ("images", "clevr"):
        files = [f"data/controlled_{kind}/{a}_{p}_{b}.jpeg" for a, b in things for p in places]
        items = [{"image_path": file, "caption_options": [f"{file} {k}" for k in range(4)]} for file in files]
        write_json(tmp_path / f"controlled_{kind}_dataset.json", items)
    for photos in ("coco", "vg"):
        for count in ("one", "two"):
            options = [[n, f"left {photos} {n}", f"right {photos} {n}"] for n in range(30)]
            write_json(tmp_path / f"{photos}_qa_{count}_obj.json", options)
    convert("whatsup", tmp_path, tmp_path)
    result, table = scored("whatsup", tmp_path)
    for side, kind in (("a", "images"), ("b", "clevr")):
        right = {}
        for row, s in table:
            found = re.match(rf"controlled_{kind}/(.*?)_(left_of|right_of|on|under)_(.*)\.jpeg", row.images[0].path)
            if found:
                right[found[1], found[3], found[2]] = int(np.argmax(s[0])) == 0
        n, pairs, sets = len(right), 0, 0
        for a, b in things:
            sideways = right[a, b, "left_of"] and right[a, b, "right_of"]
            upright = right[a, b, "on"] and right[a, b, "under"]
            pairs, sets = pairs + sideways + upright, sets + (sideways and upright)
        assert result.metrics[f"i2t/pairs_{side}"].value == pytest.approx(pairs / (n / 2))
        assert result.metrics[f"i2t/sets_{side}"].value == pytest.approx(sets / (n / 4))
    kinds = ("controlled_a", "controlled_b", "coco_one", "coco_two", "vg_one", "vg_two")
    firsts = [np.mean([np.argmax(s[0]) == 0 for row, s in table if row.category == kind]) for kind in kinds]
    assert result.score.value == pytest.approx(np.mean(firsts))


def test_eqben_groups(tmp_path: Path):
    """eqben_acc.py: text, image, group; reported as the mean of five, Kubric's three taken together first."""
    convert("eqben", eqben(tmp_path), tmp_path)
    result, table = scored("eqben", tmp_path)
    by: dict[str, list[bool]] = defaultdict(list)
    for row, s in table:
        text = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        image = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        by[row.category].append(bool(text and image))
    means = {kind: float(np.mean(values)) for kind, values in by.items()}
    kubric = float(np.mean([means[f"kubric_{kind}"] for kind in ("loc", "attr", "cnt")]))
    assert result.score.value == pytest.approx(
        np.mean([means["ag"], means["youcook2"], means["gebc"], kubric, means["sd"]])
    )


def test_crepe_recall_at_one(tmp_path: Path):
    """crepe_eval_utils.py: the rank of the right caption among six; a mean over complexities, then over kinds."""
    convert("crepe", crepe(tmp_path, 40), tmp_path)
    task = task_of("crepe", tmp_path)
    model = Random(4)  # without ties, which its argsort leaves to chance
    result = task.score(Named(model), "official")  # type: ignore[arg-type]
    by: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in task.rows:
        unit = [v / np.linalg.norm(v) for v in map(model.vector, (repr(row.pictures[0]), *row.texts))]
        ranking = np.argsort([-float(unit[0] @ text) for text in unit[1:]])
        kind, complexity = row.category.split("_")
        by[kind][complexity].append(int(np.where(ranking == 0)[0][0]) < 1)
    kinds = [np.mean([np.mean(values) for values in found.values()]) for found in by.values()]
    assert result.score.value == pytest.approx(np.mean(kinds)) and len(kinds) == 3


ROWS = {name for name, *_ in OFFICIAL}
"""Benchmarks whose rule of a row test_published.py tries."""
WHOLE = {
    "mmvp_vlm", "nlvr_orders", "cola_gqa", "cola_clevr", "cola_paco", "valse", "svo_probes", "vsr_zeroshot",
    "vsr_random", "sugarcrepe_pp", "vg_relation", "vg_attribution", "whatsup", "eqben", "crepe",
}  # fmt: skip
"""Benchmarks whose printed numbers are computed here."""
ITEMS = {"sugarcrepe", "bivlc"}
"""Benchmarks whose published items give the published numbers (test_parity.py)."""
OURS = {"nlvr", "nlvr_pairs"}
"""Forms that are clipkit's own: a part of NLVR's rows, and its pairs."""


def published() -> dict[str, Benchmark]:
    return {name: load(name) for name in packaged() if any(r.startswith("published:") for r in load(name).rows)}


def test_every_published_benchmark_is_tried():
    assert len(published()) == 26
    assert published().keys() == ROWS | WHOLE | ITEMS | OURS
    # One row of one score, no categories that are averaged: the rule of a row is all there is.
    assert published().keys() - WHOLE - ITEMS - OURS == {
        "coco_order", "flickr30k_order", "winoground", "colorswap", "cola", "inpaint_coco", "vl_checklist",
    }  # fmt: skip


def test_every_published_benchmark_has_met_the_three():
    """Constant, random and oracle: on real annotations, on small copies, or (COLA's single objects) here."""
    assert published().keys() == WRITE.keys() | SOURCES.keys() | {"cola_gqa", "cola_clevr", "cola_paco"}


@pytest.mark.parametrize("name", published())
def test_a_benchmark_says_what_must_be_known(name: str):
    benchmark = published()[name]
    for field in ("about", "licence", "homepage", "citation", "leakage"):
        assert len(getattr(benchmark, field)) > 2, field
    assert benchmark.official.headline
    assert all(source.about for source in benchmark.sources.values())
    assert benchmark.sha256 or "No SHA-256 is pinned" in " ".join(benchmark.about.split())
    for reference in benchmark.reference:
        assert 0 < reference.value < 1 and reference.source
    if "OpenAI" in {reference.model.split()[0] for reference in benchmark.reference}:
        assert any(reference.activation for reference in benchmark.reference)
