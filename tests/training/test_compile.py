"""Compiled towers: the losses of plain ones, and checkpoints that know nothing of it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clipkit import config as configuration
from clipkit.errors import UserError
from clipkit.training.loop import train
from tests.training.runs import losses

COMPILE = nn.Module.compile


def compared(tree: dict) -> None:
    tree = tree | {"samples": 64}
    plain = train(configuration.validate(tree | {"name": "plain"}))
    torch._dynamo.reset()
    compiled = train(configuration.validate(tree | {"name": "compiled", "engine": {"compile": True}}))
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    for name in ("model", "teacher"):
        want, got = (load_file(one / f"checkpoints/step_00000004/{name}.safetensors") for one in (plain, compiled))
        assert want.keys() == got.keys()


def test_the_towers_as_graphs(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and put together by torch.compile, without the compiler's minute; texts are of all lengths."""
    seen: list[str] = []

    def graphs(module: nn.Module) -> None:
        seen.append(type(module).__name__)
        COMPILE(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", graphs)
    compared(tiny_tree)
    assert seen == ["VisionTransformer", "TextTransformer"]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_the_towers_as_code(tiny_tree: dict) -> None:
    compared(tiny_tree)


def test_without_a_compiler_there_is_one_clear_error(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"engine.compile: needs a C\+\+ compiler on CPUs, found none"):
        train(configuration.validate(tiny_tree | {"engine": {"compile": True}}))
