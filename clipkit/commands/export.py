"""export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipkit.commands.arguments import Model, Overwrite


def export(
    model: Model,
    to: Annotated[Literal["clipkit", "open_clip", "transformers", "onnx"], typer.Option(help="The form.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    teacher: Annotated[
        bool, typer.Option("--teacher", help="The moving average that the run kept, in place of the student.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model for other programs.

    clipkit: weights and description alone, without what resuming needs. open_clip: its hub layout. transformers: a
    CLIPModel with tokenizer and processor. onnx: two graphs. What was written is read back and compared.
    """
    from clipkit.model.export import export
    from clipkit.model.load import load, load_teacher

    export(load_teacher(model) if teacher else load(model, "cpu"), out, to, overwrite=overwrite, source=model)
    print(f"{out}: {to}, embeds as {model}{' (teacher)' if teacher else ''}")
