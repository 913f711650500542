"""Published annotations into rows.jsonl: `clipkit bench convert NAME SOURCE --out DIR`.

A converter reads a folder, tar or file and returns rows (and, where it draws them, pictures); its keyword-only
arguments are its settings. The same source and settings give the same bytes, so a benchmark can record their SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.data.abstract_scenes import AbstractScenes
from clipkit.data.build import encode_jpeg
from clipkit.data.files import Files
from clipkit.data.shards import write_atomic
from clipkit.errors import UserError, did_you_mean

COCO = "coco_val2017"


@dataclass
class Converted:
    """Rows as they go into OUT/NAME.jsonl, drawn pictures (OUT/NAME.tar), and how many rows were left out and why."""

    rows: list[dict[str, Any]]
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


def convert(name: str, source: str | Path, out: str | Path, **settings: Any) -> dict[str, Any]:
    """Write OUT/NAME.jsonl (and OUT/NAME.tar when the benchmark's pictures are drawn here).

    Returns {"rows": path, "n", "by_category", "dropped", "sha256", "pictures"}. Raises UserError for an unknown name
    and for a source without a single row.
    """
    if name not in CONVERTERS:
        raise UserError(f"no converter called {name}{did_you_mean(name, CONVERTERS)}")
    converted = CONVERTERS[name](Files(source), **settings)
    if not converted.rows:
        raise UserError(f"{source}: holds no row of {name}; left out: {dict(converted.dropped) or 'nothing'}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in converted.rows).encode()
    write_atomic(folder / f"{name}.jsonl", text)
    if converted.pictures:
        write_atomic(folder / f"{name}.tar", _tar(converted.pictures))
    return {
        "rows": str(folder / f"{name}.jsonl"),
        "n": len(converted.rows),
        "by_category": dict(Counter(row.get("category", "all") for row in converted.rows)),
        "dropped": dict(converted.dropped),
        "sha256": hashlib.sha256(text).hexdigest(),
        "pictures": len(converted.pictures),
    }


def sugarcrepe(files: Files) -> Converted:
    """SugarCrepe (Hsieh et al., NeurIPS 2023, arXiv 2306.14610): a caption against one hard negative, 7 kinds."""
    rows = []
    for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        for key, item in _json_named(files, kind).items():
            texts = [item["caption"], item["negative_caption"]]
            rows.append(_row(f"{kind}/{key}", kind, COCO, item["filename"], texts, [1, 0]))
    return Converted(rows)


def vsr(files: Files) -> Converted:
    """Visual Spatial Reasoning (Liu et al., TACL 2023, arXiv 2205.00363): a sentence true of a picture or not."""
    rows = []
    for name in sorted(n for n in files if n.endswith(".jsonl")):
        for line in files[name].decode().splitlines():
            item = json.loads(line)
            if "relation" in item:
                row = _row(f"{len(rows)}", "all", COCO, item["image"], [item["caption"]], [item["label"]])
                rows.append(row | {"meta": {"relation": item["relation"]}})
    return Converted(rows)


def valse(files: Files, *, pictures: str = "") -> Converted:
    """VALSE (Parcalabescu et al., ACL 2022, arXiv 2112.07566): caption against foil; `valid` is the authors' filter.

    `pictures` (a folder or tar of COCO pictures named by their 12-digit number) leaves out the rows without one there;
    COCO's 2014 and 2017 editions number their pictures alike.
    """
    present = {PurePosixPath(n).name for n in Files(pictures)} if pictures else None
    converted = Converted([])
    for name in sorted(n for n in files if PurePosixPath(n).stem.removeprefix("valse_") in _VALSE):
        kind = PurePosixPath(name).stem.removeprefix("valse_")
        for key, item in json.loads(files[name]).items():
            number = re.search(r"(\d{12}\.jpg)$", item["image_file"])
            if present is not None and (not number or number[1] not in present):
                converted.dropped["no picture"] += 1
                continue
            src, path = "valse", item["image_file"]
            if number and (present or number.start() == 0):
                src, path = COCO, number[1]
            row = _row(f"{kind}/{key}", kind, src, path, [item["caption"], item["foil"]], [1, 0])
            votes = (item.get("mturk") or {}).get("caption", 0)
            converted.rows.append(row | {"valid": votes >= 2})
    return converted


_VALSE = {
    "existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial", "relations",
    "action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it",
}  # fmt: skip


def abstract_scenes_pairs(files: Files, *, size: int = 128) -> Converted:
    """Minimal pairs on Abstract Scenes (Nikolaus & Fourtassi, CMCL 2021) in 2 × 2 form, pictures drawn at `size`.

    Pairs that share a scene form one cluster: they are not independent.
    """
    data = AbstractScenes(files)
    rows = [_two_by_two(*pair) for pair in _minimal_pairs(data)]
    used = sorted({image["path"] for row in rows for image in row["images"]})
    return Converted(rows, {path: encode_jpeg(data.render(int(path[:-4]), size)) for path in used})


def abstract_scenes_choice(files: Files) -> Converted:
    """The same minimal pairs as their authors score them: each scene chooses between the two sentences (1 × 2).

    The pictures are those of abstract_scenes_pairs.
    """
    rows = []
    for kind, number, a, b, cluster in _minimal_pairs(AbstractScenes(files)):
        for part, row in (("a", a), ("b", b)):
            texts = [row["target_sentence"], row["distractor_sentence"]]
            one = _row(f"{kind}/{number}{part}", kind, "abstract_scenes", f"{row['img_id']}.jpg", texts, [1, 0])
            rows.append(one | {"cluster": cluster})
    return Converted(rows)


def _minimal_pairs(data: AbstractScenes) -> Iterator[tuple[str, int, dict[str, str], dict[str, str], str]]:
    """(kind, number, row, mirrored row, cluster) of every minimal pair."""
    for kind, table in data.minimal_pairs.items():
        pairs = list(zip(table[::2], table[1::2]))
        cluster = _components([(a["img_id"], b["img_id"]) for a, b in pairs])
        for number, (a, b) in enumerate(pairs):
            if (a["target_sentence"], a["distractor_sentence"]) != (b["distractor_sentence"], b["target_sentence"]):
                raise UserError(
                    f"minimal pairs, {kind}: rows {2 * number} and {2 * number + 1} do not mirror each other"
                )
            yield kind, number, a, b, f"{kind}/{cluster[a['img_id']]}"


def _two_by_two(kind: str, number: int, a: dict[str, str], b: dict[str, str], cluster: str) -> dict[str, Any]:
    return {
        "id": f"{kind}/{number}",
        "category": kind,
        "cluster": cluster,
        "images": [{"src": "abstract_scenes", "path": f"{row['img_id']}.jpg"} for row in (a, b)],
        "texts": [a["target_sentence"], b["target_sentence"]],
        "match": [[1, 0], [0, 1]],
    }


def flickr8k_order(files: Files, *, seed: int = 0, per_picture: int = 5) -> Converted:
    """Caption order as in ARO (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936): own caption against four shuffles.

    `files` is a shard with KEY.json members that hold `captions`. All five texts are lower-cased and stripped of
    punctuation alike. A caption of which some shuffle never differs from the original is left out and counted.
    """
    from textblob.en import parser  # not clipkit's own tagger: that one learns words, this benchmark stays as it is

    converted = Converted([])
    for name in files:
        if not name.endswith(".json"):
            continue
        key = name.removesuffix(".json")
        for number, caption in enumerate(json.loads(files[name])["captions"][:per_picture]):
            words = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", caption.lower())
            tags = [tag for _, tag in parser.find_tags(words)]
            shuffles = perturb(words, tags, random.Random(f"{seed}/{key}/{number}"))
            if shuffles is None:
                converted.dropped["a shuffle cannot differ"] += 1
                continue
            texts = [" ".join(order) for order in (words, *shuffles)]
            row = _row(f"{key}/{number}", "order", "flickr8k_dev", f"{key}.jpg", texts, [1, 0, 0, 0, 0])
            converted.rows.append(row)
    return converted


def perturb(words: list[str], tags: list[str], rng: random.Random, tries: int = 20) -> list[list[str]] | None:
    """ARO's four orders of a sentence; None when one of them equals the original after `tries` draws.

    Nouns among nouns and adjectives among adjectives; everything else; whole trigrams; within trigrams.
    `tags` are Penn Treebank tags.
    """
    nouns = [i for i, tag in enumerate(tags) if tag.startswith("NN")]
    adjectives = [i for i, tag in enumerate(tags) if tag.startswith("JJ")]
    others = sorted(set(range(len(words))) - {*nouns, *adjectives})
    trigrams = [list(range(i, min(i + 3, len(words)))) for i in range(0, len(words), 3)]
    kinds: list[Callable[[], list[int]]] = [
        lambda: _permute(len(words), [nouns, adjectives], rng),
        lambda: _permute(len(words), [others], rng),
        lambda: [i for trigram in rng.sample(trigrams, len(trigrams)) for i in trigram],
        lambda: _permute(len(words), trigrams, rng),
    ]
    orders = []
    for draw in kinds:
        drawn = ([words[i] for i in draw()] for _ in range(tries))
        different = next((order for order in drawn if order != words), None)
        if different is None:
            return None
        orders.append(different)
    return orders


CONVERTERS: dict[str, Callable[..., Converted]] = {
    f.__name__: f for f in (sugarcrepe, vsr, valse, abstract_scenes_pairs, abstract_scenes_choice, flickr8k_order)
}


def _permute(length: int, groups: list[list[int]], rng: random.Random) -> list[int]:
    """Positions 0 .. length-1 with each group of positions permuted among itself."""
    order = list(range(length))
    for group in groups:
        for position, taken in zip(group, rng.sample(group, len(group))):
            order[position] = taken
    return order


def _components(edges: list[tuple[str, str]]) -> dict[str, str]:
    """Node -> the name of its connected component."""
    name: dict[str, str] = {}
    for a, b in edges:
        keep, drop = name.setdefault(a, a), name.setdefault(b, b)
        name |= {node: keep for node, component in name.items() if component == drop}
    return name


def _row(id: str, category: str, src: str, path: str, texts: list[str], match: list[int]) -> dict[str, Any]:
    images = [{"src": src, "path": path}]
    return {"id": id, "category": category, "cluster": path, "images": images, "texts": texts, "match": [match]}


def _json_named(files: Files, stem: str) -> dict[str, dict[str, Any]]:
    names = [name for name in files if PurePosixPath(name).name == f"{stem}.json"]
    if len(names) != 1:
        raise UserError(f"the source should hold one file {stem}.json, found {names or 'none'}")
    return json.loads(files[names[0]])


def _tar(pictures: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in pictures.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
