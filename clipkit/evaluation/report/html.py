"""HTML from nested calls. Text is escaped unless it is `Html` already, so nothing from data can become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"br", "col", "img", "link", "meta"}


class Html(str):
    """Text that is markup."""


Child = str | None | Iterable["Child"]
Attribute = str | float | bool | None


def el(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element. `class_="a"` is class, `data_x` is data-x; an attribute that is None or False is left out."""
    start = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Html(start if name in VOID else f"{start}{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after the other, without an element around them."""
    return Html("".join(_child(child) for child in children))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    return escape(child) if isinstance(child, str) else join(*child)


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
