"""Converters of published compositional benchmarks; `eval/compositional/` says where their annotations come from."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import PurePosixPath
from typing import Any

from clipkit.data.files import Files
from clipkit.errors import UserError
from clipkit.evaluation.converted import (
    COCO,
    Converted,
    choice_of_picture,
    components,
    json_named,
    lines_named,
    named,
    one_picture,
    table,
    two_by_two,
)


def sugarcrepe(files: Files) -> Converted:
    """SugarCrepe (Hsieh et al., NeurIPS 2023, arXiv 2306.14610): a caption against one hard negative, 7 kinds."""
    rows = []
    for kind in ("add_att", "add_obj", *_SWAPPED_OR_REPLACED):
        for key, item in json_named(files, f"{kind}.json").items():
            texts = [item["caption"], item["negative_caption"]]
            rows.append(one_picture(f"{kind}/{key}", kind, COCO, item["filename"], texts, [1, 0]))
    return Converted(rows)


def sugarcrepe_pp(files: Files) -> Converted:
    """SugarCrepe++ (Dumpala et al., NeurIPS 2024, arXiv 2406.11171): two right captions against a hard negative."""
    rows = []
    for kind in _SWAPPED_OR_REPLACED:
        for item in json_named(files, f"{kind}.json"):
            texts = [item["caption"], item["caption2"], item["negative_caption"]]
            rows.append(one_picture(f"{kind}/{item['id']}", kind, COCO, item["filename"], texts, [1, 1, 0]))
    return Converted(rows)


_SWAPPED_OR_REPLACED = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def vsr(files: Files) -> Converted:
    """Visual Spatial Reasoning (Liu et al., TACL 2023, arXiv 2205.00363): a sentence true of a picture or not."""
    rows = []
    for name in sorted(n for n in files if n.endswith(".jsonl")):
        for line in files[name].decode().splitlines():
            item = json.loads(line)
            if "relation" in item:
                row = one_picture(f"{len(rows)}", "all", COCO, item["image"], [item["caption"]], [item["label"]])
                rows.append(row | {"meta": {"relation": item["relation"]}})
    return Converted(rows)


def vsr_zeroshot(files: Files, *, part: str = "test") -> Converted:
    """VSR's split by concept (`splits/zeroshot/PART.jsonl`): no concept of it is in its training part."""
    return _vsr_split(files, f"zeroshot/{part}.jsonl")


def vsr_random(files: Files, *, part: str = "test") -> Converted:
    """VSR's random split (`splits/random/PART.jsonl`)."""
    return _vsr_split(files, f"random/{part}.jsonl")


def _vsr_split(files: Files, ending: str) -> Converted:
    rows = []
    for number, item in enumerate(lines_named(files, ending)):
        edition = PurePosixPath(item["image_link"]).parent.name  # .../train2017/000000239417.jpg
        row = one_picture(f"{number}", "all", f"coco_{edition}", item["image"], [item["caption"]], [item["label"]])
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
            src, path = _valse_source(item["image_file"]), item["image_file"]
            if number and (present or number.start() == 0):
                src, path = COCO, number[1]
            row = one_picture(f"{kind}/{key}", kind, src, path, [item["caption"], item["foil"]], [1, 0])
            votes = (item.get("mturk") or {}).get("caption", 0)
            converted.rows.append(row | {"valid": votes >= 2})
    return converted


_VALSE = {
    "existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial", "relations",
    "action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it",
}  # fmt: skip


def _valse_source(file: str) -> str:
    """Which of VALSE's picture collections a file name belongs to; SWiG's are named by their verb."""
    starts = {
        "v7w_": "visual7w",
        "COCO_train2014_": "coco_train2014",
        "COCO_val2014_": "coco_val2014",
        "VisualDialog_val2018_": "visdial_val2018",
    }
    return next((src for start, src in starts.items() if file.startswith(start)), "swig")


def bivlc(files: Files) -> Converted:
    """BiVLC (Miranda et al., NeurIPS 2024, arXiv 2406.09952): SugarCrepe with a made picture of the negative, 2 × 2.

    Reads a CSV with the dataset's columns in its order: its own, or one of the authors' per-item results. Row N's
    pictures are N_image.jpg and N_negative_image.jpg, N in four digits.
    """
    names = sorted(n for n in files if PurePosixPath(n).name.lower().startswith("bivlc") and n.endswith(".csv"))
    names = [n for n in names if PurePosixPath(n).name != "BiVLC_negative_imgs.csv"]  # candidates, not the choice
    if not names:
        raise UserError("the source should hold a file bivlc*.csv with the dataset's columns")
    rows = []
    columns = {"caption", "negative_caption", "type", "subtype"}
    for number, item in enumerate(table(files[names[0]], names[0], columns)):
        paths = [f"{number:04}_image.jpg", f"{number:04}_negative_image.jpg"]
        texts = [item["caption"], item["negative_caption"]]
        kind = f"{item['type']}_{item['subtype']}"
        rows.append(two_by_two(f"{number:04}", kind, f"{number:04}", "bivlc", paths, texts))
    return Converted(rows)


def cola(files: Files) -> Converted:
    """COLA's multi-object pairs (Ray et al., NeurIPS 2023, arXiv 2305.03689), 2 × 2 on Visual Genome pictures."""
    items = json_named(files, "COLA_multiobjects_matching_benchmark.json")
    pairs = [[PurePosixPath(url).name for url in item[::2]] for item in items]
    cluster = components([(a, b) for a, b in pairs])
    return Converted(
        [
            two_by_two(f"{number}", "multi_object", cluster[paths[0]], "visual_genome", paths, item[1::2])
            for number, (item, paths) in enumerate(zip(items, pairs))
        ]
    )


def colorswap(files: Files) -> Converted:
    """ColorSwap (Burapacheep et al., ACL Findings 2024, arXiv 2402.04492): the same words, colours exchanged, 2 × 2."""
    rows = []
    for item in lines_named(files, "test_captions.jsonl"):
        paths, texts = [item["image_1"], item["image_2"]], [item["caption_1"], item["caption_2"]]
        rows.append(two_by_two(f"{item['id']}", "all", f"{item['id']}", "colorswap", paths, texts))
    return Converted(rows)


def winoground(files: Files, *, tags: str = "") -> Converted:
    """Winoground (Thrush et al., CVPR 2022, arXiv 2204.03162), 2 × 2, from its `examples.jsonl`.

    `tags`: Diwan et al.'s `new_tag_assignments.json` (EMNLP 2022, arXiv 2211.00768), kept in `meta.tag`: what besides
    composition makes a pair hard; `meta.clean` is `yes` for the 172 pairs that ask for composition alone.
    """
    known = json_named(Files(tags), PurePosixPath(tags).name) if tags else {}
    rows = []
    for item in lines_named(files, "examples.jsonl"):
        paths, texts = [f"{item[f'image_{n}']}.png" for n in (0, 1)], [item["caption_0"], item["caption_1"]]
        key = f"{item['id']}"
        row = two_by_two(key, item["collapsed_tag"], key, "winoground", paths, texts)
        if known:
            row["meta"] = {"tag": ", ".join(known[key]), "clean": "no" if known[key] else "yes"}
        rows.append(row)
    return Converted(rows)


def nlvr(files: Files, *, part: str = "dev") -> Converted:
    """NLVR (Suhr et al., ACL 2017): a sentence true or false of three boxes; the first of six orders of the boxes."""
    return Converted([_nlvr_row(part, item, 0, item["identifier"]) for item in lines_named(files, f"{part}.json")])


def nlvr_orders(files: Files, *, part: str = "dev") -> Converted:
    """NLVR with all six orders of the boxes, as its authors score it."""
    items = lines_named(files, f"{part}.json")
    rows = [_nlvr_row(part, item, k, f"{item['identifier']}-{k}") for item in items for k in range(6)]
    return Converted(rows)


def _nlvr_row(part: str, item: dict[str, Any], order: int, id: str) -> dict[str, Any]:
    row = one_picture(id, "all", "nlvr", _nlvr_picture(part, item, order), [item["sentence"]], [0])
    number = item["identifier"].partition("-")[0]
    return row | {"match": [[int(item["label"] == "true")]], "cluster": number}


def nlvr_pairs(files: Files, *, part: str = "dev") -> Converted:
    """NLVR without a threshold: a sentence chooses between a picture it is true of and one it is false of.

    Every such pair of a sentence's pictures is a row; the rows of a sentence are one cluster.
    """
    by_sentence: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: {"true": [], "false": []})
    for item in lines_named(files, f"{part}.json"):
        by_sentence[item["identifier"].partition("-")[0]][item["label"]].append(item)
    rows = []
    for number, asked in by_sentence.items():
        for right in asked["true"]:
            for wrong in asked["false"]:
                key = f"{right['identifier']}/{wrong['identifier']}"
                paths = [_nlvr_picture(part, item) for item in (right, wrong)]
                rows.append(choice_of_picture(key, "all", number, "nlvr", paths, right["sentence"]))
    return Converted(rows)


def _nlvr_picture(part: str, item: dict[str, Any], order: int = 0) -> str:
    """nlvr/PART/images/FOLDER/PART-N-M-ORDER.png; the hidden part has no folders."""
    name = f"{part}-{item['identifier']}-{order}.png"
    return "/".join(filter(None, (part, "images", item.get("directory"), name)))


def vg_relation(files: Files, *, excluded: str = "") -> Converted:
    """ARO's VG-Relation (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936): who does what to whom, in a cropped picture.

    `excluded`: a JSON list of relations that the authors' notebook leaves out of its mean; the others are then named
    in `meta.counted`, over which the aggregate `notebook` averages.
    """
    out = set(json.loads(Files(excluded)[PurePosixPath(excluded).name])) if excluded else set()
    rows = []
    for number, item in enumerate(json_named(files, "visual_genome_relation.json")):
        relation = item["relation_name"]
        row = _cropped(number, "relation", item) | {"meta": {"relation": relation}}
        if excluded and relation not in out:
            row["meta"]["counted"] = relation
        rows.append(row)
    return Converted(rows)


def vg_attribution(files: Files) -> Converted:
    """ARO's VG-Attribution: two objects whose attributes are exchanged in the wrong text, in a cropped picture."""
    rows = []
    for number, item in enumerate(json_named(files, "visual_genome_attribution.json")):
        pair = "_".join(item["attributes"])
        rows.append(_cropped(number, "attribution", item) | {"meta": {"attributes": pair}})
    return Converted(rows)


def _cropped(number: int, category: str, item: dict[str, Any]) -> dict[str, Any]:
    texts = [item["true_caption"], item["false_caption"]]
    row = one_picture(f"{number}", category, "visual_genome", item["image_path"], texts, [1, 0])
    row["images"][0]["bbox"] = [item[f"bbox_{side}"] for side in ("x", "y", "w", "h")]
    return row


def whatsup(files: Files) -> Converted:
    """What'sUp (Kamath et al., EMNLP 2023, arXiv 2310.19785): prepositions, six sets, each its own category.

    Reads `controlled_images_dataset.json` and `controlled_clevr_dataset.json` (one of four) and
    `{coco,vg}_qa_{one,two}_obj.json` (one of two).
    """
    rows = []
    for side, file in (("a", "controlled_images"), ("b", "controlled_clevr")):
        kind = f"controlled_{side}"
        for number, item in enumerate(json_named(files, f"{file}_dataset.json")):
            path = "/".join(PurePosixPath(item["image_path"]).parts[-2:])
            texts = item["caption_options"]
            row = one_picture(f"{kind}/{number}", kind, "whatsup", path, texts, [1] + [0] * (len(texts) - 1))
            first, place, *_, last = PurePosixPath(path).stem.split("_")  # mug_left_of_plate, mug_on_plate
            axis = "sides" if place in ("left", "right") else "other"
            rows.append(row | {"meta": {f"set_{side}": f"{first}/{last}", f"pair_{side}": f"{first}/{last}/{axis}"}})
    for photos, src, digits in (("coco", COCO, 12), ("vg", "visual_genome", 0)):
        for count in ("one", "two"):
            for number, (image, *texts) in enumerate(json_named(files, f"{photos}_qa_{count}_obj.json")):
                kind, path = f"{photos}_{count}", f"{str(image).zfill(digits)}.jpg"
                rows.append(one_picture(f"{kind}/{number}", kind, src, path, texts, [1, 0]))
    return Converted(rows)


def svo_probes(files: Files) -> Converted:
    """SVO-Probes (Hendricks & Nematzadeh, ACL Findings 2021, arXiv 2106.09141): a sentence chooses its picture.

    The category says which word differs between the pictures: subject, verb or object.
    """
    columns = {"sentence", "pos_image_id", "neg_image_id", "subj_neg", "verb_neg", "obj_neg"}
    rows = []
    for number, item in enumerate(table(named(files, "svo_probes.csv"), "svo_probes.csv", columns)):
        kinds = [kind for kind, column in _SVO.items() if item[column].lower() == "true"]
        if len(kinds) != 1:
            raise UserError(f"svo_probes.csv: row {number + 1} should differ in one word, found {kinds or 'none'}")
        paths = [f"{item[f'{side}_image_id']}.jpg" for side in ("pos", "neg")]
        rows.append(choice_of_picture(f"{number}", kinds[0], paths[0], "svo_probes", paths, item["sentence"]))
    return Converted(rows)


_SVO = {"subject": "subj_neg", "verb": "verb_neg", "object": "obj_neg"}
