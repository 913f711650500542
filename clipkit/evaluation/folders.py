"""Published sets of labelled pictures as tars of class folders, which zero-shot benchmarks read."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from PIL import Image, UnidentifiedImageError

from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.benchmark import Benchmark, load

Form = Literal["torchvision", "webdataset", "parquet"]
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Encoded pictures that go into the tar as they are, and their suffix."""


class Labelled(NamedTuple):
    """A picture, or its bytes, and the number of its class."""

    picture: Any
    label: int


def export(
    name: str,
    source: str | Path,
    out: str | Path,
    *,
    form: Form = "torchvision",
    download: bool = False,
    label: str = "label",
) -> dict[str, Any]:
    """Write OUT/NAME.tar: the benchmark's pictures, losslessly, in class folders; a name is the number in the source.

    `form` says what `source` is: the root of a torchvision dataset, the one the benchmark names; tars of webdataset
    (KEY.cls beside KEY.jpg); or parquet files as the Hugging Face hub has them (a picture's bytes, and a number in the
    column `label`). Class n is the benchmark's n-th. Returns {"tar", "pictures", "classes"}. Raises UserError for data
    that is not found (torchvision: give `download`), and for numbers of classes that are not the benchmark's.
    """
    benchmark = load(name)
    folders, seen = list(benchmark.classes), set()
    target = Path(out) / f"{benchmark.name}.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    part, number = target.with_name(f".{target.name}.{os.getpid()}"), -1
    try:
        with tarfile.open(part, "w") as tar:
            for number, (picture, place) in enumerate(_read(benchmark, source, form, download, label)):
                if not 0 <= place < len(folders):
                    raise UserError(f"{name}: has {len(folders)} classes, but picture {number} is of class {place}")
                seen.add(place)
                _add(tar, f"{folders[place]}/{number:06}", picture)
        if len(seen) < len(folders):
            raise UserError(f"{name}: has {len(folders)} classes, but the dataset has pictures of {len(seen)} only")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return {"tar": str(target), "pictures": number + 1, "classes": len(folders)}


def _read(benchmark: Benchmark, source: str | Path, form: str, download: bool, label: str) -> Iterator[Labelled]:
    if form == "torchvision":
        return _torchvision(benchmark, source, download)
    if form == "webdataset":
        return _webdataset(_files(source, "tar"))
    if form == "parquet":
        return _parquet(_files(source, "parquet"), label)
    raise UserError(f"--from {form}: no such form{did_you_mean(form, get_args(Form))}")


def _torchvision(benchmark: Benchmark, root: str | Path, download: bool) -> Iterator[Labelled]:
    from torchvision import datasets

    if benchmark.torchvision is None:
        raise UserError(f"{benchmark.name}: names no torchvision dataset; {_how(benchmark)}")
    settings = dict(benchmark.torchvision)
    kind = str(settings.pop("name", ""))
    if kind not in datasets.__all__:
        raise UserError(f"{benchmark.name}: torchvision has no dataset {kind}{did_you_mean(kind, datasets.__all__)}")
    make: Callable[..., Any] = getattr(datasets, kind)
    try:
        data = make(str(root), **settings, **({"download": True} if download else {}))
    except ImportError as error:
        raise UserError(f"torchvision.datasets.{kind}: {error}; pip install 'clipkit[sets]'") from None
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{root}: torchvision.datasets.{kind} finds no data there: {error}") from None
    return (Labelled(picture, int(label)) for picture, label in (data[n] for n in range(len(data))))


def _how(benchmark: Benchmark) -> str:
    return "; ".join(f"{name}: {source.about}" for name, source in benchmark.sources.items()) or "see its file"


def _files(source: str | Path, suffix: str) -> list[Path]:
    """A file, the files of a folder, or of a glob; sorted."""
    path = Path(source)
    inside = path.glob(f"*.{suffix}") if path.is_dir() else path.parent.glob(path.name)
    found = [path] if path.is_file() else sorted(inside)
    if not found:
        raise UserError(f"{source}: no .{suffix} files there (a file, a folder or a glob)")
    return found


def _webdataset(tars: list[Path]) -> Iterator[Labelled]:
    """Pictures of samples with a number in KEY.cls."""
    from clipkit.data.members import PICTURES
    from clipkit.data.shards import TarFolder

    for file in tars:
        tar = TarFolder(file)
        names = tar.paths()
        labels = {name.removesuffix(".cls"): name for name in names if name.endswith(".cls")}
        pictures = {n.rpartition(".")[0]: n for n in names if n.rpartition(".")[2].lower() in PICTURES}
        if not labels:
            raise UserError(f"{file}: holds no KEY.cls, so no labels")
        for key in sorted(labels):
            if key not in pictures:
                raise UserError(f"{file}: {labels[key]} has no picture beside it ({', '.join(PICTURES)})")
            text = tar.read(labels[key]).decode(errors="replace").strip()
            if not text.isdecimal():
                raise UserError(f"{file}: {labels[key]} should hold the number of a class, found {text[:40]!r}")
            yield Labelled(tar.read(pictures[key]), int(text))


def _parquet(files: list[Path], label: str) -> Iterator[Labelled]:
    """Rows of a picture {bytes} and a number."""
    from clipkit.evaluation import parquet

    for file in files:
        table = parquet.open_file(file)
        names = table.schema_arrow.names
        paths = {table.schema.column(n).path for n in range(len(table.schema))}
        pictures = [name for name in names if f"{name}.bytes" in paths]
        if len(pictures) != 1 or label not in names:
            raise UserError(
                f"{file}: should have one column with pictures ({{bytes}}) and one of numbers, {label}; "
                f"found {', '.join(names)}; --label COLUMN names another"
            )
        for row in parquet.rows(table, [pictures[0], label]):
            picture, number = row[pictures[0]], row[label]
            if not picture or picture["bytes"] is None or not isinstance(number, int):
                raise UserError(f"{file}: a row without a picture's bytes, or whose {label} is no number")
            yield Labelled(picture["bytes"], number)


def _add(tar: tarfile.TarFile, name: str, picture: Any) -> None:
    """Bytes as they are where every reader knows the format, else a PNG."""
    data, suffix = picture, "png"
    if isinstance(picture, bytes):
        try:
            opened = Image.open(io.BytesIO(picture))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"picture {name}: {error}") from None
        suffix = KEPT.get(opened.format or "", "")
        picture = None if suffix else opened
    if picture is not None:
        out = io.BytesIO()
        picture.convert("RGB").save(out, "PNG")
        data, suffix = out.getvalue(), "png"
    member = tarfile.TarInfo(f"{name}.{suffix}")
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
