"""What users type, shared by the commands: option types, `key=value` pairs, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from clipkit.errors import UserError, did_you_mean
from clipkit.registry import settings_of

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a packaged config.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Replace the file's settings.")]
Json = Annotated[str | None, typer.Option("--json", metavar="PATH", help="Write the result as JSON; - for stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what lies there.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Another seed, other choices.")]
Shards = Annotated[list[str], typer.Argument(metavar="SHARDS", help="Tar shards: paths, globs, URLs or pipe:COMMAND.")]
Workers = Annotated[int, typer.Option(min=1, metavar="N", help="Side by side; the result is the same.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run folder, checkpoint, open_clip NAME[:PRETRAINED], hf-hub:ORG/NAME or transformers folder.",
    ),
]
Roots = Annotated[
    list[str] | None,
    typer.Option("--root", metavar="SOURCE=PATH", help="Where a source of pictures lies; *=FOLDER for all others."),
]


def pairs(items: Iterable[str] | None, option: str) -> dict[str, str]:
    """`NAME=VALUE` items as a dict. Raises UserError naming the option."""
    out = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{option} {item}: is written NAME=VALUE")
        out[name] = value
    return out


def belong(option: str, value: object, owner: str, given: object) -> None:
    """Raises UserError for an option that would be ignored, as the one it belongs to was not given; None: not given."""
    if value is not None and given is None:
        raise UserError(f"{option}: belongs to {owner}, and means nothing without it; give both, or leave it out")


def settings_for(function: Callable[..., Any], items: Iterable[str] | None) -> dict[str, Any]:
    """`--set NAME=VALUE` items as checked keyword arguments of a registered function; every problem at once."""
    from pydantic import TypeAdapter, ValidationError

    from clipkit.config import explain

    known = settings_of(function)
    out: dict[str, Any] = {}
    problems = []
    for name, value in pairs(items, "--set").items():
        if name not in known:
            problems.append(f"{name}: no such setting{did_you_mean(name, known)}")
            continue
        try:
            out[name] = TypeAdapter(known[name].annotation).validate_python(value)
        except ValidationError as error:
            problems += [explain(e | {"loc": (name, *e["loc"])}) for e in error.errors()]
    if problems:
        raise UserError("\n".join(["--set:", *(f"  {p}" for p in problems)]))
    return out


def words(text: str | None) -> list[str]:
    """A comma-separated list, without empty entries."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]
