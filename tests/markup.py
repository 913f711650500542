"""Pages under test: a parser that is strict about them, and a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "br", "col"}
FRAME = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe src="checked.html" style="border:0;width:{width}px;height:900px"></iframe>
<script>
addEventListener("message", (e) => {{ document.documentElement.dataset.found = JSON.stringify(e.data); }});
</script>
"""


class Markup(HTMLParser):
    """Checks that elements close as they opened; keeps what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def browse(page: Path, checks: str, folder: Path, width: int, *options: str) -> str:
    """Chromium's output for the page with our checks inside, in a frame of the width (windows have a least one)."""
    policy = "script-src &#x27;unsafe-inline&#x27;"
    text = re.sub(r"script-src &#x27;.*?&#x27;", policy, page.read_text()).replace('loading="lazy"', "")
    (folder / "checked.html").write_text(text.replace("</body>", f"<script>{checks}</script></body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-sync", *quiet.split(), *options]
    profile = f"--user-data-dir={folder / 'profile'}"
    log = ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000", "--window-size=1400,900"]
    address = (folder / "frame.html").as_uri()
    done = subprocess.run([*command, profile, *log, address], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
