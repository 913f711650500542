"""Zero-shot sets as data, and small pictures in the layouts that torchvision, webdataset and Hugging Face have."""

from __future__ import annotations

import csv
import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.errors import UserError
from clipkit.evaluation import benchmark as data
from clipkit.evaluation.folders import export
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.zeroshot import prepare

NUMBERED = {
    "cifar10_full": 10,
    "cifar100": 100,
    "food101": 101,
    "oxford_pets": 37,
    "flowers102": 102,
    "sun397": 397,
    "cars": 196,
    "dtd": 47,
    "caltech101": 101,
    "aircraft": 100,
    "imagenet": 1000,
    "country211": 211,
    "eurosat": 10,
    "fer2013": 7,
    "gtsrb": 43,
    "mnist": 10,
    "pcam": 2,
    "rendered_sst2": 2,
    "stl10": 10,
    "svhn": 10,
}
BY_CLASS = ("caltech101", "aircraft", "flowers102", "oxford_pets", "caltech101_vtab")
"""Those that the field reports as a mean per class."""


@pytest.mark.parametrize("name", NUMBERED)
def test_numbered_by_torchvision(name: str):
    from torchvision import datasets

    found = data.load(name)
    assert list(found.classes) == [f"{n:04}" for n in range(NUMBERED[name])]
    assert found.torchvision is not None and hasattr(datasets, str(found.torchvision["name"]))
    assert all("{}" in template for template in found.templates)
    assert found.official.headline == ("mean_per_class" if name in BY_CLASS else "top1")


def test_imagenet_by_number_and_by_wordnet_id():
    import open_clip

    imagenet = data.load("imagenet")
    names = list(imagenet.classes.values())
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    prompts = [template("x") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [template.replace("{}", "x") for template in imagenet.templates] == prompts
    sketch = data.load("imagenet_sketch").classes
    assert list(sketch.values()) == names and list(sketch) == sorted(sketch)
    assert data.load("imagenet_val").classes == sketch
    assert data.load("imagenet_v2").classes == {f"{n}": name for n, name in enumerate(names)}
    for name in ("imagenet_a", "imagenet_r"):
        found = data.load(name)
        assert len(found.classes) == 200 and found.classes.items() <= sketch.items()
    # Anchors that every list of ImageNet's has.
    assert (sketch["n01440764"], sketch["n02123045"], sketch["n07753592"]) == ("tench", "tabby cat", "banana")
    assert all(data.load(name).templates == imagenet.templates for name in data.suite("imagenet_shifts"))


def test_suites():
    assert len(data.suite("zeroshot11")) == 11 and set(data.suite("zeroshot11")) <= set(NUMBERED)
    assert all(data.load(name).kind == "zeroshot" for name in data.suite("zeroshot_more"))


def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def put(file: Path, content: bytes | str = jpeg()) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def sun397(root: Path) -> list[int]:
    """Classes by ClassName.txt, those of two levels too; pictures in any order of folders."""
    names = [f"/{'abcz'[n % 4]}/place{n}" + ("/outdoor" if n % 5 == 0 else "") for n in range(397)]
    put(root / "SUN397" / "ClassName.txt", "\n".join(names) + "\n")
    for n, name in enumerate(names):
        put(root / "SUN397" / name[1:] / f"sun_{n:03}.jpg")
    return list(range(397))


def cars(root: Path) -> list[int]:
    io_ = pytest.importorskip("scipy.io")
    base, order = root / "stanford_cars", np.random.default_rng(0).permutation(196)
    (base / "devkit").mkdir(parents=True)
    names = np.empty(196, dtype=object)
    names[:] = [f"car {n}" for n in range(196)]
    io_.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    kinds = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    rows = np.array([(1, int(label) + 1, f"{n:05}.jpg") for n, label in enumerate(order)], dtype=kinds)
    io_.savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for n in range(196):
        put(base / "cars_test" / f"{n:05}.jpg")
    return order.tolist()


def aircraft(root: Path) -> list[int]:
    base, order = root / "fgvc-aircraft-2013b" / "data", np.random.default_rng(1).permutation(100)
    put(base / "variants.txt", "".join(f"variant {n:03}\n" for n in range(100)))
    put(base / "images_variant_test.txt", "".join(f"{n:07} variant {v:03}\n" for n, v in enumerate(order)))
    for n in range(100):
        put(base / "images" / f"{n:07}.jpg")
    return order.tolist()


def caltech101(root: Path) -> list[int]:
    """Capitals come before small letters, and the background is left out."""
    base = root / "caltech101" / "101_ObjectCategories"
    for name in ("Faces", "Faces_easy", "Leopards", "Motorbikes", *(f"thing{n:03}" for n in range(97))):
        put(base / name / "image_0001.jpg")
    put(base / "BACKGROUND_Google" / "image_0001.jpg")
    (root / "caltech101" / "Annotations").mkdir()
    return list(range(101))


def eurosat(root: Path) -> list[int]:
    names = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    for name in names.split():
        put(root / "eurosat" / "2750" / name / f"{name}_1.jpg")
    return list(range(10))


def gtsrb(root: Path) -> list[int]:
    order = np.random.default_rng(2).permutation(43)
    ppm = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(ppm, "PPM")
    text = io.StringIO()
    table = csv.writer(text, delimiter=";")
    table.writerow(["Filename", "Width", "ClassId"])
    for n, label in enumerate(order):
        put(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"{n:05}.ppm", ppm.getvalue())
        table.writerow([f"{n:05}.ppm", 8, label])
    put(root / "gtsrb" / "GT-final_test.csv", text.getvalue())
    return order.tolist()


def mnist(root: Path) -> list[int]:
    labels, pixels = bytes(range(9, -1, -1)), bytes(10 * 28 * 28)
    for kind in ("train", "t10k"):
        for name, found in (
            ("images-idx3-ubyte", struct.pack(">IIII", 2051, 10, 28, 28) + pixels),
            ("labels-idx1-ubyte", struct.pack(">II", 2049, 10) + labels),
        ):
            put(root / "MNIST" / "raw" / f"{kind}-{name}", found)
            put(root / "MNIST" / "raw" / f"{kind}-{name}.gz", gzip.compress(found))
    return list(labels)


def svhn(root: Path) -> list[int]:
    """The file calls the digit 0 ten."""
    pytest.importorskip("scipy.io").savemat(
        root / "test_32x32.mat",
        {"X": np.zeros((32, 32, 3, 10), dtype=np.uint8), "y": np.arange(1, 11, dtype=np.uint8)[:, None]},
    )
    return [*range(1, 10), 0]


def stl10(root: Path) -> list[int]:
    base = root / "stl10_binary"
    put(base / "test_X.bin", bytes(10 * 3 * 96 * 96))
    put(base / "test_y.bin", bytes(range(1, 11)))
    put(base / "class_names.txt", "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    return list(range(10))


def country211(root: Path) -> list[int]:
    codes = [a + b for a in "ABCDEFGHIJ" for b in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"][:211]
    for code in codes:
        put(root / "country211" / "test" / code / "1.jpg")
    return list(range(211))


def fer2013(root: Path) -> list[int]:
    rows = [f"{n % 7},{' '.join(['9'] * 48 * 48)},{usage}" for n, usage in enumerate(["PublicTest"] * 7 + ["Training"])]
    put(root / "fer2013" / "fer2013.csv", "\n".join(["emotion,pixels,Usage", *rows]) + "\n")
    return list(range(7))


def pcam(root: Path) -> list[int]:
    h5py = pytest.importorskip("h5py")
    base = root / "pcam"
    base.mkdir()
    for name, key, content in (
        ("x", "x", np.zeros((2, 96, 96, 3), dtype=np.uint8)),
        ("y", "y", np.array([1, 0], dtype=np.uint8).reshape(2, 1, 1, 1)),
    ):
        with h5py.File(base / f"camelyonpatch_level_2_split_test_{name}.h5", "w") as file:
            file[key] = content
    return [1, 0]


def rendered_sst2(root: Path) -> list[int]:
    for name in ("negative", "positive"):
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, "PNG")
        put(root / "rendered-sst2" / "test" / name / "1.png", out.getvalue())
    return [0, 1]


LAYOUTS: list[Callable[[Path], list[int]]] = [
    sun397,
    cars,
    aircraft,
    caltech101,
    eurosat,
    gtsrb,
    mnist,
    svhn,
    stl10,
    country211,
    fer2013,
    pcam,
    rendered_sst2,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_torchvision_layouts(layout: Callable[[Path], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision import datasets

    for module in ("svhn", "stl10", "fer2013"):  # which know the real files by their MD5
        monkeypatch.setattr(getattr(datasets, module), "check_integrity", lambda *args, **kwargs: True)
    name, labels = layout.__name__, layout(tmp_path)
    made = export(name, tmp_path, tmp_path / "out")
    assert made["pictures"] == len(labels)
    task = prepare(data.load(name), Roots({name: tmp_path / "out" / f"{name}.tar"}))
    by_number = {int(Path(p.path).stem): int(label) for p, label in zip(task.pictures, task.labels)}
    if name == "sun397":  # torchvision walks the folders in the file system's order
        assert sorted(by_number.values()) == labels
    else:
        assert [by_number[n] for n in range(len(labels))] == labels


def test_published_folders(tmp_path: Path):
    for name, below in (("imagenet_a", "imagenet-a"), ("imagenet_v2", "imagenetv2-matched-frequency-format-val")):
        found = data.load(name)
        for folder in found.classes:
            put(tmp_path / below / folder / "1.jpeg")
        put(tmp_path / below / "README.txt", "words")
        roots = Roots({"*": tmp_path})
        roots.sources.update(found.sources)
        task = prepare(found, roots)
        assert sorted(task.labels.tolist()) == list(range(len(found.classes)))
        (first,) = [n for n, p in enumerate(task.pictures) if p.path == f"{next(iter(found.classes))}/1.jpeg"]
        assert task.labels[first] == 0
    with pytest.raises(UserError, match="imagenet_a: names no torchvision dataset; imagenet_a: the folder imagenet-a"):
        export("imagenet_a", tmp_path, tmp_path)


def test_webdataset(tmp_path: Path):
    order = np.random.default_rng(3).permutation(102)
    for part in (0, 1):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for n in range(part * 51, part * 51 + 51):
                for ending, content in (("cls", f"{order[n]}\n".encode()), ("jpg", jpeg(n))):
                    member = tarfile.TarInfo(f"s{n:04}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    made = export("caltech101_vtab", tmp_path, tmp_path / "out", form="webdataset")
    assert (made["pictures"], made["classes"]) == (102, 102)
    with tarfile.open(made["tar"]) as tar:
        members = {member.name: tar.extractfile(member) for member in tar}
        assert list(members) == [f"{label:04}/{n:06}.jpg" for n, label in enumerate(order)]
        assert [file.read() for file in members.values() if file] == [jpeg(n) for n in range(102)]  # as they are
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.cls"))
    for change, message in (
        (lambda: None, "a.cls has no picture beside it"),
        (lambda: tarfile.open(tmp_path / "0.tar", "w").close(), "no KEY.cls"),
        (lambda: [file.unlink() for file in tmp_path.glob("*.tar")], "no .tar files there"),
    ):
        change()
        with pytest.raises(UserError, match=message):
            export("caltech101_vtab", tmp_path, tmp_path / "out", form="webdataset")


def test_parquet_as_the_hub_has_it(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    labels = [*range(9, -1, -1)]
    pictures = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in labels]
    table = pyarrow.table({"fine": [n * 2 for n in labels], "label": labels, "img": pictures})
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    made = export("cifar10_full", tmp_path / "test-*.parquet", tmp_path, form="parquet")
    with tarfile.open(made["tar"]) as tar:
        assert tar.getnames() == [f"{label:04}/{n:06}.jpg" for n, label in enumerate(labels)]
    with pytest.raises(UserError, match="one of numbers, coarse; found fine, label, img; --label COLUMN"):
        export("cifar10_full", tmp_path, tmp_path, form="parquet", label="coarse")
    with pytest.raises(UserError, match="has 10 classes, but picture 0 is of class 18"):
        export("cifar10_full", tmp_path, tmp_path, form="parquet", label="fine")
    put(tmp_path / "x.parquet", "nothing")
    with pytest.raises(UserError, match="x.parquet: not a readable parquet file"):
        export("cifar10_full", tmp_path / "x.parquet", tmp_path, form="parquet")
