"""On real and drawn data: a constant encoder scores 0, a random one chance, one that knows the answers 1."""

from __future__ import annotations

from collections import defaultdict

import pytest

from clipkit.data.world.build import build_world
from clipkit.evaluation import benchmark as data
from clipkit.evaluation.compositional import Compositional
from clipkit.evaluation.convert import convert
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.retrieval import Retrieval
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.run import PREPARE, evaluate
from tests.evaluation.fakes import Constant, Oracle, Random, name_of

DRAWN = ["world", "world_dev", "world_object", "world_texture", "world_dev_shape", "world_retrieval"]
REAL = ["sugarcrepe_subset", "vsr_subset", "valse_subset", "flowers5", "flickr8k_dev", "flickr8k_order"]
SCENES = ["abstract_scenes_pairs", "abstract_scenes_choice"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    sizes = {"pictures": 10, "dev_pictures": 40, "eval_rows": 12, "zeroshot_pictures": 42, "size": 32}
    build_world(folder / "world", **sizes, workers=1, progress=False)
    return {"*": folder}


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for name in ("sugarcrepe", "vsr"):
        convert(name, shared / "data" / "sugarcrepe_rows.tar", folder)
    photographs = str(shared / "data" / "coco_val2017-000.tar")
    convert("valse", shared / "data" / "sugarcrepe_rows.tar", folder, pictures=photographs)
    convert("flickr8k_order", shared / "data" / "flickr8k_dev-000.tar", folder)
    for name in SCENES:
        convert(name, shared / "data" / "codraw_scenes.tar", folder)
    return {"*": shared / "data", "bench": folder, "abstract_scenes": folder / "abstract_scenes_pairs.tar"}


def knows(name, roots):
    """An oracle of a benchmark's answers."""
    places = Roots(roots)
    benchmark = data.load(name)
    places.sources.update(benchmark.sources)
    task = PREPARE[benchmark.kind](benchmark, places)
    names = {p: name_of(Embedder(Random(), places).open(p)) for p in set(task.pictures)}
    truth = defaultdict(set, {text: set() for text in task.texts})
    if isinstance(task, Compositional):
        for row in task.rows:
            for picture, line in zip(row.pictures, row.match):
                for text, right in zip(row.texts, line):
                    truth[text] |= {names[picture]} if right else set()
    elif isinstance(task, Retrieval):
        for p, u in zip(*task.match.nonzero()):
            truth[task.texts[u]].add(names[task.pictures[p]])
    else:
        for picture, label in zip(task.pictures, task.labels):
            for prompt in task.prompts[label]:
                truth[prompt].add(names[picture])
    return Oracle(truth)


def check(names, roots, ceiling=1.0):
    for result in evaluate(Constant(), benchmarks=names, roots=roots, tie="strict", show=False):
        shares = {name: metric.value for name, metric in result.metrics.items() if "rank" not in name}
        assert set(shares.values()) == {0.0}, result.benchmark
        assert result.tie["rate"] == 1.0
    for result in evaluate(Random(), benchmarks=names, roots=roots, tie="strict", show=False):
        metric = result.score
        slack = 0.3 * (metric.high - metric.low)
        assert metric.low - slack <= metric.chance <= metric.high + slack, result.benchmark
    for name in names:
        (result,) = evaluate(knows(name, roots), benchmarks=[name], roots=roots, tie="strict", show=False)
        assert result.metrics.keys() and result.metrics[unified(result)].value == pytest.approx(ceiling), name
        assert ceiling < 1 or {metric.value for metric in result.metrics.values()} == {1.0}, name


def unified(result):
    """The metric over all rows alike, where there is one."""
    return next((key for key in result.metrics if key.endswith("/micro")), result.headline)


def test_drawn(drawn):
    check(DRAWN, drawn)


def test_real(real):
    check(REAL, real)


def test_scenes(real):
    # The two pictures of one pair (adjectives/9) are the same to the pixel.
    check(["abstract_scenes_choice"], real, ceiling=1003 / 1004)
    check(["abstract_scenes_pairs"], real, ceiling=501 / 502)
