"""A benchmark is data with a version: one YAML file, and for compositional ones rows in JSONL.

`Benchmark` is the schema of `eval/**/*.yaml`, `Row` of one line of `rows.jsonl`: pictures × texts and a `match`
matrix of 1 (right), 0 (wrong), null (not judged). A file is named `source:path`; where a source lies is the
user's business (`roots`), so that no benchmark holds a machine's paths.
"""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from clipkit.config import data_folders, explain
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.roots import Roots, split_reference
from clipkit.settings import Section

Names = Annotated[list[str], Field(min_length=1)]


class Source(Section):
    """One place pictures or rows come from; the user's `roots` say where it lies."""

    about: str
    """What it is and how to get it, in one line (shown when it is missing)."""
    files: str = ""
    """Usual file or folder name (may be a glob) inside a common data folder (`roots: {"*": FOLDER}`)."""
    licence: str = ""


class Mean(Section):
    """An aggregate that averages accuracies: of named aggregates or categories, or over the values of a field.

    With `together`, of rows that count only all at once.
    """

    mean: Names | None = None
    """Aggregates or categories, each counting once."""
    over: str | None = None
    """A row field (`category`, `group`, `meta.relation`, …), each of its values counting once."""
    together: str | None = None
    """A row field each of whose values is right if all of its rows are (What'sUp's pairs and sets)."""
    min_count: int = 1
    """With `over`: values with fewer rows are left out."""
    exclude: list[str] = []
    """With `over` and `together`: values left out."""
    whole: bool = True
    """With `together`: values with fewer rows than the largest are left out."""

    @model_validator(mode="after")
    def _one(self) -> Mean:
        if sum(given is not None for given in (self.mean, self.over, self.together)) != 1:
            raise ValueError("give one of mean: [names], over: field, together: field")
        return self


class Official(Section):
    """How the benchmark's own authors score it."""

    tie: Literal["strict", "lenient", "half", "first", "last"] = "strict"
    """Equal scores count as wrong, right, a coin toss among the tied, or (compositional) go to the first or last."""
    headline: str = ""
    """The metric that stands for the benchmark, `score/aggregate` (`i2t/macro`); default: of the rows' form."""
    note: str = ""


class Reference(Section):
    """A published number."""

    model: str
    activation: Literal["", "gelu", "quickgelu"] = ""
    """Of the towers as evaluated, where known: the same weights score differently under the other one."""
    metric: str
    value: float
    """Between 0 and 1."""
    source: str


class Corruptions(Section):
    """Pictures made worse, the fifteen ways of ImageNet-C (clipkit/evaluation/robustness/corruptions.py)."""

    kinds: list[str] = []
    """Default: all fifteen."""
    severities: Annotated[list[Annotated[int, Field(ge=1, le=5)]], Field(min_length=1)] = [1, 2, 3, 4, 5]


class Attack(Section):
    """Pictures moved against the model, within a bound (clipkit/evaluation/robustness/attacked.py)."""

    eps: Annotated[float, Field(ge=0)] = 1.0
    """How far a value may move, of 255."""
    step_size: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 10


class Download(Section):
    """Annotations that plain addresses serve; `clipkit bench get` fetches and converts them."""

    url: str
    """Of the folder."""
    files: Annotated[dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(min_length=1)]
    """Path below the folder -> its SHA-256."""


class Benchmark(Section):
    """One file of `eval/`."""

    name: str
    kind: Literal["compositional", "zeroshot", "retrieval", "robustness"]
    version: str
    title: str
    about: str = ""
    sources: dict[str, Source] = {}
    licence: str = ""
    homepage: str = ""
    citation: str = ""
    leakage: str = ""
    """Training data known to overlap with it."""
    download: Download | None = None
    official: Official = Official()
    reference: list[Reference] = []

    rows: list[str] = []
    """Compositional: JSONL files (also .gz), `source:path` or beside the YAML file."""
    sha256: dict[str, str] = {}
    """Row file as written in `rows` -> its SHA-256; a mismatch is an error."""
    thresholds: bool = False
    """Compositional: also judge each half of a pair by itself, at a threshold fitted on other rows (VALSE's acc)."""
    prefix: str = ""
    """Put before every text ("a photo of ")."""
    aggregates: dict[str, Names | Mean] = {}
    """Beside `micro` and `macro` (over categories): a list pools the rows of these categories, see also `Mean`."""
    breakdowns: list[str] = []
    """Row fields reported value by value beside `category` (`meta.seed`)."""
    chance: dict[str, float] = {}
    """Category -> accuracy of guessing, where it is not what random scores give."""

    images: list[str] = []
    """Zero-shot: folders of class folders, `source:` or `source:folder`."""
    classes: dict[str, str | Names] = {}
    """Zero-shot: class folder -> name shown to the model (several names: their mean)."""
    templates: list[str] = []
    """Zero-shot: prompts with {} for the class name."""
    torchvision: dict[str, str | int | bool] | None = None
    """Zero-shot: `name` of the torchvision.datasets class that `clipkit bench folders` reads, and its settings."""

    shards: list[str] = []
    """Retrieval: tar shards, `source:` or `source:glob`, pictures with all their captions."""

    corruptions: Corruptions | None = None
    """Robustness, of pictures with classes: how many are still known when they are worse."""
    attack: Attack | None = None
    """Robustness, of pictures with classes: how many are still known when they are moved against the model."""
    outside: list[str] = []
    """Robustness, of pictures with classes: folders with pictures of none of them, to be told apart."""
    paraphrases: list[str] | None = None
    """Robustness, of captions: two kinds of captions (empty: each picture's first two) that should find the same."""
    languages: list[str] = []
    """Robustness, of captions: the kinds of captions that are languages."""
    per_class: Annotated[int, Field(ge=0)] = 0
    """Robustness, of pictures with classes: a seeded choice of so many a class; 0: all."""

    _origin: Path | None = None

    @field_validator("classes", mode="before")
    @classmethod
    def _name_themselves(cls, classes: Any) -> Any:
        """A plain list of class folders: shown as they are, underscores as spaces."""
        return {str(c): str(c).replace("_", " ") for c in classes} if isinstance(classes, list) else classes

    @property
    def folder(self) -> Path | None:
        """Where the YAML file lies; paths without a source are relative to it."""
        return self._origin

    @model_validator(mode="after")
    def _has_its_parts(self) -> Benchmark:
        classes, asked = ("images", "classes", "templates"), self.robustness
        parts = {"compositional": ("rows",), "zeroshot": classes, "retrieval": ("shards",)}
        parts["robustness"] = ("shards",) if asked & {"paraphrases", "languages"} else classes
        if self.kind == "robustness" and len(asked) != 1:
            raise ValueError(
                "a robustness benchmark needs one of corruptions, attack, outside, paraphrases, languages"
                + (f", found {' and '.join(sorted(asked))}" if asked else "")
            )
        if len(self.paraphrases or ()) not in (0, 2):
            raise ValueError(f"paraphrases: should be two kinds of captions, or [], found {self.paraphrases}")
        if len(self.languages) == 1:
            raise ValueError("languages: there should be several")
        if self.kind != "compositional" and self.official.tie in ("first", "last"):
            raise ValueError(
                f"official.tie: {self.official.tie} is for compositional benchmarks, whose rows have an order"
            )
        for part in parts[self.kind]:
            if not getattr(self, part):
                raise ValueError(f"a {self.kind} benchmark needs {part}")
        return self

    @property
    def robustness(self) -> set[str]:
        """Which of a robustness benchmark's questions are asked."""
        given = {"corruptions", "attack", "outside", "languages"}
        found = {name for name in given if getattr(self, name)}
        return found if self.paraphrases is None else found | {"paraphrases"}


class Picture(NamedTuple):
    """A picture's identity; it is embedded once a run. `bbox` is x, y, width, height in pixels (PIL crop)."""

    src: str
    path: str
    bbox: tuple[float, float, float, float] | None = None
    change: str = ""
    """What is done to it after the crop (`KIND:SEVERITY` of the corruptions)."""


class PictureReference(Section):
    """A picture as a row names it; without `src` it lies beside the row file."""

    src: str = ""
    path: str
    bbox: tuple[float, float, float, float] | None = None


class Row(Section):
    """One line of rows.jsonl."""

    id: str
    category: str = "all"
    cluster: str = ""
    """Rows of one cluster are not independent (intervals resample clusters); default: the first picture."""
    images: Annotated[list[PictureReference], Field(min_length=1)]
    texts: Names
    match: list[list[Literal[0, 1] | None]]
    """images × texts."""
    valid: bool = True
    """Rows the official protocol filters out stay in the file with `valid: false`."""
    group: str = ""
    part: str = ""
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _shape(self) -> Row:
        if len(self.match) != len(self.images) or any(len(line) != len(self.texts) for line in self.match):
            raise ValueError(f"match should be {len(self.images)} × {len(self.texts)} (images × texts)")
        by_text = list(zip(*self.match, strict=True))
        true_or_false = self.match in ([[0]], [[1]])
        if not (true_or_false or any(all({0, 1} <= {*line} for line in lines) for lines in (self.match, by_text))):
            raise ValueError("match should give every picture a right and a wrong text, or every text such pictures")
        return self

    @property
    def pictures(self) -> list[Picture]:
        """Identities of the row's pictures."""
        return [Picture(p.src, p.path, p.bbox) for p in self.images]

    def field(self, name: str) -> str:
        """The value of `category`, `group`, … or `meta.KEY`, as text."""
        if name.startswith("meta."):
            return str(self.meta.get(name.removeprefix("meta."), ""))
        return str(getattr(self, name))


def packaged() -> dict[str, Path]:
    """Name -> file of every benchmark that comes with clipkit."""
    files = [p for folder in data_folders("eval") for p in sorted(folder.glob("*/*.yaml"))]
    return {file.stem: file for file in files}


def load(name: str | Path) -> Benchmark:
    """The benchmark called `name`, or described by the YAML file at that path.

    `base: NAME` in the file names another one (beside it or packaged) whose fields it changes, at most two deep.
    Every problem is reported at once. Raises UserError.
    """
    file = Path(name)
    if not file.is_file():
        known = packaged()
        if str(name) not in known:
            raise UserError(f"no benchmark called {name}{did_you_mean(str(name), known)}")
        file = known[str(name)]
    tree = _with_base(file)
    try:
        benchmark = Benchmark.model_validate(tree)
    except ValidationError as error:
        problems = [f"  {_explain(e, Benchmark)}" for e in error.errors()]
        raise UserError("\n".join([f"{file.name}:", *problems])) from None
    benchmark._origin = file.parent
    return benchmark


def suites(file: str | Path = "") -> dict[str, list[str]]:
    """Suite -> its benchmarks and suites, of a suites file or of the packaged `eval/suites.yaml`."""
    files = [Path(file)] if file else [p / "suites.yaml" for p in data_folders("eval") if (p / "suites.yaml").is_file()]
    return {name: members for path in files for name, members in _read(path).items()}


def suite(name: str) -> list[str]:
    """Benchmark names of a packaged suite (a suite may name suites) or of one in a suites file, `FILE:NAME`.

    Raises UserError.
    """
    if name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: a suite in a file is written FILE:NAME{did_you_mean('', suites(name))}")
    file, _, wanted = name.rpartition(":")
    known = suites(file)
    if wanted not in known:
        raise UserError(f"no suite called {wanted}{did_you_mean(wanted, known)}")
    inside = [known.get(member, [member]) for member in known[wanted]]
    return list(dict.fromkeys(name for names in inside for name in names))


def read_rows(benchmark: Benchmark, roots: Roots) -> list[Row]:
    """All rows of a compositional benchmark, pictures resolved to a source. Raises UserError, naming file and line."""
    rows: list[Row] = []
    for reference in benchmark.rows:
        src, path = split_reference(reference)
        if not src:
            src = f"./{benchmark.name}"
            roots.bind(src, benchmark.folder or Path())
        data = roots.read(src, path)
        expected = benchmark.sha256.get(reference)
        if expected and hashlib.sha256(data).hexdigest() != expected:
            raise UserError(f"{reference} is not the version this benchmark describes (SHA-256 differs)")
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
        lines = [line for line in text.splitlines() if line.strip()]
        rows += [_row(line, f"{reference} line {n}", src, path, benchmark) for n, line in enumerate(lines, 1)]
    if not rows:
        raise UserError(f"no rows in {', '.join(benchmark.rows)}")
    repeated = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise UserError(f"{len(repeated)} row ids come more than once, the first is {repeated[0]}")
    return rows


def _row(line: str, where: str, src: str, path: str, benchmark: Benchmark) -> Row:
    try:
        row = Row.model_validate_json(line)
    except ValidationError as error:
        problems = "; ".join(_explain(e, Row) for e in error.errors())
        raise UserError(f"{where}: {problems}") from None
    beside = path.rpartition("/")[0]
    for picture in row.images:
        if not picture.src:
            picture.src, picture.path = src, f"{beside}/{picture.path}".lstrip("/")
    if len(benchmark.rows) > 1:  # files made alike, say of several seeds, number their rows alike
        row.id = f"{beside.rpartition('/')[2] or path}/{row.id}"
    row.texts = [benchmark.prefix + text for text in row.texts]
    row.cluster = row.cluster or f"{row.images[0].src}:{row.images[0].path}"
    return row


def _with_base(file: Path, depth: int = 0) -> dict[str, Any]:
    tree = _read(file)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if depth == 2:
        raise UserError(f"{file}: base: {base} would be three deep; two is the limit")
    beside = file.parent / f"{base}.yaml"
    return _with_base(beside if beside.is_file() else packaged().get(base, beside), depth + 1) | tree


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a readable YAML file: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: should hold fields (key: value), found {type(tree).__name__}")
    return tree


def _explain(error: Any, model: type[Section]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{path}: is missing"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}".removeprefix(": ")
    if error["type"] != "extra_forbidden":
        return explain(error)
    inner = (Source, Mean, Official, Reference, Download, PictureReference, Corruptions, Attack)
    names = model.model_fields if len(error["loc"]) == 1 else {n for section in inner for n in section.model_fields}
    return f"{path}: no such field{did_you_mean(str(error['loc'][-1]), names)}"
