"""A miniature of the Abstract Scenes data with pieces of plain colour, so that its reader is tested everywhere."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

COLOURS = {"s_3s.png": "yellow", "s_1s.png": "white", "hb0_0s.png": "blue", "p_0s.png": "green", "t_0s.png": "red"}
BACKGROUND = "gray"
SUN = "s_3s.png,0,3,0,100,50,0,0"
CLOUD = "s_1s.png,0,1,0,100,50,1,0"
BOY = "hb0_0s.png,0,0,2,250,200,0,0"
TREE_FAR = "p_0s.png,0,0,1,250,200,2,0"
BALL_UNUSED = "t_0s.png,0,0,7,-10000,-10000,0,0"

SAID = ["hello", "a boy is in front of the tree .", "the sun is on the left side , ok ? thanks", "move the tree up"]


def records() -> list[dict]:
    """Six scenes: two to train on, one val, two of a minimal pair (one of them in the train split), one test."""
    scene = ",".join(["4", CLOUD, SUN, BOY, TREE_FAR])
    plan = [(0, "train"), (1, "train"), (2, "val"), (3, "train"), (4, "val"), (5, "test")]
    return [
        {"image_id": n, "split": split, "scene": scene, "messages": SAID, "in_minimal_pairs": n == 5}
        for n, split in plan
    ]


def write_scenes(path: Path, pairs: Sequence[tuple[int, int]] = ((3, 4),), distractor: str = "mike sits") -> Path:
    """The miniature as a tar in the layout of the shared one, with minimal pairs of these scenes."""
    lines = "\n".join(json.dumps(record) for record in records()).encode()
    table = ["img_id,target_sentence,distractor_sentence"]
    for a, b in pairs:
        table += [f"{a},mike runs,{distractor}", f"{b},mike sits,mike runs"]
    csv = "\n".join(table).encode()
    members = {"scenes.jsonl.gz": gzip.compress(lines), "minimal_pairs/semantics_eval_verbs.csv": csv}
    members["Pngs/background.png"] = _png(BACKGROUND, (500, 400))
    members |= {f"Pngs/{name}": _png(colour, (100, 60)) for name, colour in COLOURS.items()}
    return write_tar(path, members)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar with these members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _png(colour: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "PNG")
    return buffer.getvalue()
