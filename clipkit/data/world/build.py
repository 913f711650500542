"""The world on disk: training shards, unseen pictures for retrieval, and evaluation sets.

    OUT/world.json                        settings, counts, vocabulary, class templates, hashes
    OUT/train-000000.tar ...              pairs: KEY.jpg, KEY.txt, KEY.json {"captions", "group", "scene", "tags"}
    OUT/dev-000000.tar                    unseen pictures, same form, for retrieval
    OUT/eval/{dev,test1,test2,test3}/     dev is for tuning; test sets differ only in their seed
        rows.jsonl                        compositional rows of every category
        scenes.jsonl                      what is truly in each picture of the rows
        pictures/00000.jpg
        zeroshot/{shape,colour,texture,object}/CLASS/000.jpg

Every picture is a function of (seed, set, number) alone, so neither the number of workers nor of pictures matters.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from random import Random
from typing import Any

from clipkit.data.build import Sample, encode_jpeg, write_shards
from clipkit.data.world.draw import draw
from clipkit.data.world.language import captions, tags, vocabulary
from clipkit.data.world.scene import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Scene,
    sample_scene,
    sample_training_scene,
)
from clipkit.data.world.tasks import TASKS, Row, make_row
from clipkit.data.world.variants import variants
from clipkit.errors import UserError

CLASSES: dict[str, dict[str, dict[str, str]]] = {
    "shape": {shape: {"shape": shape} for shape in SHAPES},
    "colour": {colour: {"colour": colour} for colour in COLOURS},
    "texture": {texture: {"texture": texture} for texture in TEXTURES},
    "object": {f"{c} {s}": {"colour": c, "shape": s} for c in COLOURS for s in SHAPES},
}
"""Zero-shot sets: class name -> what the single thing of its pictures looks like."""

_OF_NOUNS = ["a {}", "the {}", "one {}", "there is a {}", "a picture with a {}"]
_OF_ADJECTIVES = ["a {} shape", "there is a {} shape", "a picture with a {} shape", "an image showing a {} shape"]
TEMPLATES = {"shape": _OF_NOUNS, "object": _OF_NOUNS, "colour": _OF_ADJECTIVES, "texture": _OF_ADJECTIVES}

_EVAL_KINDS = {"pair": 0.5, "group": 0.3, "single": 0.2}
_CHUNK = 250


@dataclass(frozen=True)
class Settings:
    """Everything the bytes of a world depend on."""

    pictures: int
    seed: int
    size: int
    per_shard: int
    dev_pictures: int
    eval_rows: int
    zeroshot_pictures: int
    eval_seeds: tuple[int, ...]
    drawn_negatives: int = 0


def build_world(
    out: str | Path,
    *,
    pictures: int = 20_000,
    seed: int = 0,
    size: int = 64,
    per_shard: int = 1000,
    dev_pictures: int = 1000,
    eval_rows: int = 300,
    zeroshot_pictures: int = 420,
    eval_seeds: tuple[int, ...] = (1, 2, 3),
    drawn_negatives: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a world to the folder `out` (layout above) and return what its world.json says.

    `size` is the side of the square pictures in pixels, `eval_rows` the rows of each category in each evaluation set,
    `zeroshot_pictures` the pictures of each zero-shot set, spread over its classes. With `drawn_negatives` training
    pairs have up to so many negative captions with pictures of their own; nothing else changes. The same settings give
    the same bytes, whatever `workers` (processes; default: one a core). `out` appears only when complete. Raises
    UserError when `out` exists (unless `overwrite`, for an old world).
    """
    settings = Settings(
        pictures, seed, size, per_shard, dev_pictures, eval_rows, zeroshot_pictures, tuple(eval_seeds), drawn_negatives
    )
    _check(settings)
    target = Path(out)
    _make_room(target, overwrite)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with _mapper(workers or min(8, os.cpu_count() or 1)) as parallel:
            summary = _write(partial, settings, parallel, progress)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _check(settings: Settings) -> None:
    for name in ("pictures", "per_shard", "dev_pictures", "eval_rows", "zeroshot_pictures"):
        if getattr(settings, name) < 1:
            raise UserError(f"world: {name} should be at least 1, got {getattr(settings, name)}")
    if settings.drawn_negatives < 0:
        raise UserError(f"world: drawn_negatives should be at least 0, got {settings.drawn_negatives}")
    if not 32 <= settings.size <= 512:
        raise UserError(f"world: size should be 32 to 512 pixels (smaller hides textures), got {settings.size}")


def _make_room(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "world.json").is_file():
        raise UserError(f"{target}: exists and is no world; name a new folder")
    if not overwrite:
        raise UserError(f"{target}: already holds a world; name a new folder or overwrite")
    shutil.rmtree(target)


Parallel = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""`map` over processes: results in the order of the jobs."""


@contextmanager
def _mapper(workers: int) -> Iterator[Parallel]:
    if workers == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap


def _write(folder: Path, settings: Settings, parallel: Parallel, progress: bool) -> dict[str, Any]:
    for split, number in (("train", settings.pictures), ("dev", settings.dev_pictures)):
        jobs = [(settings, split, i, min(i + _CHUNK, number)) for i in range(0, number, _CHUNK)]
        samples = chain.from_iterable(parallel(_samples, jobs))
        per_shard = settings.per_shard if split == "train" else number
        write_shards(samples, folder, per_shard=per_shard, name=split, progress=progress)
    counts: dict[str, Any] = {"train": settings.pictures, "dev": settings.dev_pictures}
    for name, eval_seed in [("dev", 0), *((f"test{s}", s) for s in settings.eval_seeds)]:
        counts[f"eval/{name}"] = _write_eval_set(folder, name, eval_seed, settings, parallel)
    summary = {
        "version": 1,
        "settings": asdict(settings),
        "counts": counts,
        "vocabulary": vocabulary(),
        "zeroshot": {name: {"classes": list(CLASSES[name]), "templates": TEMPLATES[name]} for name in CLASSES},
        "sha256": _hashes(folder),
    }
    (folder / "world.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _stream(settings: Settings, *parts: object) -> Random:
    """A random stream of its own for every set and number."""
    return Random("/".join(map(str, ("clipkit world", settings.seed, *parts))))


def _samples(job: tuple[Settings, str, int, int]) -> list[Sample]:
    settings, split, start, stop = job
    return [_sample(settings, split, i) for i in range(start, stop)]


def _sample(settings: Settings, split: str, number: int) -> Sample:
    rng = _stream(settings, split, number)
    scene = sample_training_scene(rng)
    picture = encode_jpeg(draw(scene, rng, settings.size))
    key = f"{split}-{number:07d}"
    extra = {"group": key, "scene": scene.to_json(), "tags": tags(scene)}
    sample = Sample(key, picture, "jpg", captions(scene, rng), extra)
    if settings.drawn_negatives and split == "train":
        _add_negatives(sample, scene, rng, settings)
    return sample


def _add_negatives(sample: Sample, scene: Scene, rng: Random, settings: Settings) -> None:
    """Negatives with pictures, the same for each of the captions."""
    negatives = []
    for number, (kind, text, other) in enumerate(variants(scene, rng, settings.drawn_negatives)):
        negatives.append({"text": text, "kind": kind, "source": "world", "picture": number})
        sample.negative_images[f"negative{number}.jpg"] = encode_jpeg(draw(other, rng, settings.size))
    sample.extra["negatives"] = [negatives for _ in sample.captions]


def _write_eval_set(root: Path, name: str, eval_seed: int, settings: Settings, parallel: Parallel) -> dict[str, int]:
    """Rows, their scenes, and all pictures of one evaluation set; returns how many of each."""
    folder = root / "eval" / name
    pictures: dict[Scene, str] = {}
    rows = list(_rows(_stream(settings, "eval", name), settings.eval_rows, f"eval/{name}/pictures", pictures))
    classes = list(_class_scenes(_stream(settings, "zeroshot", name), settings.zeroshot_pictures))
    jobs = [(root / path, scene) for scene, path in pictures.items()]
    jobs += [(folder / "zeroshot" / path, scene) for path, scene in classes]
    for path in {path.parent for path, _ in jobs}:
        path.mkdir(parents=True)
    chunks = ((settings, name, i, jobs[i : i + _CHUNK]) for i in range(0, len(jobs), _CHUNK))
    for _ in parallel(_draw_files, chunks):
        pass
    _write_lines(folder / "rows.jsonl", (r | {"meta": {"seed": eval_seed} | r["meta"]} for r in rows))
    _write_lines(folder / "scenes.jsonl", ({"path": p, "scene": s.to_json()} for s, p in pictures.items()))
    return {"rows": len(rows), "pictures": len(pictures), "zeroshot": len(classes)}


def _rows(rng: Random, per_category: int, folder: str, pictures: dict[Scene, str]) -> Iterator[dict[str, Any]]:
    """`per_category` rows of each category; several share a picture. Fills `pictures` with the path of each scene."""
    made = dict.fromkeys(TASKS, 0)
    while min(made.values()) < per_category:
        kind = rng.choices(list(_EVAL_KINDS), list(_EVAL_KINDS.values()))[0]
        scene = sample_scene(rng, kind)
        for category in [c for c in TASKS if made[c] < per_category]:
            row = make_row(category, scene, rng)
            if row is None:
                continue
            for one in (scene, *row.scenes):
                pictures.setdefault(one, f"{folder}/{len(pictures):05d}.jpg")
            yield _as_json(row, f"{category}/{made[category]:04d}", pictures[scene], pictures)
            made[category] += 1


def _as_json(row: Row, name: str, cluster: str, pictures: dict[Scene, str]) -> dict[str, Any]:
    return {
        "id": name,
        "category": row.category,
        "cluster": cluster,
        "images": [{"src": "world", "path": pictures[scene]} for scene in row.scenes],
        "texts": list(row.texts),
        "match": [list(line) for line in row.match],
        "valid": True,
        "meta": row.meta,
    }


def _class_scenes(rng: Random, per_set: int) -> Iterator[tuple[str, Scene]]:
    """Path below zeroshot/ and scene of every picture of the class folders."""
    for name, classes in CLASSES.items():
        for label, looks in classes.items():
            for i in range(-(-per_set // len(classes))):
                scene = sample_scene(rng, "single")
                yield f"{name}/{label}/{i:03d}.jpg", replace(scene, things=(replace(scene.things[0], **looks),))


def _draw_files(job: tuple[Settings, str, int, list[tuple[Path, Scene]]]) -> None:
    settings, name, start, drawings = job
    for number, (path, scene) in zip(count(start), drawings):
        rng = _stream(settings, "drawing", name, number)
        path.write_bytes(encode_jpeg(draw(scene, rng, settings.size)))


def _write_lines(path: Path, items: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def _hashes(folder: Path) -> dict[str, str]:
    """Digest of each shard and row file, and one for all pictures of each evaluation set."""
    files = [*folder.glob("*.tar"), *folder.glob("eval/*/*.jsonl")]
    out = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}
    for eval_set in sorted(folder.glob("eval/*")):
        digest = hashlib.sha256()
        for picture in sorted(eval_set.rglob("*.jpg")):
            digest.update(f"{picture.relative_to(eval_set)}\n".encode() + picture.read_bytes())
        out[f"eval/{eval_set.name}/**.jpg"] = digest.hexdigest()
    return out
