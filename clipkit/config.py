"""One validated config: pydantic + YAML + `key=value`. Every problem is reported at once, with its dotted path.

`batch_size` is the *global* number of pairs; durations are in samples; times end in `_s`, sizes in `_bytes`.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from clipkit.checks import cross_check
from clipkit.errors import UserError, did_you_mean
from clipkit.registry import TERMS
from clipkit.settings import (
    AdversaryConfig,
    Count,
    DataConfig,
    EngineConfig,
    GuardConfig,
    ModelConfig,
    OptimConfig,
    Positive,
    Section,
    StopConfig,
    TeacherConfig,
)


class Config(Section):
    """A whole run."""

    name: str = "run"
    out: str = "runs/{name}"
    """Run folder; `{name}` and `{seed}` are filled in, also in `mirror`."""
    seed: Count = 0
    batch_size: Positive = 256
    """Global number of pairs a step."""
    samples: Positive = 100_000
    """Length of the run."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: dict[str, dict[str, Any]] = {"infonce": {}}
    """Terms by name, each with `weight` (default 1) and the term's own settings."""
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    log_every: Positive = 10
    """Steps between two lines of the log."""
    log_samples: bool = False
    """Write every step's sample ids to samples.jsonl, in the order of the global batch."""
    save_every: Count = 0
    """Samples between two checkpoints; 0: only at the end."""
    save_minutes: float = Field(default=0.0, ge=0.0)
    """Minutes after the last checkpoint (or the start) when another is due too, by the first rank's clock; 0: never."""
    save_async: bool = True
    """Write checkpoints while training goes on, from a copy in the main rank's memory."""
    save_form: Literal["full", "sharded"] = "full"
    """`full`: the main rank writes whole tensors; `sharded`: each rank what it holds, or an equal share, not gathered.
    Any engine and number of ranks, and `clipkit.load`, read both."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Count = 0
    """Samples after which another checkpoint stays for good, the first that is saved then; 0: none does."""
    mirror: str = ""
    """Folder or URL (s3://, gs://, ...) that every checkpoint is copied to, and from where a lost run resumes."""
    evaluate_every: Count = 0
    """Samples between two evaluations while training, the last of them at the end; 0: none."""
    suite: str = ""
    """Benchmarks run by the evaluation hook: a suite of eval/suites.yaml, or FILE:NAME of another such file."""
    stop: StopConfig = StopConfig()
    roots: dict[str, str] = {}
    """Where benchmark sources lie: `source: path`."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.samples // self.batch_size)

    @property
    def run_folder(self) -> Path:
        """Where the run keeps everything."""
        return Path(self.filled(self.out))

    @property
    def mirror_url(self) -> str:
        """Folder or URL that its checkpoints are copied to; empty: nowhere."""
        return self.filled(self.mirror)

    def filled(self, place: str) -> str:
        """`out` or `mirror` with the run's own name and seed. Raises what `str.format` does where it holds others."""
        return place.format(name=self.name, seed=self.seed)


def data_folders(folder: str) -> list[Path]:
    """Where packaged YAML lies: inside the installed wheel, or beside the package in a checkout."""
    packaged = Path(str(resources.files("clipkit"))) / "_data" / folder
    return [packaged, Path(__file__).parent.parent / folder]


def find_data_file(name: str, folder: str) -> Path:
    """`name` as given, else the copy packaged under `folder` (configs or eval), with or without .yaml."""
    given = Path(name)
    if given.is_file():
        return given
    roots = data_folders(folder)
    for root in roots:
        for candidate in (root / name, root / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    valid = {p.relative_to(r).with_suffix("").as_posix() for r in roots if r.is_dir() for p in r.rglob("*.yaml")}
    raise UserError(f"{name}: no such file, here or among the packaged {folder}{did_you_mean(name, valid)}")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML config with its `base`, apply `key=value` overrides, validate everything at once."""
    file = find_data_file(str(path), "configs")
    tree = _read(file, depth=0)
    for item in overrides:
        _override(tree, item)
    return validate(tree, origin=file.name)


def validate(tree: dict[str, Any], origin: str = "config") -> Config:
    """A checked Config, or one UserError listing every problem with its dotted path."""
    problems: list[str] = []
    config: Config | None = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [explain(e) for e in error.errors()]
    objective = tree.get("objective", Config.model_fields["objective"].default)
    if isinstance(objective, dict):
        problems += _check_objective(objective)
    if config and not problems:
        problems += cross_check(config)
    if problems:
        raise UserError(f"{origin}:\n" + "\n".join(f"  {p}" for p in problems))
    assert config is not None
    return config


def schema() -> dict[str, Any]:
    """JSON schema of a config file, terms included."""
    tree = Config.model_json_schema()
    terms = {}
    for name in TERMS:
        entry = TERMS.entry(name)
        properties: dict[str, Any] = {"weight": {"type": "number", "default": 1.0}}
        for key, parameter in entry.settings.items():
            properties[key] = TypeAdapter(parameter.annotation).json_schema() | {"default": parameter.default}
        terms[name] = {
            "type": "object",
            "description": entry.summary,
            "properties": properties,
            "additionalProperties": False,
        }
    tree["properties"]["objective"] |= {"properties": terms, "additionalProperties": False}
    tree["properties"]["base"] = {"type": "string", "description": "The one config this one builds on."}
    return tree


def dump(config: Config) -> str:
    """The resolved config as YAML; loading it again gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(file: Path, depth: int) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: should hold settings (key: value), found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if depth == 2:
        raise UserError(f"{file}: base: {base} would be three deep; two is the limit")
    beside = file.parent / f"{base}"
    parent = beside if beside.is_file() else find_data_file(str(base), "configs")
    return _merge(_read(parent, depth + 1), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on `base`, section by section; a term set to null is dropped."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _merge(out[key], value)
        elif value is None and isinstance(out.get(key), dict):
            del out[key]
        else:
            out[key] = value
    return out


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"{item!r}: overrides are written key=value, e.g. optim.lr=1e-3")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"{key}: {section} is a single value, it has no setting {leaf}")
        node = child
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    if value is None and isinstance(node.get(leaf), dict):
        del node[leaf]
    elif isinstance(value, dict) and isinstance(node.get(leaf), dict):
        node[leaf] = _merge(node[leaf], value)
    else:
        node[leaf] = value


_WORDING = (
    ("int_parsing|int_type|int_from_float", "should be a whole number"),
    ("float_parsing|float_type", "should be a number"),
    ("bool_parsing|bool_type", "should be true or false"),
    ("string_type", "should be a text"),
    ("list_type|tuple_type", "should be a list"),
    ("dict_type|model_type|model_attributes_type", "should be a group of settings"),
)


def explain(error: Any) -> str:
    """One pydantic error in the house's words: dotted path, what it should be, what was found."""
    path = ".".join(str(part) for part in error["loc"])
    found = error["input"]
    shown = f'"{found}"' if isinstance(found, str) else repr(found)
    if error["type"] == "extra_forbidden":
        names = _names_at(error["loc"][:-1])
        return f"{path}: no such setting{did_you_mean(str(error['loc'][-1]), names)}"
    for pattern, wording in _WORDING:
        if re.fullmatch(pattern, error["type"]):
            return f"{path}: {wording}, got {shown}"
    message = error["msg"].replace("Input s", "s")
    return f"{path}: {message}, got {shown}"


def _names_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        if get_origin(model) is dict:
            model = get_args(model)[1]
        else:
            model = model.model_fields[part].annotation
    return [*model.model_fields, *(["base"] if model is Config else [])]


def _check_objective(objective: dict[str, Any]) -> list[str]:
    problems = []
    for name, settings in objective.items():
        path = f"objective.{name}"
        if name not in TERMS:
            problems.append(f"{path}: no such setting{did_you_mean(name, TERMS)}")
            continue
        if not isinstance(settings, dict):
            problems.append(f"{path}: should be a group of settings, got {settings!r}")
            continue
        known = TERMS.entry(name).settings
        for key, value in settings.items():
            if key == "weight":
                annotation: Any = float
            elif key in known:
                annotation = known[key].annotation
            else:
                problems.append(f"{path}.{key}: no such setting{did_you_mean(key, ['weight', *known])}")
                continue
            try:
                settings[key] = TypeAdapter(annotation).validate_python(value)
            except ValidationError as error:
                problems += [f"{path}.{explain(e | {'loc': (key, *e['loc'])})}" for e in error.errors()]
    return problems
