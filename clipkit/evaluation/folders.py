"""torchvision's datasets as tars of class folders, which zero-shot benchmarks read."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.benchmark import Benchmark, load


def export(name: str, root: str | Path, out: str | Path, *, download: bool = False) -> dict[str, Any]:
    """Write OUT/NAME.tar: the pictures of the benchmark's torchvision dataset below `root`, losslessly as PNG.

    A class folder is the class's number in torchvision, a picture's name its number there. Returns {"tar", "pictures",
    "classes"}. Raises UserError for a benchmark that names no dataset, for data that torchvision does not find (give
    `download`), and for numbers of classes that are not the benchmark's.
    """
    benchmark = load(name)
    if benchmark.torchvision is None:
        raise UserError(f"{name}: names no torchvision dataset")
    data, count = _open(benchmark, root, download), len(benchmark.classes)
    target = Path(out) / f"{benchmark.name}.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    part, seen = target.with_name(f".{target.name}.{os.getpid()}"), set()
    try:
        with tarfile.open(part, "w") as tar:
            for number in range(len(data)):
                picture, label = data[number]
                if not 0 <= int(label) < count:
                    raise UserError(f"{name}: has {count} classes, but picture {number} is of class {label}")
                seen.add(int(label))
                _add(tar, f"{int(label):04}/{number:06}.png", picture)
        if len(seen) < count:
            raise UserError(f"{name}: has {count} classes, but the dataset has pictures of {len(seen)} only")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return {"tar": str(target), "pictures": len(data), "classes": count}


def _open(benchmark: Benchmark, root: str | Path, download: bool) -> Any:
    from torchvision import datasets

    settings = dict(benchmark.torchvision or {})
    kind = str(settings.pop("name", ""))
    if kind not in datasets.__all__:
        raise UserError(f"{benchmark.name}: torchvision has no dataset {kind}{did_you_mean(kind, datasets.__all__)}")
    try:
        return getattr(datasets, kind)(str(root), **settings, **({"download": True} if download else {}))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{root}: torchvision.datasets.{kind} finds no data there: {error}") from None


def _add(tar: tarfile.TarFile, name: str, picture: Any) -> None:
    out = io.BytesIO()
    picture.convert("RGB").save(out, "PNG")
    member = tarfile.TarInfo(name)
    member.size = out.tell()
    out.seek(0)
    tar.addfile(member, out)
