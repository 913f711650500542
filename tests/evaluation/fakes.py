"""Encoders whose scores are known beforehand, and a small benchmark with rows of every form."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray


def picture(number: int, size: int = 12) -> Image.Image:
    """A picture like no other."""
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def name_of(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


class Counting:
    """Remembers what it was asked to embed."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.batches: list[int] = []

    def vector(self, key: str) -> Array:
        raise NotImplementedError

    def _embed(self, keys: list[str]) -> Array:
        self.seen += keys
        self.batches.append(len(keys))
        return np.stack([self.vector(key) for key in keys])

    def embed_images(self, images: list[Image.Image]) -> Array:
        return self._embed([name_of(image) for image in images])

    def embed_texts(self, texts: list[str]) -> Array:
        return self._embed(texts)


class Constant(Counting):
    """The same for everything."""

    def vector(self, key: str) -> Array:
        return np.linspace(0.1, 1.0, 24)


class Random(Counting):
    """Independent directions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def vector(self, key: str) -> Array:
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(size=24)


class Oracle(Counting):
    """Knows which texts are right of which pictures. `truth`: text -> names of its pictures."""

    def __init__(self, truth: dict[str, set[str]]) -> None:
        super().__init__()
        self.truth = truth
        self.place = {name: i for i, name in enumerate(sorted({n for names in truth.values() for n in names}))}

    def vector(self, key: str) -> Array:
        # The last two places: a text that is right of nothing, a picture that nothing is right of.
        out = np.zeros(len(self.place) + 2)
        if key in self.truth:
            out[[self.place[name] for name in self.truth[key]] or -1] = 1.0
        else:
            out[self.place.get(key, -2)] = 1.0
        return out


FORMS: dict[str, list[list[int | None]]] = {
    "pair": [[1, 0]],
    "pair_turned": [[0, 1]],
    "choice": [[0, 0, 1, 0, 0]],
    "two_right": [[1, 0, 1]],
    "unjudged": [[1, 0, None]],
    "pictures": [[0], [1]],
    "winoground": [[1, 0], [0, 1]],
    "three": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "true": [[1]],
    "false": [[0]],
}


def write_benchmark(folder: Path, per_form: int = 6, forms: dict[str, Any] | None = None) -> tuple[Path, Oracle]:
    """Rows of every form with pictures of their own, a YAML file beside them, and who knows all answers."""
    forms, truth, rows = forms or FORMS, {}, []
    (folder / "pictures").mkdir(parents=True)
    number = 0
    for form, match in forms.items():
        for n in range(per_form):
            images = []
            texts = [f"{form} {n} text {t}" for t in range(len(match[0]))]
            truth.update({text: set() for text in texts})
            for line in match:
                picture(number).save(folder / "pictures" / f"{number}.png")
                images.append({"path": f"pictures/{number}.png"})
                for text, right in zip(texts, line):
                    if right == 1:
                        truth[text].add(name_of(picture(number)))
                number += 1
            meta = {"seed": n % 2}
            rows.append({"id": f"{form}/{n}", "category": form, "images": images, "texts": texts, "match": match})
            rows[-1]["meta"] = meta
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        "name: own\nkind: compositional\nversion: '1'\ntitle: every form\nrows: [rows.jsonl]\nbreakdowns: [meta.seed]\n"
    )
    return folder / "own.yaml", Oracle(truth)
