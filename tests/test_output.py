"""What commands are given and what they print, apart from any command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clipkit.commands import arguments, output
from clipkit.errors import UserError


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    assert arguments.pairs(["a=b=c", "*=d"], "--root") == {"a": "b=c", "*": "d"}
    assert arguments.pairs(None, "--root") == {}
    with pytest.raises(UserError, match="--root x=: is written NAME=VALUE"):
        arguments.pairs(["x="], "--root")


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    output.write_json({"a": "ü"}, str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    with pytest.raises(TypeError):
        output.write_json({"a": object()}, str(path))
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_table_on_a_terminal_is_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["name", "n"], [["a[b]", 1]])
    assert capsys.readouterr().out == "name\tn\na[b]\t1\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.print_table(["name", "n"], [["a[b]", 1]], "Title")
    shown = capsys.readouterr().out
    assert "Title" in shown and "a[b]" in shown and "\t" not in shown


def test_ranks_say_the_same_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own file in the folder of their start; without a launcher everything is said."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert output.says_first("a") and output.says_first("a")
    said = []
    for rank in range(3):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        said.append((output.says_first("a"), output.says_first(f"b{rank}")))
    assert said == [(True, True), (False, True), (False, True)]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/no/such/folder/0/error.json")
    assert output.says_first("a") and output.says_first("a")
