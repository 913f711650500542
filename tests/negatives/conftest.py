"""A server to ask, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clipkit.data.shards import Index
from clipkit.negatives import asking, llm
from clipkit.negatives.llm import Wish, ask
from tests.chat import ChatServer, chatting

DESCRIPTIONS = ["long_description", "short_description", "long_negative", "short_negative", "tags", "false_tags"]
"""HQ-CLIP's kinds."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(asking, "PAUSE_S", 0.01)
    monkeypatch.delenv(llm.KEY, raising=False)
    with chatting() as running:
        yield running


def asked(shards: Path, out: Path, server: ChatServer, wish: Wish | None = None, **settings: Any) -> llm.Asked:
    return ask(shards, out, wish or Wish("m"), url=server.url, progress=False, **settings)


def sheets(path: Path) -> list[dict[str, Any]]:
    index = Index.load(path)
    return [json.loads(index.read(id)["json"]) for id in range(len(index))]
