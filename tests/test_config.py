from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit import config as configuration
from clipkit.config import Config
from clipkit.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        configuration.load(path, overrides)
    return str(caught.value)


# the packaged configs


def test_every_packaged_config_is_found() -> None:
    methods = {
        "clip",
        "siglip",
        "lit",
        "negclip",
        "degla",
        "debug",
        "ce_clip",
        "fsc_clip",
        "diht",
        "tcl",
        "cwcl",
        "gist",
    }
    assert methods <= {Path(file).stem for file in FILES}


@pytest.mark.parametrize("file", FILES)
def test_every_config_loads_by_name_and_comes_back_from_its_dump(file: str, tmp_path: Path) -> None:
    config = configuration.load(file.removesuffix(".yaml"))
    again = write(tmp_path, "again.yaml", configuration.dump(config))
    assert configuration.load(again) == config
    assert config.steps > 0


@pytest.mark.parametrize("file", FILES)
def test_every_config_begins_with_what_it_is(file: str) -> None:
    first = (CONFIGS / file).read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20
    if "/" not in file and not file.startswith("debug"):
        assert "arXiv" in first, f"{file}: the first line names the method's arXiv id"


@pytest.mark.parametrize("file", FILES)
def test_no_config_repeats_a_default_or_its_base(file: str) -> None:
    tree = yaml.safe_load((CONFIGS / file).read_text())
    base = tree.pop("base", None)
    below = configuration.load(base) if base else Config()
    repeated = [path for path, value in leaves(tree) if equal(at(below, path), value)]
    assert repeated == []


def leaves(tree: dict[str, Any], *above: str) -> list[tuple[tuple[str, ...], Any]]:
    """(path, value) of all settings; the free-form groups count as one."""
    out: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        path = (*above, key)
        free = {("objective",), ("roots",), ("model", "image", "cfg"), ("data", "caption_kinds")}
        whole = path in free or not isinstance(value, dict)
        out += [(path, value)] if whole else leaves(value, *path)
    return out


def at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def equal(default: Any, value: Any) -> bool:
    return default == (tuple(value) if isinstance(default, tuple) else value)


# one message for a file and the command line


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("optim.wramup", "5", "optim.wramup: no such setting; did you mean warmup?"),
        ("optim.warmup", "soon", 'optim.warmup: should be a whole number, got "soon"'),
        ("batchsize", "5", "batchsize: no such setting; did you mean batch_size?"),
        ("optim.lr", "inf", 'optim.lr: should be a finite number, got "inf"'),
        ("optim.weight_decay", ".nan", "optim.weight_decay: should be a finite number, got nan"),
        ("data.on_error", "ignore", "data.on_error: should be 'raise' or 'skip', got \"ignore\""),
        ("model.image.sise", "5", "model.image.sise: no such setting; did you mean size?"),
        ("objective.infonse", "{}", "objective.infonse: no such setting; did you mean infonce?"),
        ("objective.tgc.scael", "5", "objective.tgc.scael: no such setting; did you mean scale?"),
        ("objective.infonce.weight", "much", 'objective.infonce.weight: should be a number, got "much"'),
    ],
)
def test_a_mistake_reads_the_same_from_both_sides(tmp_path: Path, setting: str, value: str, expected: str) -> None:
    *above, leaf = setting.split(".")
    text = f"{leaf}: {value}"
    for name in reversed(above):
        text = f"{name}: {{{text}}}"
    from_file = message(write(tmp_path, "x.yaml", text))
    from_line = message(write(tmp_path, "x.yaml", ""), f"{setting}={value}")
    assert from_file == from_line
    assert from_line.splitlines() == ["x.yaml:", f"  {expected}"]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", "optim: {warmup: soon}\nobjective: {infonse: {}}\nsed: 1\n")
    lines = message(path, "batch_size=0").splitlines()
    assert lines[0] == "x.yaml:"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "optim.warmup", "objective.infonse", "sed", "batch_size",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("objective: {igc: {}}", "objective.igc needs data.negatives ≥ 1, got 0"),
        ("objective: {distill: {}}", "objective.distill needs teacher.kind: ema, frozen or precomputed, got none"),
        ("objective: {amcl: {}}", "objective.amcl needs model.heads.aspects.count ≥ 1, got 0"),
        ("objective: {siglip: {}}", "objective.siglip needs model.bias (a number, e.g. -10), got none"),
        (
            "objective: {triplet: {}}\ndata: {negatives: 2, negative_images: 1}",
            "objective.triplet needs data.negative_images: 2 (a picture for each of data.negatives), got 1",
        ),
        ("objective: {}", "objective: needs at least one term"),
        (
            "engine: {kind: deepspeed, precision: fp16}",
            "engine.precision: fp16 is scaled by deepspeed's own rules, which no checkpoint keeps; use bf16",
        ),
        (
            "engine: {precision: fp16}\nadversary: {eps: 1}",
            "engine.precision: fp16 has no numbers for the gradients at pixels of adversary.eps; use bf16",
        ),
        (
            "engine: {compile: true, kind: fsdp}",
            "engine.compile: fsdp and zero_stage: 3 gather weights inside of towers; use ddp or zero_stage: 2",
        ),
        (
            "engine: {compile: true, accumulate: 2}",
            "engine.compile: compiled dropout need not draw the same in both passes of engine.accumulate; "
            "use accumulate: 1",
        ),
        (
            "engine: {compile: true, checkpoint_activations: true}",
            "engine.compile: decides by itself what is computed again; use checkpoint_activations: false",
        ),
        (
            "engine: {compile: true}\nobjective: {fsc_local: {}}\ndata: {negatives: 1}",
            "engine.compile: objective.fsc_local reads inside of towers, past what is compiled; "
            "leave one of the two out",
        ),
        ("engine: {zero_stage: 2}", "engine.zero_stage: belongs to engine.kind: deepspeed, got ddp"),
        (
            "engine: {kind: deepspeed, zero_stage: 3}\nmodel: {lock_text: true}",
            "engine.zero_stage: 3 divides locked towers, which student and teacher share; use engine.kind: fsdp",
        ),
        (
            "engine: {kind: deepspeed, zero_stage: 3}\nadversary: {eps: 1}",
            "engine.zero_stage: 3 has no weights outside of its forward, adversary.eps needs them; "
            "use engine.kind: fsdp",
        ),
        (
            "engine: {kind: deepspeed, zero_stage: 3}\nobjective: {fsc_local: {}}\ndata: {negatives: 1}",
            "engine.zero_stage: 3 gathers weights for whole towers, objective.fsc_local reads inside of them; "
            "use engine.kind: fsdp",
        ),
        ("samples: 10", "samples: 10 is less than one batch (256)"),
        (
            "adversary: {eps: 1}\nmodel: {lock_image: true}",
            "adversary.eps: a locked image tower learns nothing from moved pictures; model.lock_image: false",
        ),
        ("evaluate_every: 10", "evaluate_every needs suite: which benchmarks to run"),
        (
            "data: {cache_image_features: true, augment: none}",
            "data.cache_image_features needs model.lock_image: true (features of a learning tower change)",
        ),
        (
            "data: {cache_image_features: true, augment: none, decode: scaled}\nmodel: {lock_image: true}",
            "data.cache_image_features needs data.decode: exact (each picture is decoded once)",
        ),
    ],
)
def test_combinations_that_cannot_be_right(tmp_path: Path, text: str, expected: str) -> None:
    assert message(write(tmp_path, "x.yaml", text)).splitlines() == ["x.yaml:", f"  {expected}"]


# base, overrides, files


def test_a_file_stands_on_its_base_and_drops_its_terms(tmp_path: Path) -> None:
    write(tmp_path, "ground.yaml", "seed: 3\noptim: {lr: 0.1, warmup: 7}\nobjective: {infonce: {}, siglip: {}}")
    path = write(tmp_path, "x.yaml", "base: ground.yaml\noptim: {lr: 0.2}\nobjective: {siglip: null}")
    config = configuration.load(path)
    assert (config.seed, config.optim.lr, config.optim.warmup) == (3, 0.2, 7)
    assert config.objective == {"infonce": {}}


def test_infinity_comes_back_from_a_dump(tmp_path: Path) -> None:
    """SupCon is tcl with log_k1: -.inf."""
    config = configuration.load("tcl", ["objective.tcl.log_k1=-.inf"])
    assert config.objective["tcl"] == {"log_k1": float("-inf")}
    assert configuration.load(write(tmp_path, "again.yaml", configuration.dump(config))) == config
    assert "objective.tcl.log_k1: " in message("tcl", "objective.tcl.log_k1=.inf")


def test_bases_go_two_deep_and_no_deeper(tmp_path: Path) -> None:
    for name, base in (("a", None), ("b", "a"), ("c", "b"), ("d", "c")):
        write(tmp_path, f"{name}.yaml", f"base: {base}.yaml" if base else "seed: 5")
    assert configuration.load(tmp_path / "c.yaml").seed == 5
    assert "three deep; two is the limit" in message(tmp_path / "d.yaml")


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", "data: {negatives: 2}\nobjective: {infonce: {}, igc: {}}")
    config = configuration.load(path, ["optim.lr=1e-3", "data.train=[a.tar,b.tar]", "objective.igc.weight=0.5"])
    assert config.optim.lr == 1e-3 and config.data.train == ["a.tar", "b.tar"]
    assert config.objective == {"infonce": {}, "igc": {"weight": 0.5}}
    assert configuration.load(path, ["objective.infonce=null"]).objective == {"igc": {}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "overrides are written key=value"),
        ("seed.deep=1", "seed is a single value"),
    ],
)
def test_an_override_that_is_none(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(write(tmp_path, "x.yaml", "seed: 1"), override)


def test_a_file_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    assert "did you mean degla" in message("deglo")
    assert "not valid YAML" in message(write(tmp_path, "x.yaml", "a: [1"))
    assert "should hold settings" in message(write(tmp_path, "x.yaml", "- 1"))


def test_steps_and_folder() -> None:
    config = Config(name="a", out="runs/{name}-{seed}", seed=2, samples=1000, batch_size=256)
    assert config.steps == 4
    assert config.run_folder == Path("runs/a-2")


def test_the_schema_names_every_setting_and_term(tmp_path: Path) -> None:
    schema = configuration.schema()
    assert set(schema["properties"]) == {*Config.model_fields, "base"}
    terms = schema["properties"]["objective"]
    assert terms["additionalProperties"] is False
    assert terms["properties"]["tgc"]["properties"]["scale"]["default"] == 10.0
    assert "a rank" in schema["$defs"]["DataConfig"]["properties"]["workers"]["description"]
