"""The command line. Nothing heavy is imported before a command runs, so `clipkit --help` is instant.

Exit status: 0 success; 2 the user's mistake, one message on standard error; 130 interrupted; 1 ours, with a traceback;
`guard.requeue_code` (75) a training that was told to stop and has saved; a rank that ends because another failed ends
with that one's status.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import clipkit
from clipkit.commands import data, evaluation, export, hardness, launch, negatives, planning, probes, runs
from clipkit.commands.output import says_first
from clipkit.errors import PeerFailed, Stopped, UserError


class Commands(TyperGroup):
    """Turns a user's mistake into one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if says_first(str(error)):
                print(error, file=sys.stderr)
            raise typer.Exit(2) from None
        except (Stopped, PeerFailed) as ended:
            print(ended, file=sys.stderr)
            raise typer.Exit(ended.code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _group(help: str, commands: dict[str, Callable[..., None]], **options: Any) -> typer.Typer:
    group = typer.Typer(help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None, **options)
    for name, command in commands.items():
        group.command(name)(command)
    return group


app = _group(
    "Train and judge CLIP-style dual encoders.",
    {
        "train": runs.train,
        "launch": launch.launch,
        "plan": planning.plan,
        "eval": evaluation.evaluate,
        "zeroshot": evaluation.zeroshot,
        "compare": evaluation.compare,
        "merge": evaluation.merge,
        "export": export.export,
        "probe": probes.probe,
        "sweep": runs.sweep,
        "methods": runs.list_methods,
        "demo": runs.demo,
    },
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GROUPS = {
    "config": ("Show and check configs.", {"show": runs.show, "check": runs.check, "schema": runs.schema}),
    "shards": (
        "Write, check, show, tag and embed tar shards.",
        {
            "build": data.build,
            "index": data.index,
            "check": data.check,
            "show": data.show,
            "stats": data.stats,
            "tags": data.tags,
            "nouns": data.nouns,
            "reshard": data.reshard,
            "embed": data.embed,
        },
    ),
    "negatives": (
        "Make and audit hard-negative captions.",
        {
            "make": negatives.make,
            "ask": negatives.ask,
            "audit": negatives.audit,
            "score": hardness.score,
            "mine": hardness.mine,
            "pictures": hardness.pictures,
        },
    ),
    "world": ("The generated picture world.", {"build": data.build_world}),
    "bench": (
        "Benchmarks: list, get, convert, check.",
        {
            "list": evaluation.list_benchmarks,
            "get": evaluation.get,
            "convert": evaluation.convert,
            "folders": evaluation.folders,
            "check": evaluation.check,
        },
    ),
}
for _name, (_help, _commands) in GROUPS.items():
    app.add_typer(_group(_help, _commands), name=_name)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"clipkit {clipkit.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


def main() -> None:
    """Entry point of `clipkit` and `python -m clipkit`."""
    app()
