"""eval, zeroshot, compare, merge, bench: numbers out of models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clipkit.commands.arguments import Json, Model, Roots, pairs, settings_for, words
from clipkit.commands.output import STDOUT, print_table, write_json
from clipkit.errors import UserError

Names = Annotated[list[str] | None, typer.Option("--benchmark", metavar="NAME", help="Name or YAML file.")]
Missing = Annotated[bool, typer.Option("--allow-missing", help="Score what is there and report the coverage.")]
Tie = Annotated[Literal["official", "strict", "half", "lenient"], typer.Option(help="What equal scores are worth.")]


def evaluate(
    model: Model,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="A suite of eval/suites.yaml.")] = None,
    benchmark: Names = None,
    root: Roots = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Result files; default: the run's results/.")] = None,
    json_path: Json = None,
    allow_missing: Missing = False,
    tie: Tie = "official",
    trained_on: Annotated[
        str | None, typer.Option(metavar="PATH", help="Pictures it has seen (names, JSON, shards): split by them.")
    ] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="Leave out the model that a run started from.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="Keep embeddings; a second call goes on from them.")] = False,
) -> None:
    """Score a model on benchmarks.

    MODEL may also be FILE.py:FUNCTION that returns one (examples/own_model.py), or a transformers folder of two towers.
    --cache keeps embeddings in $CLIPKIT_CACHE/embeddings, by the model's weights and what pictures and texts hold.

    Of a run that began from another model, that one too: RUN/start/results, and the differences in RUN/forgetting.json.
    RUN/report.html shows all that the run has been scored on.
    """
    if not suite and not benchmark:
        raise UserError("name a --suite or a --benchmark; `clipkit bench list` shows them")
    from clipkit.evaluation.forgetting import differences, run_of, start_of
    from clipkit.evaluation.own import open_model
    from clipkit.evaluation.run import evaluate

    def score(reference: str, folder: Path | None) -> list[Any]:
        return evaluate(
            open_model(reference),
            suite=suite,
            benchmarks=benchmark,
            roots=pairs(root, "--root"),
            out=folder,
            allow_missing=allow_missing,
            tie=tie,
            model_name=reference,
            trained_on=trained_on,
            show=json_path != STDOUT,
            cache=cache,
        )

    run = run_of(model)
    results = score(model, out or (run / "results" if run else None))
    if json_path:
        write_json([json.loads(result.to_json()) for result in results], json_path)
    start = start_of(run) if run and not no_start else ""
    if run and start:
        try:
            before = score(start, (out or run) / "start" / "results")
        except UserError as error:
            print(f"{model} began from {start}, which is not set beside it (--no-start): {error}", file=sys.stderr)
        else:
            found = differences(before, results)
            write_json(found, str((out or run) / "forgetting.json"))
            if json_path != STDOUT:
                print_table(FORGETTING, [_forgotten(line) for line in found], f"against its start, {start}")
    if run and not out:
        _write_report(run)


def _write_report(run: Path) -> None:
    """The run, compared with its start where that has been scored."""
    from clipkit.evaluation.report import write_report

    start = [("start", run / "start")] if (run / "start" / "results").is_dir() else []
    report = write_report([*start, (run.resolve().name, run)], run / "report.html")
    print(f"report: {report}", file=sys.stderr)


FORGETTING = ["benchmark", "metric", "start", "now", "difference", "95 %", "p", "detects"]


def _forgotten(line: dict[str, Any]) -> tuple[str, ...]:
    shares = (
        f"{line[key]:.0f}" if line["metric"].endswith("rank") else f"{100 * line[key]:.1f}" for key in ("start", "now")
    )
    tested = line["low"] is not None
    return (
        line["benchmark"],
        line["metric"],
        *shares,
        f"{100 * line['difference']:+.1f}",
        f"{100 * line['low']:+.1f} to {100 * line['high']:+.1f}" if tested else "",
        "" if line["p"] is None else f"{line['p']:.2g}",
        "" if line["detectable"] is None else f"{100 * line['detectable']:.1f}",
    )


def zeroshot(
    model: Model,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Files, folders, globs; - for stdin.")],
    classes: Annotated[str | None, typer.Option(metavar="A,B,...", help="Class names.")] = None,
    classes_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, one a line.")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Classes and templates of a benchmark.")] = None,
    templates: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts with {}, one a line.")] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Classes shown a picture.")] = 3,
    none_below: Annotated[float | None, typer.Option(metavar="S", help="None of these, if less similar.")] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Class folders whose pictures make probabilities true.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write .csv, .jsonl or .parquet, and go on with it.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write thumbnails by class as HTML.")] = None,
    json_path: Json = None,
) -> None:
    """Say which class each picture shows.

    With --out, very many: rows are written batch by batch, and the same call again goes on where the last one ended.
    Probabilities are a softmax at the model's scale; with --calibrate at the scale that fits pictures of known class.
    """
    if sum(given is not None for given in (classes, classes_file, dataset)) != 1:
        raise UserError("give one of --classes A,B,..., --classes-file FILE, --dataset NAME")
    from clipkit.evaluation.own import open_model
    from clipkit.evaluation.zeroshot import Answers, each

    if out and json_path:
        raise UserError("--out and --json: give one of them")
    names: Any = words(classes) if classes is not None else classes_file
    prompts: Any = templates
    if dataset:
        names, own = _classes_of(dataset)
        prompts = templates or own
    progress, given = sys.stderr.isatty(), _with_stdin(images)
    answers = Answers(open_model(model), names, prompts, top=top, none_below=none_below)
    if calibrate:
        from clipkit.evaluation.labelled import read_labelled

        fitted = answers.calibrate(read_labelled(calibrate))
        print(", ".join(f"{what} {value:.4g}" for what, value in fitted.items()), file=sys.stderr)
    if out:
        from clipkit.evaluation.sheet import read_answers, write_answers

        done = write_answers(answers, each(given), out, about=model, progress=progress)
        print_table(["", str(out)], list(done.items()))
        found = read_answers(out)
    else:
        found = answers.to(list(given), progress=progress)
        if json_path:
            write_json(found, json_path)
        if json_path != STDOUT:
            rows = [(picture["image"], *map(_answer, picture["classes"])) for picture in found]
            columns = ["picture", "class", *(f"{n}." for n in range(2, len(rows[0])))]
            print_table(columns, rows)
    if sheet:
        from clipkit.evaluation.gallery import write_gallery

        write_gallery(found, sheet, f"Answers of {model}.")


def _with_stdin(arguments: Iterable[str]) -> Iterable[str]:
    for argument in arguments:
        if argument == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        else:
            yield argument


def _classes_of(dataset: str) -> tuple[dict[str, Any], list[str]]:
    from clipkit.evaluation import benchmark

    found = benchmark.load(dataset)
    if found.kind != "zeroshot":
        raise UserError(f"--dataset {dataset}: is a {found.kind} benchmark; it has no classes")
    return found.classes, found.templates


def _answer(answer: dict[str, Any]) -> str:
    return f"{answer['class']} {100 * answer['probability']:.1f} %"


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders with results.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The report.")] = Path("report.html"),
) -> None:
    """Write one report with runs side by side."""
    from clipkit.evaluation.report import write_report

    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    print(write_report(list(zip(names, runs)), out))


def merge(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Two models, or for a soup any number.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for merged models and report.html.")],
    alphas: Annotated[str, typer.Option(metavar="A,B,...", help="Shares of the second model.")] = "0,0.25,0.5,0.75,1",
    soup: Annotated[Literal["uniform", "greedy"] | None, typer.Option(help="A mean of all, or of the best.")] = None,
    held_out: Annotated[str | None, typer.Option(metavar="NAME", help="Benchmark that chooses a greedy soup.")] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="Evaluate every merged model on a suite.")] = None,
    benchmark: Names = None,
    root: Roots = None,
    allow_missing: Missing = False,
    most_loss: Annotated[
        float | None, typer.Option(metavar="POINTS", min=0, help="Choose by composition, with no more zero-shot loss.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Merge models of one architecture by their weights.

    Two models at several shares (WiSE-FT), or a soup; with benchmarks, a table and a report of what each scores.
    With zero-shot and compositional ones it is the Pareto sweep: loss of the one and gain of the other against the
    first. --most-loss names the model that composes best among those that lose no more zero-shot accuracy.
    """
    if (soup == "greedy") != (held_out is not None):
        raise UserError("--soup greedy and --held-out NAME belong together")
    if soup is None and len(models) != 2:
        raise UserError(f"--alphas are for two models, found {len(models)}; --soup merges more")
    shares = _shares(alphas)
    from clipkit import merge

    on = merge.Benchmarks(suite, tuple(benchmark or ()), pairs(root, "--root"), allow_missing)
    if soup == "uniform":
        made = merge.uniform_soup(models, out, on)
    elif held_out is not None:
        made = merge.greedy_soup(models, held_out, out, on)
    else:
        made = merge.interpolate(models[0], models[1], shares, out, on)
    chosen = merge.choice(made, most_loss / 100) if most_loss is not None else None
    if json_path:
        scores = [{r.benchmark: asdict(r.score) | {"metric": r.headline} for r in one.results} for one in made]
        write_json(
            [
                {"model": one.name, "folder": str(one.folder), "shares": one.shares, "scores": found}
                | ({"point": asdict(one.point)} if one.point else {})
                | ({"chosen": one is chosen} if chosen else {})
                for one, found in zip(made, scores, strict=True)
            ],
            json_path,
        )
    if json_path != STDOUT:
        print_table(*merge.rows(made))
        if chosen:
            print(f"chosen, with at most {most_loss:g} points of zero-shot loss: {chosen.name}, {chosen.folder}")


def _shares(text: str) -> list[float]:
    try:
        return [float(word) for word in words(text)]
    except ValueError:
        raise UserError(f"--alphas {text}: should be numbers between 0 and 1, A,B,...") from None


def list_benchmarks(json_path: Json = None) -> None:
    """List benchmarks, their suites and sources."""
    from clipkit.evaluation import benchmark

    found = [benchmark.load(name) for name in benchmark.packaged()]
    suites = {name: benchmark.suite(name) for name in benchmark.suites()}
    if json_path:
        write_json({"benchmarks": [b.model_dump(mode="json") for b in found], "suites": suites}, json_path)
    if json_path != STDOUT:
        inside = {b.name: ", ".join(name for name, members in suites.items() if b.name in members) for b in found}
        rows = [(b.name, b.kind, b.title, inside[b.name], _way(b), ", ".join(b.sources)) for b in found]
        print_table(["benchmark", "kind", "what it is", "suites", "bench", "sources (--root)"], rows)


def _way(benchmark: Any) -> str:
    """The `clipkit bench` command that makes its rows, or class folders: get, convert, folders or none."""
    from clipkit.evaluation.convert import CONVERTERS

    if benchmark.torchvision:
        return "folders"
    return "get" if benchmark.download else "convert" if benchmark.name in CONVERTERS else ""


def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The benchmark.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for annotations and rows.")] = Path(
        "data/published"
    ),
) -> None:
    """Fetch published annotations and turn them into rows.

    An interrupted download goes on when called again. Pictures are not fetched.
    """
    from clipkit.evaluation.convert import get

    found = get(name, out, say=lambda line: print(line, file=sys.stderr))
    print_table(["", name], list(found.items()))


def convert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The benchmark.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Published annotations: folder, tar or file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for rows (and drawn pictures).")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The converter's own.")
    ] = None,
) -> None:
    """Turn published annotations into rows."""
    from clipkit.evaluation.convert import CONVERTERS, convert

    own = settings_for(CONVERTERS[name], settings) if name in CONVERTERS else {}
    print_table(["", name], list(convert(name, source, out, **own).items()))


def folders(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A zero-shot benchmark.")],
    data: Annotated[Path, typer.Argument(metavar="SOURCE", help="The dataset's root; tars or parquet files.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for NAME.tar.")] = Path("data"),
    form: Annotated[
        Literal["torchvision", "webdataset", "parquet"], typer.Option("--from", help="What SOURCE is.")
    ] = "torchvision",
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch it first.")] = False,
    label: Annotated[str, typer.Option(metavar="COLUMN", help="Of parquet: where the class's number is.")] = "label",
) -> None:
    """Turn a published set of labelled pictures into class folders.

    From torchvision's dataset, from webdataset's tars (KEY.cls beside KEY.jpg), or from parquet files as Hugging Face's
    datasets come: a file, a folder or a glob.
    """
    from clipkit.evaluation.folders import export

    print_table(["", name], list(export(name, data, out, form=form, download=download, label=label).items()))


def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Benchmarks; default: all.")] = None,
    root: Roots = None,
) -> None:
    """Read benchmarks and count the pictures that are missing.

    Rows are read, and their SHA-256 checked, without a single picture. Exit status 2 when anything is wrong or missing.
    """
    from clipkit.evaluation import benchmark
    from clipkit.evaluation.roots import Roots
    from clipkit.evaluation.run import survey

    chosen = [benchmark.load(name) for name in names or benchmark.packaged()]
    places = Roots(pairs(root, "--root"))
    rows, problems = [], []
    for found in chosen:
        places.sources.update(found.sources)
        try:
            seen = survey(found, places)
        except UserError as error:
            problems.append(f"{found.name}: {error}")
            continue
        rows.append((found.name, seen.rows, seen.pictures, seen.missing, seen.texts))
        if seen.problem:
            problems.append(f"{found.name}: {seen.problem}")
    print_table(["benchmark", "rows", "pictures", "missing", "texts"], rows)
    if problems:
        raise UserError("\n".join(problems))
