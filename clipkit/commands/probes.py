"""probe: what a classifier makes of a model's embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from clipkit.commands.arguments import Json, Model, Seed
from clipkit.commands.output import STDOUT, print_table, write_json

COLUMNS = ["method", "top-1", "95 %", "mean per class", "95 %", "chosen", "validation"]


def probe(
    model: Model,
    train: Annotated[str, typer.Option(metavar="PATH", help="Folder or tar of class folders to learn from.")],
    test: Annotated[str, typer.Option(metavar="PATH", help="Class folders to be judged on.")],
    val: Annotated[str | None, typer.Option(metavar="PATH", help="To choose by; default: a fifth of --train.")] = None,
    shots: Annotated[int, typer.Option(min=0, metavar="N", help="Learn from N pictures a class; 0: all.")] = 0,
    templates: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts with {}, one a line.")] = None,
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """Classify by what a model's embeddings teach.

    A linear probe, and with --shots Tip-Adapter, beside zero-shot. All is chosen on validation pictures, the test
    pictures are looked at once.
    """
    from clipkit.evaluation import probe as probes
    from clipkit.evaluation.labelled import read_labelled
    from clipkit.evaluation.zeroshot import lines_of
    from clipkit.model.load import load

    wordings = lines_of(templates, "templates") if templates else None
    learned = read_labelled(train)
    judged = read_labelled(test).renumbered(learned.classes, test)
    if val is not None:
        held = read_labelled(val).renumbered(learned.classes, val)
    else:
        rest, places = probes.split(learned.labels, seed=seed)
        learned, held = learned.only(rest), learned.only(places)
    if shots:
        learned = learned.only(probes.few(learned.labels, shots, seed))
        # With few pictures to learn from there would not be many to choose by either (CoOp: min(shots, 4)).
        held = held.only(probes.few(held.labels, min(shots, 4, *probes.sizes(held.labels)), seed))
    encoder, progress = load(model), sys.stderr.isatty()
    texts = probes.class_texts(encoder, learned.classes, wordings)
    seen, chosen_by, asked = (probes.embed(encoder, data, progress=progress) for data in (learned, held, judged))
    found = [probes.zero_shot(chosen_by, asked, texts), probes.linear_probe(seen, chosen_by, asked, len(texts))]
    if shots:
        found.append(probes.tip_adapter(seen, chosen_by, asked, texts))
    said = [probes.summary(one, asked, len(texts)) for one in found]
    if json_path:
        counts = {"train": len(seen.y), "validation": len(chosen_by.y), "test": len(asked.y)}
        write_json({"model": model, "classes": learned.classes, "pictures": counts, "methods": said}, json_path)
    if json_path != STDOUT:
        print_table(COLUMNS, [_line(one) for one in said])


def _line(found: dict) -> tuple[str, ...]:
    shown = []
    for name in ("top1", "mean_per_class"):
        metric = found["metrics"][name]
        shown += [f"{100 * metric['value']:.1f}", f"{100 * metric['low']:.1f}–{100 * metric['high']:.1f}"]
    chosen = ", ".join(f"{name} {value:g}" for name, value in found["settings"].items())
    return (found["method"], *shown, chosen, f"{100 * found['validation']:.1f}")
