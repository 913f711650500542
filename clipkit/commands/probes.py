"""probe: what a classifier makes of a model's embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.commands.arguments import Json, Model, Seed, words
from clipkit.commands.output import STDOUT, print_table, write_json
from clipkit.errors import UserError, did_you_mean

COLUMNS = ["method", "top-1", "95 %", "mean per class", "95 %", "chosen", "validation"]


METHODS = ("zero-shot", "linear", "tip-adapter", "tip-x", "sus-x", "coop", "kgcoop")


def probe(
    model: Model,
    train: Annotated[str, typer.Option(metavar="PATH", help="Folder or tar of class folders to learn from.")],
    test: Annotated[str, typer.Option(metavar="PATH", help="Class folders to be judged on.")],
    val: Annotated[str | None, typer.Option(metavar="PATH", help="To choose by; default: a fifth of --train.")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help=f"Of {', '.join(METHODS)}; default: linear, with --shots tip-adapter."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, metavar="N", help="Learn from N pictures a class; 0: all.")] = 0,
    support: Annotated[
        str | None, typer.Option(metavar="PATH", help="Pictures without classes, for sus-x: --shots of them a class.")
    ] = None,
    vectors: Annotated[int, typer.Option(min=1, metavar="N", help="Vectors that coop learns.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Of coop and kgcoop.")] = 50,
    templates: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts with {}, one a line.")] = None,
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """Classify by what a model's embeddings teach.

    Beside zero-shot: a linear probe; from few pictures without training Tip-Adapter and TIP-X; from pictures without
    classes SuS-X; learned prompts, CoOp and KgCoOp. All is chosen on validation pictures, the test pictures are looked
    at once.
    """
    wanted = _wanted(method, shots, support)
    from clipkit.evaluation import probe as probes
    from clipkit.evaluation.labelled import read_labelled, read_unlabelled
    from clipkit.evaluation.zeroshot import lines_of
    from clipkit.model.load import load

    wordings = lines_of(templates, "templates") if templates else None
    learned = read_labelled(train)
    judged = read_labelled(test).renumbered(learned.classes, test)
    pool = read_unlabelled(support) if support else None
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
    pooled = probes.embed(encoder, pool, progress=progress) if pool else None
    learn = {"epochs": epochs, "seed": seed}

    def found(name: str) -> Any:
        return _found(name, encoder, (seen, chosen_by, asked), texts, learned.classes, pooled, shots, vectors, learn)

    said = [probes.summary(found(name), asked, len(texts)) for name in wanted]
    if json_path:
        counts = {"train": len(seen.y), "validation": len(chosen_by.y), "test": len(asked.y)}
        write_json({"model": model, "classes": learned.classes, "pictures": counts, "methods": said}, json_path)
    if json_path != STDOUT:
        print_table(COLUMNS, [_line(one) for one in said])


def _found(
    name: str,
    encoder: Any,
    parts: tuple[Any, Any, Any],
    texts: Any,
    classes: list[str],
    pool: Any,
    shots: int,
    vectors: int,
    learn: dict[str, int],
) -> Any:
    """What the method makes of (training, validation, test) pictures."""
    from clipkit.evaluation import probe as probes

    if name == "zero-shot":
        return probes.zero_shot(*parts[1:], texts)
    if name == "linear":
        return probes.linear_probe(*parts, len(texts))
    if name == "tip-adapter":
        return probes.tip_adapter(*parts, texts)
    if name == "tip-x":
        return probes.tip_x(*parts, texts)
    if name == "sus-x":
        return probes.tip_x(probes.support(pool.x, texts, shots), *parts[1:], texts, "SuS-X")
    from clipkit.evaluation import prompts

    if name == "coop":
        return prompts.coop(encoder, *parts, classes, vectors=vectors, **learn)
    return prompts.kgcoop(encoder, *parts, classes, texts, **learn)


def _wanted(method: str | None, shots: int, support: str | None) -> list[str]:
    """The methods asked for, zero-shot first. Raises UserError for one that is unknown or lacks what it needs."""
    names = words(method) if method else ["linear", *(["tip-adapter"] if shots else [])]
    if strange := [name for name in names if name not in METHODS]:
        raise UserError(f"--method {strange[0]}: no such method{did_you_mean(strange[0], METHODS)}")
    if ("sus-x" in names) != (support is not None):
        raise UserError("--method sus-x and --support PATH (pictures without classes) belong together")
    if "sus-x" in names and not shots:
        raise UserError("--method sus-x: give --shots, the pictures of --support that stand for a class")
    return list(dict.fromkeys(["zero-shot", *names]))


def _line(found: dict) -> tuple[str, ...]:
    shown = []
    for name in ("top1", "mean_per_class"):
        metric = found["metrics"][name]
        shown += [f"{100 * metric['value']:.1f}", f"{100 * metric['low']:.1f}–{100 * metric['high']:.1f}"]
    chosen = ", ".join(f"{name} {value:g}" for name, value in found["settings"].items())
    return (found["method"], *shown, chosen, f"{100 * found['validation']:.1f}")
