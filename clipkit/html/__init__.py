"""HTML from nested calls. Text is escaped unless it is `Html` already, so nothing from data can become markup.

`document` is the frame of every page that clipkit writes: one file that loads nothing, in the house's style (page.css).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib import resources

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


def document(title: str, body: Child, *, style: str = "", script: str = "") -> str:
    """A whole page. `style` follows the house's own; `script` is trusted, and the only one that may run."""
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("link", rel="icon", href="data:,"),
        el("style", Html((resources.files("clipkit.html") / "page.css").read_text() + style)),
    ]
    ours = el("script", Html(script)) if script else None
    return f"<!doctype html>\n{el('html', el('head', head), el('body', body, ours), lang='en')}\n"


def _policy(script: str) -> str:
    """Nothing is loaded from anywhere, and no script runs but ours."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


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
