"""Zero-shot classification: a class is the mean of its prompts' embeddings; a picture is the class it is nearest to.

Axes: n pictures, c classes, m prompts of a class, d embedding.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from clipkit.data.members import PICTURES, Unreadable
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.benchmark import Benchmark, Picture
from clipkit.evaluation.embed import Embedder, Model, encode_pictures, watched
from clipkit.evaluation.geometry import calibration
from clipkit.evaluation.labelled import Labelled
from clipkit.evaluation.result import Metric, Result, begin, digest, furthest_wrong, headline, pick, policy, thumbnail
from clipkit.evaluation.roots import Folder, Roots, split_reference
from clipkit.evaluation.scores import Tie
from clipkit.evaluation.stats import Z95, deranged, wilson

Array = np.ndarray

TEMPLATES = ["a photo of a {}.", "a picture of a {}.", "an image of a {}."]
"""Prompts where the user names none."""
NONE = "none of these"
"""The class of a picture that no class is near enough to."""


@dataclass
class ZeroShot:
    """A zero-shot benchmark ready to be scored."""

    benchmark: Benchmark
    pictures: list[Picture]
    labels: Int[Array, " n"]
    places: list[str]
    """Which entry of `benchmark.images` each picture comes from."""
    prompts: list[list[str]]
    coverage: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """All prompts of all classes."""
        return [prompt for prompts in self.prompts for prompt in prompts]

    def score(self, embedder: Embedder, tie: str) -> Result:
        """Top-1, top-5, mean per class, the commonest mistakes, items and examples."""
        images, classifier = embedder.pictures(self.pictures), weights(embedder, self.prompts)
        rule, s = policy(self.benchmark, tie), _cosines(images, classifier)
        own = s[np.arange(len(s)), self.labels]
        better, equal = (s > own[:, None]).sum(1), (s == own[:, None]).sum(1) - 1
        first, five = _credit(better, equal, 1, rule), _credit(better, equal, 5, rule)
        scale = _scale(embedder.model)
        metrics, choice = self._metrics(first, five), _chosen(s, self.labels, first)
        return begin(
            self.benchmark,
            n=len(s),
            headline=headline(self.benchmark, metrics, "top1"),
            metrics=metrics,
            by_category=self._by_class(first),
            breakdowns=self._by_place(first),
            baselines=self._baselines(images, classifier),
            tie={"policy": tie, "rule": rule, "rate": float(((equal > 0) & (better == 0)).mean()), "by_score": {}},
            coverage=self.coverage,
            details={
                "classes": self._names(),
                "confusions": self._confusions(choice),
                "calibration": calibration(_probabilities(s, scale).max(1), first) | {"scale": scale},
            },
            items=self._items(first, better, equal, choice),
            examples=self._examples(first, choice, s, embedder),
            protocol={"classes_and_templates_sha256": digest(repr(self.prompts))},
        )

    def _metrics(self, first: Float[Array, " n"], five: Float[Array, " n"]) -> dict[str, Metric]:
        classes = len(self.prompts)
        metrics = {"top1": share(first, 1 / classes), "mean_per_class": mean_per_class(first, self.labels, classes)}
        return metrics | ({"top5": share(five, 5 / classes)} if classes > 5 else {})

    def _baselines(self, images: Float[Array, "n d"], classifier: Float[Array, "c d"]) -> dict[str, Any]:
        """Accuracy without looking at the picture, ties as coin tosses."""
        kinds = {
            "text_prior": ("the class nearest to the mean picture", np.broadcast_to(images.mean(0), images.shape)),
            "shuffled_pictures": ("the model, shown other pictures of the benchmark", images[deranged(len(images))]),
        }
        found = {}
        for name, (title, shown) in kinds.items():
            s = _cosines(shown, classifier)
            own = s[np.arange(len(s)), self.labels]
            better, equal = (s > own[:, None]).sum(1), (s == own[:, None]).sum(1) - 1
            first, five = _credit(better, equal, 1, "half"), _credit(better, equal, 5, "half")
            by_class = {
                label: {score: metric.value for score, metric in scores.items()}
                for label, scores in self._by_class(first).items()
            }
            values = {key: metric.value for key, metric in self._metrics(first, five).items()}
            found[name] = {"title": title, "metrics": values, "by_category": by_class}
        return found

    def _by_class(self, first: Float[Array, " n"]) -> dict[str, dict[str, Metric]]:
        return {
            name: {"top1": share(first[self.labels == label], 1 / len(self.prompts))}
            for label, name in enumerate(self._names())
            if (self.labels == label).any()
        }

    def _by_place(self, first: Float[Array, " n"]) -> dict[str, dict[str, dict[str, Metric]]]:
        if len(self.benchmark.images) == 1:
            return {}
        places = np.array(self.places)
        shares = {p: share(first[places == p], 1 / len(self.prompts)) for p in dict.fromkeys(self.places)}
        return {"images": {place: {"top1": found} for place, found in shares.items()}}

    def _confusions(self, choice: Int[Array, " n"], count: int = 10) -> list[dict[str, Any]]:
        names, sizes = self._names(), Counter(self.labels.tolist())
        mistakes = Counter((int(t), int(c)) for t, c in zip(self.labels, choice, strict=True) if t != c)
        return [
            {"class": names[t], "taken_for": names[c], "count": k, "share": k / sizes[t]}
            for (t, c), k in mistakes.most_common(count)
        ]

    def _items(
        self, first: Float[Array, " n"], better: Int[Array, " n"], equal: Int[Array, " n"], choice: Int[Array, " n"]
    ) -> list[dict[str, Any]]:
        names = self._names()
        return [
            {
                "id": f"{picture.src}:{picture.path}",
                "category": names[self.labels[n]],
                "cluster": f"{picture.src}:{picture.path}",
                "correct": float(first[n]),
                "choice": names[choice[n]],
                "rank": int(better[n] + equal[n]) + 1,
            }
            for n, picture in enumerate(self.pictures)
        ]

    def _examples(
        self, first: Float[Array, " n"], choice: Int[Array, " n"], s: Float[Array, "n c"], embedder: Embedder
    ) -> list[dict[str, Any]]:
        names, out = self._names(), []
        others = s.copy()
        others[np.arange(len(s)), self.labels] = -np.inf
        gaps = (others.max(1) - s[np.arange(len(s)), self.labels]).tolist()
        worst = furthest_wrong(first.tolist(), gaps)
        for n in pick(first.tolist(), wrong_by=gaps):
            best = [int(choice[n]), *(int(c) for c in np.argsort(-s[n], kind="stable") if c != choice[n])][:5]
            shown = best if self.labels[n] in best else [*best[:4], int(self.labels[n])]
            out.append(
                {
                    "id": f"{self.pictures[n].src}:{self.pictures[n].path}",
                    "category": names[self.labels[n]],
                    "correct": float(first[n]),
                    "form": "i2t",
                    "pictures": [thumbnail(embedder, self.pictures[n])],
                    "texts": [names[c] for c in shown],
                    "scores": [[float(s[n, c]) for c in shown]],
                    "match": [[int(c == self.labels[n]) for c in shown]],
                    "choice": [0],
                    "worst": n in worst,
                }
            )
        return out

    def _names(self) -> list[str]:
        return [_display(names)[0] for names in self.benchmark.classes.values()]


def prepare(
    benchmark: Benchmark, roots: Roots, allow_missing: bool = False, without: Collection[Picture] = ()
) -> ZeroShot:
    """Find the pictures: the first folder below each entry of `images` is the class. `without`: not these.

    Raises UserError when a class folder is unknown, or (unless `allow_missing`) when a class has no picture.
    """
    classes = {folder: number for number, folder in enumerate(benchmark.classes)}
    pictures, labels, places = [], [], []
    for entry in benchmark.images:
        src, folder = split_reference(entry)
        for path in roots.paths(src, folder):
            inside = path.removeprefix(f"{folder}/") if folder else path
            label, slash, _ = inside.partition("/")
            if not slash or path.rpartition(".")[2].lower() not in PICTURES or Picture(src, path) in without:
                continue
            if label not in classes:
                raise UserError(f"{entry}: folder {label} is no class{did_you_mean(label, classes)}")
            pictures.append(Picture(src, path))
            labels.append(classes[label])
            places.append(folder or src)
    empty = [name for name, number in classes.items() if number not in set(labels)]
    if len(empty) == len(classes) or (empty and not allow_missing):
        raise UserError(
            f"{len(empty)} of {len(classes)} classes have no picture in "
            f"{', '.join(benchmark.images)} (class folders with pictures), the first is {empty[0]}"
        )
    prompts = [prompts_of(_display(names), benchmark.templates) for names in benchmark.classes.values()]
    coverage = {"share": 1 - len(empty) / len(classes), "rows": len(pictures), "missing": {}}
    return ZeroShot(benchmark, pictures, np.array(labels), places, prompts, coverage)


def weights(embedder: Embedder, prompts: Sequence[Sequence[str]]) -> Float[Array, "c d"]:
    """Zero-shot classifier: per class the mean of its unit prompt embeddings, made unit again (CLIP, §3.1.4)."""
    rows = embedder.texts([prompt for group in prompts for prompt in group])
    starts = np.cumsum([0, *(len(group) for group in prompts)])[:-1]
    means = np.add.reduceat(rows.astype(np.float64), starts, axis=0) / np.array([[len(g)] for g in prompts])
    return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def classify(
    model: Model,
    images: Any,
    classes: str | Path | Sequence[str] | Mapping[str, Any],
    templates: str | Path | Sequence[str] | None = None,
    *,
    top: int = 5,
    none_below: float | None = None,
    scale: float | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Rank classes for each picture: [{"image", "classes": [{"class", "probability", "similarity"}, best first]}].

    `images`: a file, folder, glob, PIL picture, or a list of these. `classes`: names, name -> display name(s), "a,b,c",
    or a text file with one name a line; underscores become spaces. `templates`: prompts with {} for the name, or a
    text file of them. Probabilities are the softmax of the similarities at `scale`, by default the model's own (100
    where it has none), which is seldom calibrated: `Answers.calibrate` finds one that is. A picture whose best
    similarity is below `none_below` is NONE ("none of these"). Raises UserError for what cannot be read.
    """
    answers = Answers(model, classes, templates, top=top, none_below=none_below, scale=scale, batch_size=batch_size)
    return answers.to(images, progress=progress)


class Answers:
    """A model and classes, and which class each picture is; see `classify`."""

    def __init__(
        self,
        model: Model,
        classes: str | Path | Sequence[str] | Mapping[str, Any],
        templates: str | Path | Sequence[str] | None = None,
        *,
        top: int = 5,
        none_below: float | None = None,
        scale: float | None = None,
        batch_size: int = 64,
    ):
        named = _named(classes)
        if top < 1:
            raise UserError(f"top should be at least 1, got {top}")
        if NONE in named:
            raise UserError(f"classes: {NONE!r} is what a picture of no class is called; name the class otherwise")
        wordings = TEMPLATES if templates is None else lines_of(templates, "templates")
        self.model, self.batch_size, self.top, self.none_below = model, batch_size, top, none_below
        self.prompts = [prompts_of(display, wordings) for display in named.values()]
        self.labels = list(named)
        self.scale = _scale(model) if scale is None else scale
        self._classifier = weights(Embedder(model, Roots(), batch_size=batch_size), self.prompts)

    def to(self, images: Any, *, progress: bool = False) -> list[dict[str, Any]]:
        """What `classify` returns."""
        found = collect(images)
        names = [str(image) if isinstance(image, Path) else f"picture {n}" for n, image in enumerate(found)]
        batches = watched(self.embed(found, load_picture), len(found), "embedding pictures", progress)
        ranked = [one for rows in batches for one in self.of(rows)]
        return [{"image": name, "classes": one} for name, one in zip(names, ranked, strict=True)]

    def embed(self, items: Iterable[Any], load: Callable[[Any], Image.Image]) -> Iterator[Float[Array, "n d"]]:
        """Embeddings of what `load` makes pictures of, batch by batch."""
        return encode_pictures(self.model, items, load, self.batch_size)

    def of(self, rows: Float[Array, "n d"]) -> list[list[dict[str, Any]]]:
        """Each picture's best classes; NONE with the best one's numbers in front where that is not near enough."""
        s = _cosines(rows, self._classifier)
        chances = _probabilities(s, self.scale)
        best = np.argsort(-s, axis=1, kind="stable")[:, : self.top]
        out = []
        for n, order in enumerate(best):
            ranked = [
                {"class": self.labels[c], "probability": float(chances[n, c]), "similarity": float(s[n, c])}
                for c in order
            ]
            if self.none_below is not None and ranked[0]["similarity"] < self.none_below:
                ranked = [ranked[0] | {"class": NONE}, *ranked][: self.top]
            out.append(ranked)
        return out

    def calibrate(self, known: Labelled) -> dict[str, float]:
        """Take the scale that fits labelled pictures; both scales, and their calibration errors, with the accuracy.

        The error at the fitted scale is honest: each half of the pictures is judged at the scale of the other half.
        Raises UserError for a class that is not among the answers, and where there are fewer than four pictures.
        """
        if unknown := [name for name in known.classes if name not in self.labels]:
            raise UserError(f"labelled pictures: {unknown[0]} is no class{did_you_mean(unknown[0], self.labels)}")
        if len(known.items) < 4:
            raise UserError(f"labelled pictures: {len(known.items)} found; a scale needs at least four")
        order = np.random.default_rng(0).permutation(len(known.items))
        rows = np.concatenate(list(self.embed([known.items[n] for n in order], known.open)))
        s = _cosines(rows, self._classifier)
        own = np.array([self.labels.index(name) for name in known.classes])[known.labels[order]]
        right, sure = (s.argmax(1) == own).astype(np.float64), np.zeros(len(s))
        for half in (slice(0, None, 2), slice(1, None, 2)):
            other = slice(1 - half.start, None, 2)
            sure[half] = _probabilities(s[half], fit_scale(s[other], own[other])).max(1)
        found = {
            "accuracy": float(right.mean()),
            "scale": self.scale,
            "calibration error": calibration(_probabilities(s, self.scale).max(1), right)["ece"],
            "fitted scale": fit_scale(s, own),
            "its calibration error": calibration(sure, right)["ece"],
        }
        self.scale = found["fitted scale"]
        return found


SCALES = (1e-2, 1e4)
"""Between which a fitted scale lies."""


def fit_scale(s: Float[Array, "n c"], labels: Int[Array, " n"]) -> float:
    """The scale whose softmax gives the right classes the highest likelihood (temperature scaling, arXiv 1706.04599).

    The likelihood's slope is the mean similarity of the right class less the expected one, which grows with the scale:
    its root is found by halving, on a logarithmic axis.
    """
    own = s[np.arange(len(s)), labels].astype(np.float64).mean()
    low, high = np.log(SCALES)
    for _ in range(60):
        middle = (low + high) / 2
        expected = (_probabilities(s, float(np.exp(middle))) * s).sum(1).mean()
        low, high = (middle, high) if expected < own else (low, middle)
    return float(np.exp((low + high) / 2))


def _cosines(images: Float[Array, "n d"], classifier: Float[Array, "c d"]) -> Float[Array, "n c"]:
    # fp64 inside: classes of the same name must tie exactly wherever they stand in the product.
    return (images.astype(np.float64) @ classifier.T.astype(np.float64)).astype(np.float32)


def _probabilities(s: Float[Array, "n c"], scale: float) -> Float[Array, "n c"]:
    powers = np.exp(scale * (s - s.max(1, keepdims=True)).astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


def _credit(better: Int[Array, " n"], equal: Int[Array, " n"], k: int, tie: Tie) -> Float[Array, " n"]:
    """Whether the own class is among the first k, given how many others score better and equal."""
    if tie == "half":
        return np.clip((k - better) / (equal + 1), 0.0, 1.0)
    return (better + (equal if tie == "strict" else 0) < k).astype(np.float64)


def _chosen(s: Float[Array, "n c"], labels: Int[Array, " n"], first: Float[Array, " n"]) -> Int[Array, " n"]:
    """The class each picture is taken for; a tie that counted as wrong is taken for another class."""
    others = s.copy()
    others[np.flatnonzero(first == 0), labels[first == 0]] = -np.inf
    return np.where(first == 1, labels, others.argmax(1))


def mean_per_class(credit: Float[Array, " n"], labels: Int[Array, " n"], classes: int) -> Metric:
    """Normal interval; each class's variance from its share with two right and two wrong added (Agresti, Coull)."""
    sizes = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, credit, minlength=classes)[sizes > 0]
    sizes = sizes[sizes > 0]
    value, smooth = float((right / sizes).mean()), (right + 2) / (sizes + 4)
    half = Z95 * float(np.sqrt((smooth * (1 - smooth) / (sizes + 4)).sum())) / len(sizes)
    return Metric(value, max(0.0, value - half), min(1.0, value + half), len(credit), 1 / classes)


def share(credit: Float[Array, " n"], chance: float) -> Metric:
    """The mean credit with its Wilson interval."""
    n, value = len(credit), float(credit.mean())
    return Metric(value, *wilson(value * n, n), n, chance)


def prompts_of(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every name. Raises UserError for a template without {}."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template {template!r}: should hold {{}} where the class name goes")
    return [template.replace("{}", name) for name in names for template in templates]


def _display(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _named(classes: str | Path | Sequence[str] | Mapping[str, Any]) -> dict[str, list[str]]:
    """Class -> what the model is told."""
    if isinstance(classes, Mapping):
        named = {name: _display(display) for name, display in classes.items()}
    else:
        named = {name: [name.replace("_", " ")] for name in lines_of(classes, "classes")}
    if len(named) < 2:
        raise UserError(f"classes: give at least two different names to choose between, got {list(named)}")
    return named


def lines_of(given: str | Path | Sequence[str], what: str) -> list[str]:
    """A list of strings from a list, a file with one a line, or (class names) "a,b,c"."""
    if not isinstance(given, str | Path):
        return list(given)
    if Path(given).is_file():
        items = Path(given).read_text().splitlines()
    elif isinstance(given, Path) or given.endswith(".txt"):
        raise UserError(f"{what}: no such file {given}")
    else:
        items = given.split(",") if what == "classes" else [given]
    return [item.strip() for item in items if item.strip()]


def collect(images: Any) -> list[Path | Image.Image]:
    """Files and PIL pictures, in the order given; folders and globs sorted."""
    found: list[Path | Image.Image] = []
    if isinstance(images, Image.Image):
        found = [images]
    elif not isinstance(images, str | Path):
        found = [one for item in images for one in collect(item)]
    elif Path(images).is_dir():
        inside = Folder(Path(images)).paths()
        found = [Path(images) / path for path in inside if path.rpartition(".")[2].lower() in PICTURES]
    elif Path(images).is_file():
        found = [Path(images)]
    else:
        found = [Path(path) for path in sorted(glob.glob(str(images), recursive=True))]
    if not found:
        raise UserError(f"{images}: no picture found (a file, a folder or a glob of {', '.join(PICTURES)})")
    return found


def each(images: Iterable[str]) -> Iterator[Path]:
    """The files that `collect` would list, one at a time: folders are walked in order, nothing is held in memory.

    Raises UserError when it comes to a name that is nothing.
    """
    for name in images:
        if Path(name).is_dir():
            yield from _walk(Path(name))
        elif Path(name).is_file():
            yield Path(name)
        else:
            yield from collect(name)  # type: ignore[misc]


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as inside:
        entries = sorted((entry.name, entry.is_dir()) for entry in inside)
    for name, is_folder in entries:
        if is_folder:
            yield from _walk(folder / name)
        elif name.rpartition(".")[2].lower() in PICTURES:
            yield folder / name


def load_picture(image: Path | Image.Image) -> Image.Image:
    """The picture in RGB. Raises UserError naming the file that cannot be read."""
    from clipkit.data.decode import read_picture

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return read_picture(image.read_bytes())
    except (OSError, Unreadable) as error:
        raise UserError(f"cannot read picture {image}: {error}") from None


def _scale(model: Any) -> float:
    scale = getattr(model, "scale", None)
    if scale is None:
        return 100.0
    return float(scale.detach() if hasattr(scale, "detach") else scale)
