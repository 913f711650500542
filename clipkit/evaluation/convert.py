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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.data.abstract_scenes import AbstractScenes
from clipkit.data.build import encode_jpeg
from clipkit.data.files import Files
from clipkit.data.shards import write_atomic
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation import published, published_more
from clipkit.evaluation.benchmark import load
from clipkit.evaluation.converted import Converted, components, json_named, one_picture, two_by_two
from clipkit.evaluation.fetch import fetch

PUBLISHED = "published"
"""The source whose root is the OUT of `clipkit bench get`."""


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


def get(name: str, out: str | Path, *, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Fetch a benchmark's annotations into OUT/NAME/ and convert them into OUT/NAME.jsonl. Returns what convert does.

    Raises UserError where they have no plain address (saying how they are got), and for rows that are not the version
    the benchmark describes.
    """
    benchmark = load(name)
    if benchmark.download is None:
        ways = "; ".join(f"{source}: {about.about}" for source, about in benchmark.sources.items())
        raise UserError(f"{name}: no plain address serves its annotations. {ways}")
    folder = Path(out) / benchmark.name
    fetch(benchmark.download, folder, say=say)
    found = convert(benchmark.name, folder, out)
    expected = benchmark.sha256.get(f"{PUBLISHED}:{benchmark.name}.jsonl", found["sha256"])
    if found["sha256"] != expected:
        raise UserError(f"{found['rows']}: not the rows {name} describes: SHA-256 {found['sha256']}, not {expected}")
    return found


def abstract_scenes_pairs(files: Files, *, size: int = 128) -> Converted:
    """Minimal pairs on Abstract Scenes (Nikolaus & Fourtassi, CMCL 2021) in 2 × 2 form, pictures drawn at `size`.

    Pairs that share a scene form one cluster: they are not independent.
    """
    data = AbstractScenes(files)
    rows = []
    for kind, number, a, b, cluster in _minimal_pairs(data):
        paths, texts = [f"{row['img_id']}.jpg" for row in (a, b)], [row["target_sentence"] for row in (a, b)]
        rows.append(two_by_two(f"{kind}/{number}", kind, cluster, "abstract_scenes", paths, texts))
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
            one = one_picture(f"{kind}/{number}{part}", kind, "abstract_scenes", f"{row['img_id']}.jpg", texts, [1, 0])
            rows.append(one | {"cluster": cluster})
    return Converted(rows)


def _minimal_pairs(data: AbstractScenes) -> Iterator[tuple[str, int, dict[str, str], dict[str, str], str]]:
    """(kind, number, row, mirrored row, cluster) of every minimal pair."""
    for kind, table in data.minimal_pairs.items():
        pairs = list(zip(table[::2], table[1::2]))
        cluster = components([(a["img_id"], b["img_id"]) for a, b in pairs])
        for number, (a, b) in enumerate(pairs):
            if (a["target_sentence"], a["distractor_sentence"]) != (b["distractor_sentence"], b["target_sentence"]):
                raise UserError(
                    f"minimal pairs, {kind}: rows {2 * number} and {2 * number + 1} do not mirror each other"
                )
            yield kind, number, a, b, f"{kind}/{cluster[a['img_id']]}"


def flickr8k_order(files: Files, *, seed: int = 0, per_picture: int = 5) -> Converted:
    """Caption order as in ARO (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936): own caption against four shuffles.

    `files` is a shard with KEY.json members that hold `captions`. All five texts are lower-cased and stripped of
    punctuation alike. A caption of which some shuffle never differs from the original is left out and counted.
    """
    keys = [name.removesuffix(".json") for name in files if name.endswith(".json")]
    captions = ((key, f"{key}.jpg", json.loads(files[f"{key}.json"])["captions"][:per_picture]) for key in keys)
    return _orders("flickr8k_dev", captions, seed)


def coco_order(files: Files, *, seed: int = 0, per_picture: int = 0) -> Converted:
    """ARO's COCO-Order from `coco_karpathy_test.json`, with shuffles as in flickr8k_order; `per_picture` 0: all."""
    return _orders("coco_val2014", _karpathy(files, "coco_karpathy_test.json", per_picture), seed)


def flickr30k_order(files: Files, *, seed: int = 0, per_picture: int = 0) -> Converted:
    """ARO's Flickr30k-Order from `flickr30k_test.json`, with shuffles as in flickr8k_order; `per_picture` 0: all."""
    return _orders("flickr30k", _karpathy(files, "flickr30k_test.json", per_picture), seed)


def _karpathy(files: Files, name: str, per_picture: int) -> Iterator[tuple[str, str, list[str]]]:
    """(key, picture, captions) of [{"image": "folder/name.jpg", "caption": [...]}]."""
    for item in json_named(files, name):
        path = PurePosixPath(item["image"])
        yield path.stem, path.name, item["caption"][: per_picture or None]


def _orders(src: str, captions: Iterable[tuple[str, str, list[str]]], seed: int) -> Converted:
    """Rows of (key, picture, captions); every caption is shuffled with a seed of its own."""
    from textblob.en import parser  # not clipkit's own tagger: that one learns words, these benchmarks stay as they are

    converted = Converted([])
    for key, path, own in captions:
        for number, caption in enumerate(own):
            words = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", caption.lower())
            tags = [tag for _, tag in parser.find_tags(words)]
            shuffles = perturb(words, tags, random.Random(f"{seed}/{key}/{number}"))
            if shuffles is None:
                converted.dropped["a shuffle cannot differ"] += 1
                continue
            texts = [" ".join(order) for order in (words, *shuffles)]
            converted.rows.append(one_picture(f"{key}/{number}", "order", src, path, texts, [1, 0, 0, 0, 0]))
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
    f.__name__: f
    for f in (
        abstract_scenes_pairs, abstract_scenes_choice, flickr8k_order, coco_order, flickr30k_order,
        published.sugarcrepe, published.sugarcrepe_pp, published.valse, published.vsr, published.vsr_zeroshot,
        published.vsr_random, published.bivlc, published.cola, published.colorswap, published.winoground,
        published.nlvr, published.nlvr_orders, published.nlvr_pairs, published.vg_relation, published.vg_attribution,
        published.whatsup, published.svo_probes,
        published_more.mmvp_vlm, published_more.eqben, published_more.crepe, published_more.vl_checklist,
        published_more.inpaint_coco,
        published_more.cola_gqa, published_more.cola_clevr, published_more.cola_paco,
    )
}  # fmt: skip


def _permute(length: int, groups: list[list[int]], rng: random.Random) -> list[int]:
    """Positions 0 .. length-1 with each group of positions permuted among itself."""
    order = list(range(length))
    for group in groups:
        for position, taken in zip(group, rng.sample(group, len(group))):
            order[position] = taken
    return order


def _tar(pictures: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in pictures.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
