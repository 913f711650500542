from __future__ import annotations

import json
import subprocess
import sys

import pytest

import clipkit

HEAVY = {"torch", "torchvision", "numpy", "PIL", "open_clip", "timm", "webdataset", "accelerate", "deepspeed"}
HEAVY |= {"transformers", "matplotlib", "textblob", "nltk", "yaml", "rich"}


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    ask = (
        f"import sys, json, io\n{code}\nprint('\\n' + json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    )
    out = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_importing_clipkit_imports_nothing_heavy() -> None:
    assert imported_by("import clipkit") & (HEAVY | {"typer", "pydantic"}) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["shards", "build", "--help"], ["eval", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    call = f"import clipkit.cli\nsys.argv = ['clipkit', *{arguments}]\ntry: clipkit.cli.main()\nexcept SystemExit: pass"
    found = imported_by(call)
    assert "typer" in found
    assert found & HEAVY == set()
    if len(arguments) == 1:  # typer looks for pydantic types among the arguments of a command
        assert "pydantic" not in found


def test_reading_a_config_imports_no_torch() -> None:
    assert "torch" not in imported_by("import clipkit.config")


def test_checking_a_start_imports_no_torch() -> None:
    assert "torch" not in imported_by("import clipkit.model.spec")


def test_public_names_are_there() -> None:
    assert set(clipkit.__all__) == {
        "Config",
        "Embeddings",
        "data",
        "evaluate",
        "load",
        "objective",
        "train",
        "zeroshot",
    }
    for name in clipkit.__all__:
        assert getattr(clipkit, name) is not None
    assert set(clipkit.__all__) <= set(dir(clipkit))
    assert clipkit.objective.TERMS["infonce"] is not None
    assert clipkit.data.Plan is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Embedings'"):
        clipkit.Embedings  # type: ignore[attr-defined]  # noqa: B018
