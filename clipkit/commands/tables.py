"""What is said of shards, as rows of tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from clipkit.negatives.audit import Audit
    from clipkit.negatives.audit.balancing import Balance
    from clipkit.negatives.llm import Asked, Cost

LISTED = 20
"""Shards that are listed; the JSON has all."""


class Table(NamedTuple):
    """Rows under a title."""

    title: str
    columns: list[str]
    rows: list[tuple[Any, ...]]


def check_tables(found: dict[str, Any]) -> list[Table]:
    """Problems by reason, by shard (the worst first) and by example."""
    shards = {path: shard for path, shard in found["shards"].items() if shard["problems"]}
    reasons = [
        (why, times, sum(why in shard["problems"] for shard in shards.values()))
        for why, times in found["reasons"].items()
    ]
    worst = sorted(shards.items(), key=lambda item: -sum(item[1]["problems"].values()))
    by_shard = [
        (path, shard["samples"], ", ".join(f"{times} {why}" for why, times in shard["problems"].items()))
        for path, shard in worst[:LISTED]
    ]
    title = f"the worst {LISTED} of {len(worst)} shards with problems" if len(worst) > LISTED else "shards"
    examples = [(where, whole) for some in found["examples"].values() for where, whole in some]
    return [
        Table("problems", ["problem", "times", "shards"], reasons),
        Table(title, ["shard", "pairs", "problems"], by_shard),
        Table("examples", ["for example", "problem"], examples),
    ]


def statistics_tables(found: dict[str, Any]) -> list[Table]:
    """Counts, distributions, kinds of negatives, what repeats."""
    captions, pictures, negatives = found["captions"], found["pictures"], found["negatives"]
    spreads = {
        "captions a pair": captions["a_pair"],
        "words a caption": captions["words"],
        "tokens a caption": captions["tokens"],
        "negatives a caption": negatives["a_caption"],
        "width": pictures["width"],
        "height": pictures["height"],
        "width / height": pictures["aspect"],
        "kB a picture": pictures["kilobytes"],
    }
    columns = list(captions["words"])
    kinds = [
        (kind or "no kind", k["count"], k["captions"], _percent(k["share"])) for kind, k in negatives["kinds"].items()
    ]
    return [
        Table("counts", ["", "number", ""], _counts(found)),
        Table("distributions", ["", *columns], [(name, *s.values()) for name, s in spreads.items()]),
        *([Table("negatives", ["kind", "negatives", "captions with one", "share"], kinds)] if kinds else []),
        *_examples(found["repeats"]),
    ]


def _looked_at(found: dict[str, Any]) -> tuple[int, str]:
    sample = found["sample"]
    if sample is None:
        return found["pairs"], "all"
    return sample["pairs"], f"a sample, seed {sample['seed']}: what follows is about it"


def _counts(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    captions, repeats, groups = found["captions"], found["repeats"], found["groups"]
    beyond, negatives, epoch = captions["beyond_context"], found["negatives"], found["epoch"]
    total, formats = captions["count"], found["pictures"]["formats"]
    rows = [
        ("pairs", found["pairs"], f"{found['shards']} shards, {found['bytes'] / 1e6:,.1f} MB"),
        ("  looked at", *_looked_at(found)),
        ("  unreadable", sum(found["unreadable"].values()), _listed(found["unreadable"])),
        ("captions", total, f"{captions['a_pair']['mean']:.2f} a pair"),
        (
            "  too long",
            beyond["count"],
            f"{_percent(beyond['share'])} beyond {beyond['context']} tokens, and cut",
        ),
        ("  repeated", repeats["captions"]["repeated"], f"{repeats['captions']['distinct']} distinct"),
        ("  shared by pairs", repeats["captions"]["shared_by_pairs"], "say what a caption of another pair says"),
        ("  without negatives", negatives["captions_without"], _percent(negatives["captions_without"] / total)),
        ("negatives", negatives["count"], f"{negatives['a_caption']['mean']:.2f} a caption"),
        ("pictures", sum(formats.values()), _listed(formats)),
        ("  repeated", repeats["pictures"]["repeated"], "byte for byte"),
        (
            "  in no common group",
            repeats["pictures"]["without_common_group"],
            "equal, but taken for different ones",
        ),
        ("groups", groups["count"], f"{groups['pairs']} pairs, at most {groups['largest']} in one"),
    ]
    said = (
        f"estimated from {epoch['sample']} pairs: {epoch['pairs_per_s']:.0f} pairs/s with {epoch['workers']} workers, "
        f"{epoch['size']} pixels, {epoch['negatives']} negatives"
    )
    return [*rows, ("seconds an epoch", round(epoch["seconds"], 1), said)]


def _examples(repeats: dict[str, Any]) -> list[Table]:
    rows = [(e["times"], e["text"], ", ".join(e["where"])) for e in repeats["captions"]["examples"]]
    rows += [(e["times"], "(picture)", ", ".join(e["where"])) for e in repeats["pictures"]["examples"]]
    return [Table("repeated most often", ["times", "what", "where"], rows)] if rows else []


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{times} {name}" for name, times in counts.items())


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def asked_tables(report: Asked, prices: tuple[float, float]) -> list[Table]:
    """What a language model gave, and what went wrong."""
    title = f"{report.captions} captions in {report.shards} shards, {report.kept_shards} of them made before"
    spent = (report.tokens_in * prices[0] + report.tokens_out * prices[1]) / 1e6
    asked = [
        ("questions answered before", report.known),
        ("questions asked", report.asked),
        ("tokens in", report.tokens_in),
        ("tokens out", report.tokens_out),
        *([("cost", round(spent, 2))] if any(prices) else []),
    ]
    troubles = [
        (name, reason, times, report.said.get(reason, ""))
        for name, reasons in (
            ("asked again", report.again),
            ("no answer for good", report.failed),
            ("no answer now: call again", report.unanswered),
        )
        for reason, times in reasons.most_common()
    ]
    made = Table(title, ["kind", "texts", "captions with one", "texts dropped"], report.rows())
    columns = ["what", "reason", "times", "the last time"]
    return [made, Table("asked", ["what", "number"], asked), Table("troubles", columns, troubles)]


def audit_tables(found: Audit, balanced: Balance | None, out: Path | None) -> list[Table]:
    """How well the text tells each kind, and what balancing has left of it in `out`."""
    from clipkit.negatives.audit.page import BALANCED, COLUMNS

    tables = [Table(f"{found.captions} captions of {found.pictures} pictures", list(COLUMNS), found.rows())]
    if balanced:
        rows = [kind.row(name) for name, kind in balanced.kinds.items()]
        tables.append(Table(f"balanced, in {out}", list(BALANCED), rows))
    return tables


def cost_table(costs: list[Cost], prices: tuple[float, float]) -> Table:
    """What is left to ask, by kind and in all."""

    def row(name: str, some: list[Cost], by: str) -> tuple[Any, ...]:
        sent, came = (sum(getattr(cost, side) for cost in some) for side in ("tokens_in", "tokens_out"))
        price = (sent * prices[0] + came * prices[1]) / 1e6
        return (name, sum(cost.requests for cost in some), sent, came, round(price, 2), by)

    rows = [row(cost.kind, [cost], "earlier answers" if cost.measured else "characters") for cost in costs]
    columns = ["kind", "requests", "tokens in", "tokens out", "cost", "by"]
    return Table("left to ask, without repeated attempts", columns, [*rows, row("any", costs, "")])
