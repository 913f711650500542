"""Answers as a page to look at: of every class the surest pictures and the least sure ones, as thumbnails."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from clipkit.data.shards import write_atomic
from clipkit.errors import UserError
from clipkit.evaluation.zeroshot import load_picture
from clipkit.html import Html, document, el

SHOWN = 12
"""Pictures of a class on either end."""
THUMBNAIL = 256
"""Longest side in pixels: twice what is shown, for screens with fine pixels."""
Entry = tuple[float, int, dict[str, Any]]


@dataclass
class Group:
    """The pictures of one class: how many, and those on both ends."""

    count: int = 0
    surest: list[Entry] = field(default_factory=list)
    doubtful: list[Entry] = field(default_factory=list)

    def add(self, sure: float, place: int, row: dict[str, Any]) -> None:
        """One more picture; only those on the ends are kept. Of equal ones the first."""
        self.count += 1
        for kept, key in ((self.surest, sure), (self.doubtful, -sure)):
            heapq.heappush(kept, (key, -place, row))
            if len(kept) > SHOWN:
                heapq.heappop(kept)

    def ends(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The surest, best first, and the least sure, worst first, that are not among them."""
        surest = [row for _, _, row in sorted(self.surest, reverse=True)]
        shown = {row["image"] for row in surest}
        doubtful = [row for _, _, row in sorted(self.doubtful, reverse=True)]
        return surest, [row for row in doubtful if row["image"] not in shown]


def write_gallery(rows: Iterable[dict[str, Any]], file: Path, about: str) -> dict[str, int]:
    """Write the page of answers ({"image", "classes"}, as `classify` and `read_answers` give them).

    Memory grows with the number of classes alone. Returns pictures, classes and what could not be read.
    """
    groups: dict[str, Group] = {}
    unreadable, places = 0, count()
    for row in rows:
        if not row["classes"]:
            unreadable += 1
            continue
        best = row["classes"][0]
        groups.setdefault(best["class"], Group()).add(best["probability"], next(places), row)
    ordered = sorted(groups.items(), key=lambda item: (-item[1].count, item[0]))
    total = sum(group.count for group in groups.values())
    said = f"{total:,} pictures, taken for {len(groups)} {'class' if len(groups) == 1 else 'classes'}. {about}"
    header = el(
        "header",
        el("h1", "What the pictures show"),
        el("p", said, class_="quiet"),
        el("p", f"{unreadable:,} pictures could not be read.") if unreadable else None,
    )
    nav = el("nav", el("ul", (el("li", el("a", name, href=f"#c{n}")) for n, (name, _) in enumerate(ordered))))
    body = el("main", nav, [_section(n, name, group) for n, (name, group) in enumerate(ordered)])
    style = (resources.files("clipkit.evaluation") / "gallery.css").read_text()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, document("What the pictures show: clipkit", [header, body], style=style).encode())
    return {"pictures": total, "classes": len(groups), "unreadable": unreadable}


def _section(number: int, name: str, group: Group) -> Html:
    surest, doubtful = group.ends()
    return el(
        "section",
        el("h2", f"{name} ", el("small", f"{group.count:,}")),
        el("h3", "surest") if doubtful else None,
        el("div", map(_card, surest), class_="pictures"),
        el("h3", "least sure") if doubtful else None,
        el("div", map(_card, doubtful), class_="pictures") if doubtful else None,
        id=f"c{number}",
    )


def _card(row: dict[str, Any]) -> Html:
    best, *others = row["classes"]
    name = row["image"].encode(errors="replace").decode()
    second = f"then {others[0]['class']} {_share(others[0])}" if others else ""
    source = _thumbnail(row["image"])
    return el(
        "figure",
        el("img", src=source, alt=f"{name}: {best['class']}", loading="lazy") if source else el("p", "gone"),
        el(
            "figcaption",
            el("b", _share(best)),
            f" {second}",
            el("span", "/".join(Path(name).parts[-2:]), class_="name", title=name),
        ),
    )


def _share(one: dict[str, Any]) -> str:
    return f"{100 * one['probability']:.0f}\u00a0%"


def _thumbnail(name: str) -> str:
    """As a data URI; empty where the picture is not there any more."""
    try:
        image = load_picture(Path(name))
    except UserError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
