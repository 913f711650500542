"""negatives: hard-negative captions made by rules, asked of a language model, and audited."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipkit.commands.arguments import Json, Overwrite, Seed, Shards, Workers, belong, pairs, words
from clipkit.commands.data import Out
from clipkit.commands.output import STDOUT, print_table, print_tables, write_json
from clipkit.commands.tables import asked_tables, audit_tables, cost_table
from clipkit.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from clipkit.negatives.audit.stored import Stored
    from clipkit.negatives.llm import Cost


ALIKE, NATS = 0.98, 1.0
"""What `audit` takes for --alike and --nats where nothing is said."""


class Balancing(str, Enum):
    """How `audit --balance` takes away what the text tells."""

    DROP = "drop"
    WEIGHT = "weight"


def make(
    shards: Shards,
    out: Out,
    kinds: Annotated[str | None, typer.Option(metavar="A,B,...", help="Kinds; default: the five of DeGLA.")] = None,
    per_kind: Annotated[int, typer.Option(min=1, metavar="N", help="Negatives of each kind a caption.")] = 1,
    seed: Seed = 0,
    usual: Annotated[
        int, typer.Option(min=0, metavar="N", help="Drop those with neighbouring words in fewer than N captions.")
    ] = 0,
    workers: Workers = 2,
    overwrite: Overwrite = False,
    json_path: Json = None,
) -> None:
    """Add hard-negative captions to shards, by rules.

    Shards finished by an earlier call with the same settings are kept; those that something else wrote there stay,
    unless --overwrite.
    """
    from clipkit.negatives.make import make

    report = make(
        shards, out, kinds=words(kinds), per_kind=per_kind, seed=seed, usual=usual, workers=workers, overwrite=overwrite
    )
    if json_path:
        write_json(report.to_json(), json_path)
    if json_path != STDOUT:
        title = f"{report.captions} captions in {report.shards} shards, {report.kept_shards} of them made before"
        print_table(["kind", "negatives", "captions with one", "candidates dropped"], report.rows(), title)


def ask(
    shards: Shards,
    out: Out,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The model, as the server calls it; with --local a folder or hub name.")
    ],
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible server: http://localhost:8000/v1.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run the model here, by transformers, without a server.")
    ] = False,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Default: DeGLA's five. Also paraphrase, paraphrase_again (ParaCLIP); long_description, "
            "short_description, long_negative, short_negative, tags, false_tags (HQ-CLIP).",
        ),
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            min=28, metavar="PIXELS", help="Show the picture, too, at most so long; HQ-CLIP's way. With --url."
        ),
    ] = None,
    per_kind: Annotated[int, typer.Option(min=1, metavar="N", help="Texts of each kind a caption.")] = 1,
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ask about N captions only, to look at what comes.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what is left to ask, and its cost.")] = False,
    prices: Annotated[
        tuple[float, float], typer.Option(metavar="IN OUT", help="Price of a million tokens in, and out.")
    ] = (0.0, 0.0),
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where answers are kept; default: answers.jsonl in --out.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="KIND.yaml there replace the packaged prompts, or add kinds.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Requests side by side.")] = 16,
    rate: Annotated[float, typer.Option(min=0, metavar="N", help="Requests a minute; 0: as many as go.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="S", help="Longest silence of the server.")] = 120.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=JSON", help="Fields of a request: temperature=0.2.")
    ] = None,
    overwrite: Overwrite = False,
    json_path: Json = None,
) -> None:
    """Add hard-negative captions to shards, written by a language model.

    CLIPKIT_LLM_KEY holds the key, if the server wants one. Every answer is kept when it comes: the same call goes on
    where one was ended, and asks nothing twice that was answered. Look at some first (--limit 100, then shards show
    --html), then at the cost (--estimate). Negatives of other sources stay.
    """
    if not estimate and local == (url is not None):
        raise UserError("either --url URL, a server, or --local, the model run here")
    from clipkit.negatives import llm

    free = {name: _json(value) for name, value in pairs(settings, "--set").items()}
    wish = llm.Wish(
        model, words(kinds) or llm.KINDS, per_kind=per_kind, seed=seed, settings=free, folder=prompts, limit=limit,
        pictures=pictures or 0,
    )  # fmt: skip
    if estimate:
        _print_costs(llm.estimate(shards, out, wish, answers), prices, json_path)
        return
    report = llm.ask(
        shards, out, wish, url=None if local else url, file=answers, concurrency=concurrency, per_minute=rate,
        timeout_s=timeout, overwrite=overwrite,
    )  # fmt: skip
    if json_path:
        write_json(report.to_json(), json_path)
    if json_path != STDOUT:
        print_tables(asked_tables(report, prices))


def _json(text: str) -> Any:
    """`text` as JSON; what is none is the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _print_costs(costs: list[Cost], prices: tuple[float, float], json_path: str | None) -> None:
    if json_path:
        write_json([vars(cost) for cost in costs], json_path)
    if json_path != STDOUT:
        print_tables([cost_table(costs, prices)])


def audit(
    shards: Shards,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="Look at N pairs only.")] = None,
    target: Annotated[
        float | None,
        typer.Option("--balance", metavar="AUC", help="Leave out negatives until the text alone tells no more: 0.65."),
    ] = None,
    guide: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Leave out negatives that this model takes for their captions.")
    ] = None,
    above: Annotated[
        float | None, typer.Option("--alike", metavar="COSINE", help=f"Of --guide: alike are texts above it; {ALIKE}.")
    ] = None,
    fluent: Annotated[
        str | None,
        typer.Option(
            "--plausible",
            metavar="MODEL",
            help="Leave out negatives that this language model (transformers) finds less likely than their captions.",
        ),
    ] = None,
    nats: Annotated[
        float | None,
        typer.Option("--nats", metavar="N", help=f"Of --plausible: less likely by more nats a token; {NATS}."),
    ] = None,
    by: Annotated[
        Balancing | None, typer.Option("--by", help="Of --balance: drop negatives, or weigh them (docs/shards.md).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the shards with what is left.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write findings and samples as a page.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json_path: Json = None,
) -> None:
    """Say how well the text alone tells negatives from captions.

    A classifier over words, word pairs, letters and lengths is fitted on some pictures and asked about others. What it
    can tell, training can learn without looking at the picture.
    """
    if (target is None and guide is None and fluent is None) != (out is None):
        raise UserError("--out DIR belongs to --balance AUC, --guide MODEL or --plausible MODEL")
    if out is not None and sample is not None:
        raise UserError("--sample: to write shards all negatives are judged; leave it out")
    belong("--by", by, "--balance AUC", target)
    belong("--alike", above, "--guide MODEL", guide)
    belong("--nats", nats, "--plausible MODEL", fluent)
    belong("--overwrite", overwrite or None, "--out DIR", out)
    _check_targets(shards, out, [html, json_path], overwrite)
    import numpy as np

    from clipkit.data.shards import write_atomic
    from clipkit.negatives.audit import audit
    from clipkit.negatives.audit.balancing import balance, reweigh, write_balanced
    from clipkit.negatives.audit.page import page
    from clipkit.negatives.audit.stored import read_stored

    stored = read_stored(shards, sample=sample, seed=seed)
    stays = np.ones(len(stored.texts), bool)
    if guide is not None:
        stays[stays], stored = _guided(stored, guide, ALIKE if above is None else above)
    if fluent is not None:
        stays[stays], stored = _plausible(stored, fluent, NATS if nats is None else nats)
    found, balanced, weights = audit(stored, seed=seed), None, None
    if target is not None:
        balanced = (reweigh if by is Balancing.WEIGHT else balance)(stored, target, seed=seed)
        if balanced.weights is not None:
            weights = stays.astype(float)
            weights[stays] = balanced.weights
        stays[stays] = balanced.stays
    if out is not None:
        write_balanced(shards, out, stays, weights=weights, overwrite=overwrite)
    if html:
        write_atomic(html, page(found, ", ".join(shards), balanced).encode())
    if json_path:
        write_json(found.to_json() | ({"balanced": balanced.to_json()} if balanced else {}), json_path)
    if json_path != STDOUT:
        print_tables(audit_tables(found, balanced, out))


def _check_targets(shards: list[str], out: Path | None, files: list[Path | str | None], overwrite: bool) -> None:
    """Raises UserError for what could not be written, before the work."""
    from clipkit.data.shards import expand
    from clipkit.negatives.make import check_free, check_places

    for file in filter(None, files):
        if Path(file).is_dir():
            raise UserError(f"{file}: is a folder; name a file in it")
    if out is not None:
        check_places(expand(shards), out)
    if out is not None and not overwrite:
        check_free(expand(shards), out)


def _plausible(stored: Stored, name: str, above: float) -> tuple[np.ndarray, Stored]:
    """Which negatives the language model leaves, and only those; says how many of each kind it finds unlikely."""
    from clipkit.negatives.audit.guide import by_kind
    from clipkit.negatives.audit.plausible import Fluency, implausible

    gone = implausible(stored, Fluency.load(name), above)
    counts = ", ".join(f"{count} {kind}" for kind, count in by_kind(stored, gone).most_common())
    print(f"{gone.sum()} of {len(gone)} negatives are unlikely for {name}: {counts}", file=sys.stderr)
    if gone.all():
        raise UserError(f"--nats {above}: leaves no negative")
    return ~gone, stored.without(gone)


def _guided(stored: Stored, guide: str, above: float) -> tuple[np.ndarray, Stored]:
    """Which negatives the guide leaves, and only those; says how many of each kind it takes for their captions."""
    from clipkit.model.load import load
    from clipkit.negatives.audit.guide import alike, by_kind

    gone = alike(stored, load(guide), above)
    counts = ", ".join(f"{count} {kind}" for kind, count in by_kind(stored, gone).most_common())
    print(f"{gone.sum()} of {len(gone)} negatives are alike to their captions for {guide}: {counts}", file=sys.stderr)
    if gone.all():
        raise UserError(f"--alike {above}: leaves no negative")
    return ~gone, stored.without(gone)
