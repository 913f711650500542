"""shards, world: from pictures and captions to what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.commands.arguments import Json, Model, Overwrite, Seed, Shards, Workers, settings_for, words
from clipkit.commands.output import STDOUT, print_table, print_tables, write_json
from clipkit.commands.tables import check_tables, statistics_tables
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.data.sheet import Sheet

SHEET = 24
"""Pairs on a contact sheet, unless said otherwise."""
COMMON = 20
"""Words that are listed; the vocabulary has all."""
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder the shards are written to.")]


def build(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="Folder, CSV, JSONL, COCO JSON or tar.")],
    out: Out,
    source: Annotated[str | None, typer.Option("--from", metavar="FORMAT", help="Default: guessed from INPUT.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The format's own.")] = None,
    per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Pairs a shard.")] = 1000,
    name: Annotated[str, typer.Option(metavar="NAME", help="Shards are called NAME-000000.tar, ...")] = "shard",
    overwrite: Overwrite = False,
) -> None:
    """Write shards from pictures with captions.

    Several captions a picture are kept. FORMAT is folder, csv, jsonl, coco, tar or abstract_scenes.
    """
    from clipkit.data.build import build_shards
    from clipkit.data.sources import guess
    from clipkit.registry import SOURCES

    chosen = source or guess(Path(input))
    own = settings_for(SOURCES.entry(chosen).target, settings)
    shards = build_shards(input, out, chosen, per_shard=per_shard, name=name, overwrite=overwrite, **own)
    print(f"{len(shards)} shards in {out}, read as {chosen}")


def index(
    shards: Shards,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Processes; more where shards are far away.")] = 2,
    beside: Annotated[bool, typer.Option("--beside", help="Write NAME.tar.index.json beside each shard, too.")] = False,
    json_path: Json = None,
) -> None:
    """Scan shards once; say how many pairs they hold.

    Where every pair lies is kept in $CLIPKIT_CACHE (default ~/.cache/clipkit), each shard when it is finished: a second
    call goes on where a first one ended.
    """
    from clipkit.data.check import index_shards

    found = index_shards(shards, workers=workers, beside=beside)
    if json_path:
        write_json(found, json_path)
    if json_path != STDOUT:
        rows = [*found["shards"].items(), ("all", found["samples"])]
        print_table(["shard", "pairs"], rows, f"fingerprint {found['fingerprint']}")


def check(shards: Shards, workers: Workers = 2, json_path: Json = None) -> None:
    """Read everything and count what is wrong.

    By reason and shard; exit status 2 when anything is.
    """
    from clipkit.data.check import check_shards

    found = check_shards(shards, workers=workers)
    if json_path:
        write_json(found, json_path)
    if found["reasons"]:
        if json_path != STDOUT:
            print_tables(check_tables(found))
        count = sum(found["reasons"].values())
        raise UserError(f"{count} problems; {found['usable']} of {found['samples']} pairs are usable")
    if json_path != STDOUT:
        print(f"{found['samples']} pairs in {len(found['shards'])} shards, all readable")


def stats(
    shards: Shards,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="Look at N pairs only.")] = None,
    seed: Seed = 0,
    workers: Workers = 2,
    json_path: Json = None,
) -> None:
    """Say what the shards hold, in numbers.

    Captions, negatives, pictures, repetitions, and how long an epoch would take to load.
    """
    from clipkit.data.statistics import statistics

    found = statistics(shards, sample=sample, seed=seed, workers=workers)
    if json_path:
        write_json(found, json_path)
    if json_path != STDOUT:
        print_tables(statistics_tables(found))


def tags(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Vocabulary to write, one word a line.")],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="So many words, the most frequent.")] = 10_000,
    overwrite: Overwrite = False,
    json_path: Json = None,
) -> None:
    """Write the vocabulary of tags that data.tags names.

    Words are compared in lower case; how many pictures each is a tag of is counted.
    """
    from clipkit.data.tags import count_tags, write_vocabulary

    counts, tagged, pairs = count_tags(shards)
    kept = write_vocabulary(counts, top, out, overwrite)
    share = sum(times for _, times in kept) / counts.total()
    if json_path:
        write_json(
            {"pairs": pairs, "tagged": tagged, "words": len(counts), "kept": dict(kept), "share": share}, json_path
        )
    if json_path != STDOUT:
        print_table(["word", "pictures"], kept[:COMMON], "the most frequent")
        print(
            f"{len(kept)} of {len(counts)} words in {out}: {share:.1%} of the tags; {tagged} of {pairs} pairs have any"
        )


def nouns(shards: Shards, out: Out, workers: Workers = 2, overwrite: Overwrite = False, json_path: Json = None) -> None:
    """Copy shards, with the nouns of their captions as tags.

    Tags that are there stay. Nouns are found as the rule negatives find them, in English; without WordNet's senses.
    """
    from clipkit.negatives.nouns import add_nouns

    report = add_nouns(shards, out, workers=workers, overwrite=overwrite)
    if json_path:
        write_json(vars(report), json_path)
    if json_path != STDOUT:
        print(
            f"{report.shards} shards in {out}: {report.tags} tags for {report.pairs} pairs, {report.untagged} of them "
            f"without; {report.unlisted} are words that the lexicon does not know"
        )


def show(
    shards: Shards,
    start: Annotated[int, typer.Option(min=0, metavar="ID", help="First pair (of the batch), from 0.")] = 0,
    count: Annotated[
        int | None, typer.Option("-n", "--count", min=1, metavar="N", help="How many: 1, on a sheet 24.")
    ] = None,
    random: Annotated[
        int | None, typer.Option(min=0, metavar="SEED", help="As many by chance, from --start on.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a contact sheet as one HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a contact sheet as one picture.")] = None,
    train: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="As a batch of this config, trained on these shards.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace settings of --train.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, metavar="N", help="Which batch of --train; default 0.")] = None,
) -> None:
    """Print pairs as they are stored, or as training sees them.

    With --html or --png a contact sheet is written: pictures, captions, negatives with what they change, problems.
    """
    from clipkit.data import sheet

    if train is None and (settings or step is not None):
        raise UserError("--set and --step: belong to --train CONFIG")
    count = count or (SHEET if html or png else 1)
    if train is None:
        found = sheet.stored_sheet(shards, count, start, random)
    else:
        found = _training_sheet(train, settings, shards, step or 0, count, start, random)
    if not found.pairs:
        raise UserError(f"--start {start}: there are fewer pairs")
    for write, path in ((sheet.write_html, html), (sheet.write_png, png)):
        if path:
            write(found, path)
            print(f"{len(found.pairs)} pairs in {path}")
    if not html and not png:
        for pair in found.pairs:
            write_json(pair.to_json(), STDOUT)


def _training_sheet(
    name: str, settings: list[str] | None, shards: list[str], step: int, count: int, start: int, random: int | None
) -> Sheet:
    from clipkit import config as configuration
    from clipkit.data.sheet import drawn_sheet
    from clipkit.model.preprocess import preprocess_of
    from clipkit.negatives.online import online

    config = configuration.load(name, settings or ())
    config.data.train, config.data.sources = shards, {}
    return drawn_sheet(config, preprocess_of(config.model), step, count, start, random, online(config))


def reshard(
    shards: Shards,
    out: Out,
    short_side: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Larger pictures are reduced.")] = 256,
    per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Pairs a shard.")] = 1000,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of reduced pictures.")] = 95,
    name: Annotated[str, typer.Option(metavar="NAME", help="Shards are called NAME-000000.tar, ...")] = "shard",
    skip: Annotated[bool, typer.Option("--skip", help="Leave out unreadable pairs, and count them.")] = False,
    workers: Workers = 2,
) -> None:
    """Cut shards anew, with smaller pictures that decode faster.

    Shards finished by an earlier call with the same settings are kept.
    """
    from clipkit.data.reshard import reshard

    on_error = "skip" if skip else "raise"
    report = reshard(
        shards, out, short_side=short_side, per_shard=per_shard, quality=quality, name=name, on_error=on_error,
        workers=workers,
    )  # fmt: skip
    print(
        f"{report.shards} shards in {out}, {report.kept} of them made before; "
        f"{report.smaller} of {report.samples} pictures reduced"
    )
    if report.skipped:
        print_table(["left out", "pairs"], list(report.skipped.items()))


def embed(
    model: Model,
    shards: Shards,
    out: Out,
    name: Annotated[str, typer.Option("--name", metavar="SET", help="Members are called KEY.SET.text.npy, ...")],
    parts: Annotated[str, typer.Option(metavar="A,B,...", help="Of text, negatives, image.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Pairs embedded at once.")] = 64,
) -> None:
    """Write shards again, with a model's embeddings in them.

    For teachers and text towers that read embeddings: data.teacher_features, data.text_features. Shards finished by an
    earlier call with the same settings are kept.
    """
    from clipkit.model.load import load
    from clipkit.model.store import embed_shards

    report = embed_shards(
        load(model), shards, out, name=name, parts=words(parts), reference=model, batch_size=batch_size
    )
    print(f"{report.shards} shards in {out}, {report.kept} of them made before; {report.pairs} pairs embedded")


def build_world(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for shards and test sets.")],
    pictures: Annotated[int, typer.Option(min=1, metavar="N", help="Training pictures.")] = 20_000,
    seed: Seed = 0,
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Side of a picture.")] = 64,
    eval_rows: Annotated[int, typer.Option(min=1, metavar="N", help="Rows a category in each evaluation set.")] = 300,
    drawn_negatives: Annotated[
        int, typer.Option(min=0, metavar="N", help="Negative captions with pictures of their own, a training pair.")
    ] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a world: training shards, dev and test sets.

    The same settings give the same bytes. The test sets have every task form of the benchmarks.
    """
    from clipkit.data.world.build import build_world

    world = build_world(
        out,
        pictures=pictures,
        seed=seed,
        size=size,
        eval_rows=eval_rows,
        drawn_negatives=drawn_negatives,
        overwrite=overwrite,
    )
    rows = [
        (name, " ".join(f"{n} {what}" for what, n in count.items()) if isinstance(count, dict) else f"{count} pairs")
        for name, count in world["counts"].items()
    ]
    print_table(["part", "holds"], rows, str(out))
