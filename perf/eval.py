"""Evaluation against its usual arrangement: CPU seconds in one process, the same weights, the same decisions.

    SugarCrepe    its released script: a picture, its caption and the negative at a time, every text 77 tokens long;
                  against `clipkit.evaluate`, everything included (intervals, blind baselines, examples)
    classifier    open_clip's zero-shot builder, ten classes at a time; against clipkit's; ImageNet's names, 80 prompts

The suite has SugarCrepe's shape: 4.8 rows and 2.8 captions a picture, 14 tokens a text, JPEGs of 640 x 480.

python perf/eval.py [--small]     prints, and writes perf/results/eval.json (not with --small)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from startup import processor
from step import WORDS

import clipkit
from clipkit.evaluation import zeroshot
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.roots import Roots
from clipkit.model.dual_encoder import DualEncoder

RESULT = Path(__file__).parent / "results" / "eval.json"
NAME = "ViT-B-32"
ROWS_OF_PICTURES = (5, 5, 5, 5, 4)
CAPTIONS_OF_PICTURES = (3, 3, 3, 3, 2)
Clock = dict[str, float]


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Adds the CPU and wall seconds of the block to `clock`."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    clock["cpu_s"] = clock.get("cpu_s", 0.0) + time.process_time() - cpu
    clock["wall_s"] = clock.get("wall_s", 0.0) + time.perf_counter() - wall


def models() -> tuple[DualEncoder, Any]:
    """clipkit's and open_clip's, with the same random weights."""
    torch.manual_seed(0)
    mine = clipkit.load(NAME, "cpu")
    peer = open_clip.create_model(NAME, force_custom_text=True).eval()
    peer.visual.load_state_dict(mine.image_tower.state_dict())
    peer.text.load_state_dict(mine.text_tower.state_dict())
    return mine, peer


def write_suite(folder: Path, pictures: int) -> list[dict[str, Any]]:
    """JPEGs, rows and the YAML file of a benchmark; returns the rows."""
    draw, words = np.random.default_rng(0), WORDS.split()

    def sentence() -> str:
        return " ".join(draw.choice(words, draw.integers(9, 17)))

    rows = []
    for number in range(pictures):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        captions = [sentence() for _ in range(CAPTIONS_OF_PICTURES[number % 5])]
        for k in range(ROWS_OF_PICTURES[number % 5]):
            texts = [captions[k % len(captions)], sentence()]
            row = {"id": f"{number}/{k}", "images": [{"path": f"{number}.jpg"}], "texts": texts, "match": [[1, 0]]}
            rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"name": "suite", "kind": "compositional", "version": "1", "title": "suite", "rows": ["rows.jsonl"]}
    (folder / "suite.yaml").write_text(json.dumps(about))
    return rows


@torch.no_grad()
def one_by_one(peer: Any, transform: Callable[..., Any], folder: Path, rows: list[dict[str, Any]]) -> list[bool]:
    """SugarCrepe's main_eval.py: for each row, whether its caption is nearer than the negative."""
    found = []
    for row in rows:
        picture = transform(Image.open(folder / row["images"][0]["path"]).convert("RGB"))
        image = peer.encode_image(picture[None], normalize=True)
        texts = [peer.encode_text(open_clip.tokenize([text]), normalize=True) for text in row["texts"]]
        right, wrong = (float(image @ text.T) for text in texts)
        found.append(right > wrong)
    return found


def sugarcrepe(mine: DualEncoder, peer: Any, pictures: int) -> dict[str, float]:
    """The suite both ways, twice in turn: half of its rows one by one, then all of it by clipkit."""
    with tempfile.TemporaryDirectory() as name:
        folder, theirs, ours = Path(name), Clock(), Clock()
        rows = write_suite(folder, pictures)
        transform = open_clip.image_transform(224, is_train=False)
        decisions: list[bool] = []
        one_by_one(peer, transform, folder, rows[:1])
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            with timed(theirs):
                decisions += one_by_one(peer, transform, folder, half)
            with timed(ours):
                (result,) = clipkit.evaluate(mine, benchmarks=[folder / "suite.yaml"], show=False)
    assert [item["correct"] == 1 for item in result.items] == decisions, "other decisions"
    return figures(theirs, {key: value / 2 for key, value in ours.items()}) | {"rows": len(rows), "pictures": pictures}


def classifier(mine: DualEncoder, peer: Any, classes: int) -> dict[str, float]:
    """The classifier both ways, and what each takes 10,000 random pictures for."""
    names, templates = open_clip.IMAGENET_CLASSNAMES[:classes], open_clip.OPENAI_IMAGENET_TEMPLATES
    theirs, ours = Clock(), Clock()
    with timed(theirs):
        their_weights = open_clip.build_zero_shot_classifier(peer, open_clip.tokenize, names, templates, 10, "cpu")
    with timed(ours):
        embedder = Embedder(mine, Roots())
        weights = zeroshot.weights(embedder, [[template(name) for template in templates] for name in names])
    # Around the classes' mean, or one class that leans towards all pictures would win them all.
    mean = weights.mean(0)
    pictures = np.random.default_rng(0).normal(size=(10_000, weights.shape[1])).astype(np.float32)
    taken, their_taken = ((pictures @ (w - mean).T).argmax(1) for w in (weights, their_weights.T.numpy()))
    assert (taken == their_taken).all(), f"{(taken != their_taken).sum()} of {len(taken)} other decisions"
    return figures(theirs, ours) | {"classes": classes, "prompts": classes * len(templates)}


def figures(theirs: Clock, ours: Clock) -> dict[str, float]:
    """Seconds of both and how many times faster clipkit is."""
    named = {
        f"{who} {key}": round(clock[key], 2) for who, clock in (("usual", theirs), ("clipkit", ours)) for key in clock
    }
    return named | {f"ratio of {key[:-2]}": round(theirs[key] / ours[key], 2) for key in theirs}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    torch.set_num_threads(1)  # threads that wait for work of one row at a time count as CPU time, too
    mine, peer = models()
    rows = {"SugarCrepe": sugarcrepe(mine, peer, 5 if small else 40)}
    rows["classifier"] = classifier(mine, peer, 2 if small else 40)
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{column} {value}   " for column, value in row.items()))
    if small:
        return
    result = {
        "date": str(date.today()),
        "hardware": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
        "model": NAME,
    }
    RESULT.write_text(json.dumps(result | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
