"""Robustness: loops as oracles, known limits, and a constant, a random and a knowing encoder on the world's sets."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from clipkit.data.world.build import build_world
from clipkit.errors import UserError
from clipkit.evaluation import benchmark as data
from clipkit.evaluation.benchmark import Attack
from clipkit.evaluation.robustness import attacked, corruptions, outside, wordings
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.run import PREPARE, evaluate
from clipkit.model.load import build
from tests.evaluation.fakes import Constant, Oracle, Random, name_of, picture
from tests.model.tiny import tiny

# Corruptions


def scene(size: int = 60) -> Image.Image:
    """Smooth colours with an edge, as photographs have."""
    down, across = np.indices((size, size)) / size
    pixels = np.stack([down, across, (down > across) * 0.8], axis=-1)
    return Image.fromarray((pixels * 255).astype(np.uint8))


@pytest.mark.parametrize("kind", corruptions.CORRUPTIONS)
def test_corruption(kind: str):
    image = scene()
    clean = np.asarray(corruptions.changed(image, corruptions.FRAMED, "a"), dtype=float)
    assert clean.shape == (224, 224, 3)
    far = []
    for severity in range(1, 6):
        one = corruptions.changed(image, f"{kind}:{severity}", "a")
        assert one.size == (224, 224) and one.mode == "RGB"
        assert one.tobytes() == corruptions.changed(image, f"{kind}:{severity}", "a").tobytes()
        far.append(float(np.abs(np.asarray(one, dtype=float) - clean).mean()))
    assert far[0] > 0.05 and far[4] > (0.1 if kind == "elastic_transform" else 1.1) * far[0]
    drawn = {"noise", "frost", "fog", "glass", "motion", "snow", "elastic"}
    other = corruptions.changed(image, f"{kind}:3", "b").tobytes()
    assert (other != corruptions.changed(image, f"{kind}:3", "a").tobytes()) == any(word in kind for word in drawn)


def test_there_are_fifteen_in_four_families():
    assert sorted(corruptions.CORRUPTIONS) == sorted(itertools.chain(*corruptions.FAMILIES.values()))
    assert len(corruptions.CORRUPTIONS) == 15
    with pytest.raises(UserError, match="no corruption called fogg; did you mean fog"):
        corruptions.changed(scene(), "fogg:1", "a")
    with pytest.raises(UserError, match="fog: severity should be 1 to 5, got 6"):
        corruptions.changed(scene(), "fog:6", "a")


def test_corruptions_by_their_definitions():
    x = np.asarray(corruptions.changed(scene(), corruptions.FRAMED, "a")) / 255
    rng = np.random.default_rng
    low = corruptions.contrast(x, 3, rng(0))
    assert np.allclose(low - x.mean((0, 1)), 0.2 * (x - x.mean((0, 1))))
    noise = corruptions.gaussian_noise(x, 2, rng(0)) - x
    assert noise.std() == pytest.approx(0.12, rel=0.02) and abs(noise.mean()) < 0.001
    struck = corruptions.impulse_noise(np.full((224, 224, 3), 0.5), 4, rng(0))
    assert (struck != 0.5).mean() == pytest.approx(0.17, rel=0.05) and set(np.unique(struck)) == {0.0, 0.5, 1.0}
    shots = corruptions.shot_noise(np.full((224, 224, 3), 0.5), 5, rng(0))
    assert shots.var() == pytest.approx(0.5 / 3, rel=0.05)
    bright = corruptions.brightness(x, 1, rng(0))
    for before, after in zip(x[::50, ::50].reshape(-1, 3), bright[::50, ::50].reshape(-1, 3)):
        if before.max() > 0:
            assert after.max() == pytest.approx(min(1, before.max() + 0.1))
            assert np.allclose(after / after.max(), before / before.max())
    assert np.allclose(corruptions.brightness(np.zeros((2, 2, 3)), 2, rng(0)), 0.2)
    dot = np.zeros((41, 41, 3))
    dot[20, 20] = 1
    spread = corruptions.defocus_blur(dot, 3, rng(0))
    assert spread.sum() == pytest.approx(3, rel=1e-4) and spread[20, 26].max() > 0 and spread[20, 29].max() < 1e-6
    clouds = corruptions._clouds(rng(0), 2)
    assert clouds.min() == 0 and clouds.max() == 1 and clouds.shape == (256, 256)


# Outside


def loop_auroc(inside: list[float], strange: list[float]) -> float:
    return float(np.mean([a > b for a in inside for b in strange]))


def loop_fpr95(inside: list[float], strange: list[float]) -> float:
    best = max(t for t in inside if np.mean([s >= t for s in inside]) >= 0.95)
    return float(np.mean([s >= best for s in strange]))


def test_fpr95_and_auroc_are_their_loops():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        inside, strange = rng.integers(0, 40, 61).astype(float) + 5, rng.integers(0, 40, 37).astype(float)
        assert outside.false_positives(inside, strange) == pytest.approx(loop_fpr95([*inside], [*strange]))
        labels = np.arange(98) < 61
        found = outside._metrics("x", np.concatenate([inside, strange]), labels, np.ones((1, 98)), "strict")
        assert found["x/auroc"].value == pytest.approx(loop_auroc([*inside], [*strange]))
    same = np.arange(1000.0)
    assert outside.false_positives(same, same) == pytest.approx(0.95)  # as chance
    assert outside.false_positives(same + 1000, same) == 0.0
    assert [outside.false_positives(np.ones(5), np.ones(5), tie=t) for t in ("strict", "half", "lenient")] == [
        1,
        0.5,
        0,
    ]  # type: ignore[arg-type]
    doubled = (np.array([2.0, 0, 1, 1]), np.array([1.0, 3]))
    weighed = outside.false_positives(np.array([4.0, 3, 2, 1]), np.array([5.0, 0]), doubled)
    assert weighed == outside.false_positives(np.array([4.0, 4, 2, 1]), np.array([5.0, 0, 0, 0]))


def test_mcm_is_the_largest_probability():
    s = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    for scale in (1.0, 30.0):
        expected = [max(np.exp(scale * line.astype(float)) / np.exp(scale * line.astype(float)).sum()) for line in s]
        assert outside.certainty(s, scale) == pytest.approx(expected, rel=1e-5)


# Paraphrases and languages


def test_alike_is_its_loop():
    rng = np.random.default_rng(0)
    for _ in range(30):
        first, second = (rng.permutation(25) + 1.0 for _ in range(2))
        lists = [[int(p) for p in np.argsort(places)] for places in (first, second)]
        overlaps = [len(set(lists[0][:k]) & set(lists[1][:k])) / k for k in range(1, 11)]
        tens = [set(some[:10]) for some in lists]
        found = wordings.alike(first, second, np.arange(25) == 3)
        assert found["agreement"] == float(lists[0][0] == lists[1][0])
        assert found["overlap"] == pytest.approx(np.mean(overlaps))
        assert found["jaccard"] == pytest.approx(len(tens[0] & tens[1]) / len(tens[0] | tens[1]))
        assert found["both"] == float(lists[0][0] == lists[1][0] == 3)


def test_chances_of_agreement():
    rng = np.random.default_rng(1)
    drawn = [
        wordings.alike(*(rng.permutation(20) + 1.0 for _ in range(2)), np.arange(20) == 0)  # type: ignore[misc]
        for _ in range(4000)
    ]
    assert np.mean([d["jaccard"] for d in drawn]) == pytest.approx(wordings._chance_of_jaccard(20, 10), abs=0.01)
    assert np.mean([d["overlap"] for d in drawn]) == pytest.approx(11 / 40, abs=0.01)
    assert np.mean([d["agreement"] for d in drawn]) == pytest.approx(1 / 20, abs=0.015)


def test_places_and_ties():
    s = np.array([[0.5, 0.2, 0.5, 0.9]], dtype=np.float32)
    assert wordings.ranks(s, "strict").tolist() == [[3, 4, 3, 1]]
    assert wordings.ranks(s, "lenient").tolist() == [[2, 4, 2, 1]]
    assert wordings.ranks(s, "half").tolist() == [[2.5, 4, 2.5, 1]]


def write_shard(folder: Path, n: int, languages: list[str], lacking: int = 0) -> Path:
    with tarfile.open(folder / "own-000.tar", "w") as tar:
        for number in range(n):
            kinds = languages[1:] if number < lacking else languages
            out = io.BytesIO()
            picture(number).save(out, "PNG")
            sheet = {"captions": [f"{kind} {number}" for kind in kinds], "caption_kinds": kinds}
            for suffix, content in (("png", out.getvalue()), ("json", json.dumps(sheet).encode())):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def own(folder: Path, **fields) -> Path:
    about = {"name": "own", "kind": "robustness", "version": "1", "title": "own", "licence": "mine"}
    sources = {"own": {"about": "own shards", "files": "own-*.tar"}}
    (folder / "own.yaml").write_text(json.dumps(about | {"sources": sources, "shards": ["own:"]} | fields))
    return folder / "own.yaml"


def test_languages_are_their_loops(tmp_path: Path):
    n, languages = 12, ["en", "de", "fr"]
    file = own(write_shard(tmp_path, n, languages), languages=languages)
    model = Random(3)
    (result,) = evaluate(model, benchmarks=[file], roots={"own": tmp_path}, show=False)
    unit = {key: model.vector(key) / np.linalg.norm(model.vector(key)) for key in model.seen}
    images = [unit[name_of(picture(k))] for k in range(n)]
    texts = {language: [unit[f"{language} {k}"] for k in range(n)] for language in languages}
    places: dict[str, list[list[int]]] = {"t2i": [], "i2t": []}
    for language in languages:
        for direction, queries, answers in (("t2i", texts[language], images), ("i2t", images, texts[language])):
            places[direction].append(
                [1 + sum(float(q @ a) > float(q @ answers[k]) for a in answers) for k, q in enumerate(queries)]
            )
    for direction, found in places.items():
        spread = [np.var([line[k] for line in found]) for k in range(n)]
        assert result.metrics[f"{direction}_spread/variance_of_rank"].value == pytest.approx(np.mean(spread))
        deviation = result.metrics[f"{direction}_spread/deviation_of_rank"].value
        assert deviation == pytest.approx(np.mean(np.sqrt(spread)))
        firsts = [np.mean([place == 1 for place in line]) for line in found]
        assert result.metrics[f"{direction}/r1"].value == pytest.approx(np.mean(firsts))
        assert [result.by_category[la][direction].value for la in languages] == pytest.approx(firsts)
    assert result.metrics["t2i_spread/variance_of_rank"].chance == pytest.approx(2 / 3 * (n**2 - 1) / 12)


def test_languages_with_constant_oracle_and_gaps(tmp_path: Path):
    languages = ["en", "de"]
    file = own(write_shard(tmp_path, 8, languages), languages=languages)
    truth = {f"{la} {k}": {name_of(picture(k))} for la in languages for k in range(8)}
    (right,) = evaluate(Oracle(truth), benchmarks=[file], roots={"own": tmp_path}, tie="strict", show=False)
    assert right.score.value == 1.0 and right.metrics["t2i_spread/variance_of_rank"].value == 0.0
    (same,) = evaluate(Constant(), benchmarks=[file], roots={"own": tmp_path}, tie="strict", show=False)
    assert same.score.value == 0.0 and same.tie["rate"] == 1.0
    write_shard(tmp_path, 8, languages, lacking=3)
    with pytest.raises(UserError, match=r"5 of 8 pictures have a caption in all languages.*3 none in en; --allow-miss"):
        evaluate(Random(), benchmarks=[file], roots={"own": tmp_path}, show=False)
    (fewer,) = evaluate(Random(), benchmarks=[file], roots={"own": tmp_path}, allow_missing=True, show=False)
    assert (fewer.n, fewer.coverage["share"]) == (5, 5 / 8)


def test_paraphrases_by_kind(tmp_path: Path):
    file = own(write_shard(tmp_path, 6, ["short", "other", "long"]), paraphrases=["short", "long"])
    places = Roots({"own": tmp_path / "own-000.tar"})
    task = PREPARE["robustness"](data.load(file), places)
    assert (task.first[0], task.second[0]) == ("short 0", "long 0")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="0 of 6 pictures have two captions of the kinds short and longer"):
        evaluate(Random(), benchmarks=[own(tmp_path, paraphrases=["short", "longer"])], roots={"own": tmp_path})
    for fields, message in (
        ({}, "needs one of corruptions, attack, outside, paraphrases, languages"),
        ({"paraphrases": [], "languages": ["a", "b"]}, "found languages and paraphrases"),
        ({"paraphrases": ["a"]}, "should be two kinds"),
        ({"languages": ["a"]}, "there should be several"),
        ({"corruptions": {"severities": [6]}}, "severities.0"),
    ):
        with pytest.raises(UserError, match=message):
            data.load(own(tmp_path, **fields))


# Attack


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(tiny()).eval()


def attack_inputs(model, n: int = 12):
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    texts = model.embed_texts(["a red cube", "a dog", "two green balls"])
    with torch.no_grad():
        return pixels, (model.encode_image(pixels) @ texts.T).argmax(1), texts


@pytest.mark.parametrize(("eps", "step", "left"), [(3, 1, {1.0}), (30, 10, {0.0, 1.0}), (90, 30, {0.0, 1.0})])
def test_attack_is_its_loop(model, eps, step, left):
    pixels, labels, texts = attack_inputs(model)
    attack = Attack(eps=eps, step_size=step, steps=4)
    found = attacked.withstood(model, pixels, labels, texts, attack, "strict")
    assert set(found) <= left
    for n in range(len(pixels)):  # one by one, and with a plain clamp
        x, held = pixels[n].float(), True
        for number in range(5):
            x = x.detach().requires_grad_()
            logits = model.scale.detach() * model.encode_image(x[None]) @ texts.T
            held &= int(logits.argmax()) == int(labels[n])
            if number == 4:
                break
            (slope,) = torch.autograd.grad(cross_entropy(logits, labels[n : n + 1]), x)
            x = torch.clamp(pixels[n] + (x + step * slope.sign() - pixels[n]).clamp(-eps, eps), 0, 255)
        assert found[n] == float(held)
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_attack_in_its_limits(model):
    pixels, labels, texts = attack_inputs(model)
    still = attacked.withstood(model, pixels, labels, texts, Attack(eps=0, steps=3), "strict")
    assert still.tolist() == [1.0] * len(labels)
    held = [
        attacked.withstood(model, pixels, labels, texts, Attack(eps=90, step_size=20, steps=k), "strict").mean()
        for k in (1, 3, 9)
    ]
    assert held[0] >= held[1] >= held[2] and held[2] < 1
    model.image_locked = True
    locked = attacked.withstood(model, pixels, labels, texts, Attack(eps=90, step_size=20, steps=3), "strict").mean()
    assert locked == held[1] and model.image_locked
    model.image_locked = False


# The world's own


NAMES = ["world_corrupted", "world_outside", "world_paraphrases"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    sizes = {"pictures": 10, "dev_pictures": 40, "eval_rows": 1, "zeroshot_pictures": 42, "size": 32}
    build_world(folder / "world", **sizes, workers=1, progress=False)
    return {"*": folder}


def small(name: str, folder: Path) -> Path:
    """The packaged benchmark, with fewer corruptions."""
    changes = {"corruptions": {"kinds": ["brightness", "pixelate"], "severities": [1, 5]}, "per_class": 1}
    tree = data.load(name).model_dump(exclude_none=True) | (changes if name == "world_corrupted" else {})
    (folder / f"{name}_.yaml").write_text(json.dumps(tree))
    return folder / f"{name}_.yaml"


def knows(name: str, file: Path, roots) -> Oracle:
    places = Roots(roots)
    benchmark = data.load(file)
    places.sources.update(benchmark.sources)
    task = PREPARE["robustness"](benchmark, places)
    from clipkit.evaluation.embed import Embedder

    look = Embedder(Random(), places)
    truth: dict[str, set[str]] = {text: set() for text in task.texts}
    if name == "world_paraphrases":
        for which, first, second in zip(task.pictures, task.first, task.second):  # type: ignore[attr-defined]
            for text in (first, second):
                truth[text].add(name_of(look.open(which)))
    else:
        labels = task.classes.labels  # type: ignore[attr-defined]
        for n, which in enumerate(task.pictures):
            if name == "world_corrupted" or n < len(labels):
                for prompt in task.classes.prompts[labels[n % len(labels)]]:  # type: ignore[attr-defined]
                    truth[prompt].add(name_of(look.open(which)))
    return Oracle(truth)


LOW = ("fpr95", "rank")


@pytest.mark.parametrize("name", NAMES)
def test_constant_random_and_oracle(drawn, tmp_path: Path, name: str):
    file = small(name, tmp_path)

    def run(model):
        return evaluate(model, benchmarks=[file], roots=drawn, tie="strict", show=False)[0]

    constant = run(Constant())
    low = {key for key in constant.metrics if key.endswith(LOW)}
    assert {metric.value for key, metric in constant.metrics.items() if key not in low} == {0.0}
    assert all(constant.metrics[key].value == 1.0 for key in low)
    guessed = [run(Random(seed)) for seed in range(4)]
    for key, metric in guessed[0].metrics.items():
        if metric.chance is not None and key != "kept/top1":
            value = float(np.mean([result.metrics[key].value for result in guessed]))
            slack = max(0.05, 0.8 * (metric.high - metric.low))
            assert value == pytest.approx(metric.chance, abs=slack), key
    right = run(knows(name, file, drawn))
    wanted = {key: 0.0 if key in low else 1.0 for key in right.metrics}
    assert {key: metric.value for key, metric in right.metrics.items()} == pytest.approx(wanted)
    assert right.examples and right.items and right.protocol
    assert all({"id", "category", "cluster", "correct"} <= item.keys() for item in right.items)
    assert len({item["id"] for item in right.items}) == len(right.items)


def test_the_suite_on_a_model(drawn, tmp_path: Path, model):
    tree = data.load("world_attacked").model_dump(exclude_none=True) | {"per_class": 1}
    (tmp_path / "a.yaml").write_text(json.dumps(tree))
    files = [tmp_path / "a.yaml", small("world_outside", tmp_path)]
    results = evaluate(model, benchmarks=files, roots=drawn, out=tmp_path / "results", show=False)
    under = results[0].metrics["adversarial/top1"]
    assert under.value <= results[0].metrics["clean/top1"].value and under.low <= under.value <= under.high
    assert results[0].details["attack"] == {"eps": 1.0, "step_size": 0.25, "steps": 10}
    with pytest.raises(UserError, match="needs the gradient of a model's pixels, which Random does not give"):
        evaluate(Random(), benchmarks=[tmp_path / "a.yaml"], roots=drawn, show=False)
    assert {"world_attacked", "cifar10_corrupted", "flickr8k_paraphrases"} <= set(data.suite("robustness"))


def test_a_report_of_them(drawn, tmp_path: Path):
    from clipkit.evaluation.report import write_report

    for seed, run in enumerate(("one", "two")):
        files = [small(name, tmp_path) for name in NAMES]
        evaluate(Random(seed), benchmarks=files, roots=drawn, out=tmp_path / run / "results", show=False)
    page = write_report([("one", tmp_path / "one"), ("two", tmp_path / "two")], tmp_path / "report.html").read_text()
    assert "The world, worse pictures" in page and "false positive rate at 95 %" in page
