"""Converters of published benchmarks whose annotations no plain address serves; written to their scripts."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from pathlib import PurePosixPath
from typing import Any

from clipkit.data.files import Files
from clipkit.errors import UserError
from clipkit.evaluation.converted import (
    Converted,
    json_named,
    lines_named,
    named,
    one_picture,
    table,
    two_by_two,
)


def mmvp_vlm(files: Files) -> Converted:
    """MMVP-VLM (Tong et al., CVPR 2024, arXiv 2401.06209): two pictures that CLIP takes for alike, two statements.

    Reads `Questions.csv` (number, folder of the picture, statement; two lines a pair); fifteen pairs a category.
    """
    lines = list(csv.reader(io.StringIO(named(files, "Questions.csv").decode("utf-8-sig"), newline="")))[1:]
    pairs = list(zip(lines[::2], lines[1::2]))
    if len(lines) % 2 or len(pairs) > 15 * len(_MMVP):
        raise UserError(
            f"Questions.csv: should hold pairs of lines, at most {15 * len(_MMVP)}, found {len(lines)} lines"
        )
    rows = []
    for number, ((first, folder, one), (second, _, other)) in enumerate(pairs):
        if (int(first) % 2, int(second) % 2) != (1, 0):
            raise UserError(
                f"Questions.csv: pair {number + 1} should be an odd and an even number, is {first}, {second}"
            )
        paths = [f"{folder}/{first}.jpg", f"{folder}/{second}.jpg"]
        rows.append(two_by_two(f"{number}", _MMVP[number // 15], f"{number}", "mmvp_vlm", paths, [one, other]))
    return Converted(rows)


_MMVP = [
    "orientation", "specific_features", "state", "quantity", "position", "colour", "structure", "text", "viewpoint",
]  # fmt: skip
"""The authors' nine patterns, in the order of the file."""


def eqben(files: Files) -> Converted:
    """EqBen (Wang et al., ICCV 2023, arXiv 2303.14465): frames and pictures that differ little, 2 × 2, seven subsets.

    Reads what the authors score with: `ann_json_finegrained_random.json` (picture and caption of every quarter of a
    row, shuffled), `private_random_idx.json` (how) and `private_info.json` (subset, row and quarter of each).
    """
    shuffled = json_named(files, "ann_json_finegrained_random.json")
    order, info = json_named(files, "private_random_idx.json"), json_named(files, "private_info.json")
    if not len(shuffled) == len(order) == len(info):
        raise UserError(f"EqBen's three files should be equally long, found {len(shuffled)}, {len(order)}, {len(info)}")
    place = {shuffled_from: at for at, shuffled_from in enumerate(order)}
    found: dict[int, dict[str, Any]] = {}
    for number, about in enumerate(info):
        quarter = found.setdefault(about["sample_cnt"], {"subset": about["dataset"].removeprefix("eqben")})
        quarter[about["name"]] = shuffled[place[number]]
    rows = []
    for number, row in sorted(found.items()):
        if lacking := {"c0i0", "c1i1"} - row.keys():
            raise UserError(f"private_info.json: row {number} lacks {', '.join(sorted(lacking))}")
        right = [row["c0i0"], row["c1i1"]]
        paths = [re.sub(r"\.npy$", ".png", part["image"]) for part in right]
        rows.append(two_by_two(f"{number}", row["subset"], paths[0], "eqben", paths, [p["caption"] for p in right]))
    return Converted(rows)


def crepe(files: Files) -> Converted:
    """CREPE's productivity (Ma et al., CVPR 2023, arXiv 2212.07796): a caption of n atoms against its hard negatives.

    Reads every `prod_vg_hard_negs_KIND_complexity_N.csv`; a category is a KIND (atom, swap, negate) of one N.
    """
    found = {name: re.search(r"prod_vg_hard_negs_([a-z]+)_complexity_(\d+)\.csv$", name) for name in files}
    columns = {"image_id", "caption", "hard_negs", "x", "y", "width", "height"}
    rows = []
    for name, match in sorted((name, match) for name, match in found.items() if match):
        kind = f"{match[1]}_{match[2]}"
        for number, item in enumerate(table(files[name], name, columns)):
            wrong = ast.literal_eval(item["hard_negs"])
            texts, path = [item["caption"], *wrong], f"{item['image_id']}.jpg"
            row = one_picture(f"{kind}/{number}", kind, "visual_genome", path, texts, [1] + [0] * len(wrong))
            row["images"][0]["bbox"] = [float(item[side]) for side in ("x", "y", "width", "height")]
            rows.append(row)
    return Converted(rows)


def vl_checklist(files: Files, *, first: int = 1000) -> Converted:
    """VL-CheckList (Zhao et al., EMNLP 2022 demo, arXiv 2207.00221): a text against one with a word replaced.

    Reads all JSON files below `Object/`, `Attribute/` and `Relation/`, of each the `first` rows as the authors'
    settings do (0: all). A category is a file.
    """
    converted = Converted([])
    for name in sorted(n for n in files if n.endswith(".json")):
        parts = PurePosixPath(name).with_suffix("").parts
        section = next((number for number, part in enumerate(parts) if part in _SECTIONS), None)
        if section is None:
            continue
        kind, src = "/".join(parts[section:]), _checklist_source(parts[section:])
        items = json.loads(files[name] or b"[]")
        for number, (path, texts) in enumerate(items[: first or None]):
            path = path if src == "hake" else PurePosixPath(path).name
            row = one_picture(f"{kind}/{number}", kind, src, path, [texts["POS"][0], texts["NEG"][0]], [1, 0])
            converted.rows.append(row | {"meta": {"section": parts[section].lower()}})
        converted.dropped[f"beyond the first {first} of a file"] += max(0, len(items) - first) if first else 0
    return converted


_SECTIONS = ("Object", "Attribute", "Relation")


def _checklist_source(parts: tuple[str, ...]) -> str:
    """Where a file's pictures are from; VAW's are Visual Genome's."""
    said = "/".join(parts)
    return "hake" if "hake" in said else "swig" if "swig" in said else "visual_genome"


def inpaint_coco(files: Files) -> Converted:
    """InpaintCOCO (Rösch et al., 2024, arXiv 2403.02875): a COCO picture and the same, one thing changed.

    Reads `inpaint_coco.jsonl`, the dataset's text columns in its order (concept, coco_caption, inpaint_caption). Row
    N's pictures are N_coco.jpg and N_inpaint.jpg, N in four digits.
    """
    rows = []
    for number, item in enumerate(lines_named(files, "inpaint_coco.jsonl")):
        paths, texts = (
            [f"{number:04}_coco.jpg", f"{number:04}_inpaint.jpg"],
            [item["coco_caption"], item["inpaint_caption"]],
        )
        rows.append(two_by_two(f"{number:04}", item["concept"], f"{number:04}", "inpaint_coco", paths, texts))
    return Converted(rows)


def cola_gqa(files: Files) -> Converted:
    """COLA's single objects on GQA's pictures (Ray et al., NeurIPS 2023, arXiv 2305.03689): a phrase ranks pictures."""
    return _cola_single(files, "GQA", "visual_genome")


def cola_clevr(files: Files) -> Converted:
    """COLA's single objects on CLEVR's pictures."""
    return _cola_single(files, "CLEVR", "clevr")


def cola_paco(files: Files) -> Converted:
    """COLA's single objects on PACO's pictures, which are COCO's."""
    return _cola_single(files, "PACO", "paco")


def _cola_single(files: Files, name: str, src: str) -> Converted:
    """Of every phrase a row with the pictures of its hard list, 1 where it is there (n × 1).

    `COLA_singleobjects_benchmark_NAME.json` holds phrases and, of every picture, its file, its objects (not for PACO),
    which phrases are there, and of which phrases it is a hard one. Phrases without a right picture are left out, as the
    script does; so are those without a wrong one, whose average precision is 1 for every model.
    """
    phrases, pictures = _cola_parts(json_named(files, f"COLA_singleobjects_benchmark_{name}.json"))
    converted = Converted([])
    for number, phrase in enumerate(phrases):
        hard = [(file, int(there[number])) for file, there, counted in pictures if counted[number]]
        if {right for _, right in hard} != {0, 1} or len(hard) < 3:
            converted.dropped["no right picture, no wrong one, or two in all"] += 1
            continue
        images = [{"src": src, "path": PurePosixPath(file).name} for file, _ in hard]
        row = {"id": f"{number}", "category": "single_object", "cluster": phrase, "images": images, "texts": [phrase]}
        converted.rows.append(row | {"match": [[right] for _, right in hard]})
    return converted


def _cola_parts(tree: Any) -> tuple[list[str], list[tuple[str, list[int], list[int]]]]:
    """(phrases, pictures); the published files are lists of two, their description calls them `labels` and `data`."""
    phrases, pictures = (tree["labels"], tree["data"]) if isinstance(tree, dict) else tree
    return phrases, [(one[0], one[-2], one[-1]) for one in pictures]
