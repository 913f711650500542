"""train, sweep, methods, config, demo."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clipkit.commands.arguments import ConfigFile, Json, Settings, words
from clipkit.commands.output import STDOUT, print_table, write_json
from clipkit.errors import UserError


def train(
    config: ConfigFile,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
) -> None:
    """Train a dual encoder as a config says.

    The scripts in launch/ start it on many processes.
    """
    from clipkit import config as configuration

    checked = configuration.load(config, settings or ())
    from clipkit.model.spec import check_start

    # What is missing or foreign is said before the towers' libraries are imported, which takes seconds.
    check_start(checked.model)
    if checked.data.train or checked.data.sources:
        from clipkit.data.mixture import open_data

        index, plan = open_data(checked)
        from clipkit.data.loader import check_first

        check_first(index, plan, checked.data)
        if int(os.environ.get("RANK", "0")) == 0:
            print(*plan.summary(checked.steps), sep="\n", file=sys.stderr)
    from clipkit.agent import restarted
    from clipkit.training.loop import train

    train(checked, resume=restarted() or resume)


def show(config: ConfigFile, settings: Settings = None) -> None:
    """Print a config with everything filled in."""
    from clipkit import config as configuration

    print(configuration.dump(configuration.load(config, settings or ())), end="")


def schema() -> None:
    """Print the JSON schema of config files."""
    from clipkit import config as configuration

    print(json.dumps(configuration.schema(), indent=1))


def check(config: ConfigFile, settings: Settings = None) -> None:
    """Say whether a config is right.

    Every problem is named at once.
    """
    from clipkit import config as configuration

    checked = configuration.load(config, settings or ())
    print(f"{config}: right; {checked.steps:,} steps of {checked.batch_size:,} pairs, into {checked.run_folder}")


def demo(
    settings: Settings = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where everything is written.")] = Path("demo"),
    pictures: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures of the world to train on.")] = 14_000,
) -> None:
    """Run the whole chain on a generated world.

    Data, negatives, two trainings from one start, evaluation, report: minutes on two cores. What is there already is
    not done again. Settings go to all trainings.
    """
    from clipkit.demo import run

    run(out, pictures=pictures, settings=tuple(settings or ()))


def sweep(
    methods: Annotated[
        list[str] | None,
        typer.Argument(metavar="METHODS KEY=VALUE", help="Configs, and settings for all; default: all."),
    ] = None,
    base: Annotated[
        str, typer.Option("--on", metavar="CONFIG", help="The conditions: data, start, steps, benchmarks.")
    ] = ("world_sweep"),
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where everything is written.")] = Path("sweep"),
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="Every method is trained with each.")] = "0",
    kinds: Annotated[
        str | None,
        typer.Option("--by-kind", metavar="A,B+C,...", help="With negatives: once for each of these kinds alone."),
    ] = None,
) -> None:
    """Compare methods under equal conditions.

    Each is trained and evaluated on the data, from the start, for the steps and with the optimizer of one config;
    sweep.md and sweep.json hold the table. What is there already is not done again. What each kind
    of negatives teaches: clip degla --by-kind swap_nouns,replace_nouns,swap_adjectives+swap_nouns.
    """
    given = methods or []
    names = [item for item in given if "=" not in item]
    if bad := [seed for seed in words(seeds) if not seed.isdigit()]:
        raise UserError(f"--seeds {seeds}: should be whole numbers, found {bad[0]}")
    from clipkit import methods as described
    from clipkit.sweep import markdown, run

    chosen = [int(seed) for seed in words(seeds)]
    overrides = [item for item in given if "=" in item]
    tree = run(names or described.every(), base=base, out=out, seeds=chosen, settings=overrides, kinds=words(kinds))
    print(markdown(tree), end="")


def list_methods(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The whole document, docs/methods.md.")] = False,
    measured: Annotated[
        Path | None, typer.Option("--sweep", metavar="FILE", help="A sweep.json, for the document's last table.")
    ] = None,
    json_path: Json = None,
) -> None:
    """List the methods, what they need and which config trains them."""
    from clipkit import methods

    found = [methods.method(name) for name in methods.every()]
    if as_markdown:
        table = ""
        if measured:
            from clipkit.sweep import markdown, read

            table = markdown(read(measured))
        print(methods.markdown(found, table), end="")
        return
    if json_path:
        write_json(
            [asdict(one) | {"config": one.config.model_dump(mode="json"), "needs": one.needs} for one in found],
            json_path,
        )
    if json_path != STDOUT:
        print_table(["method", "what it is", "needs"], [(one.name, one.title, ", ".join(one.needs)) for one in found])
