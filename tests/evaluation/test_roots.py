"""Where sources lie: folders, tars, several tars, a common folder; and what is refused."""

from __future__ import annotations

import io
import tarfile

import pytest

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Source
from clipkit.evaluation.roots import Roots


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "a.txt").write_bytes(b"a")
    write_tar(tmp_path / "one.tar", {"sub/a.txt": b"a", "b.txt": b"b"})
    write_tar(tmp_path / "more-0.tar", {"x.txt": b"0", "y.txt": b"y"})
    write_tar(tmp_path / "more-1.tar", {"x.txt": b"1"})
    return tmp_path


def test_folder_and_tar_look_alike(places):
    roots = Roots({"folder": places / "folder", "tar": str(places / "one.tar")})
    for src in ("folder", "tar"):
        assert roots.has(src, "sub/a.txt") and not roots.has(src, "c.txt")
        assert roots.read(src, "sub/a.txt") == b"a"
        assert roots.paths(src, "sub") == ["sub/a.txt"]
    assert roots.paths("tar") == ["b.txt", "sub/a.txt"]


def test_several_tars_keep_equal_names_apart(places):
    roots = Roots({"more": str(places / "more-*.tar")})
    assert roots.paths("more") == ["more-1.tar/x.txt", "x.txt", "y.txt"]
    assert roots.read("more", "x.txt") == b"0"
    assert roots.read("more", "more-1.tar/x.txt") == b"1"


def test_common_folder(places):
    roots = Roots({"*": places})
    roots.sources["nice"] = Source(about="nice things", files="more-*.tar")
    assert roots.read("folder", "sub/a.txt") == b"a"
    assert roots.read("one", "b.txt") == b"b"
    assert roots.read("nice", "y.txt") == b"y"
    assert roots.place("nothing") is None


def test_folder_that_holds_the_usual_tars(places):
    roots = Roots({"nice": places})
    roots.sources["nice"] = Source(about="nice things", files="more-*.tar")
    assert roots.read("nice", "y.txt") == b"y"


def test_tars_inside_a_source(places):
    roots = Roots({"all": places})
    assert roots.within("all", "") == "all"
    assert roots.read(roots.within("all", "more-*.tar"), "y.txt") == b"y"
    with pytest.raises(UserError, match=r"source all: no none-\*.tar in it"):
        roots.within("all", "none-*.tar")


@pytest.mark.parametrize("path", ["../one.tar", "/etc/passwd", "sub/../../one.tar", "sub\\a.txt", ""])
def test_paths_stay_inside(places, path):
    roots = Roots({"folder": places / "folder"})
    for ask in (roots.has, roots.read):
        with pytest.raises(UserError, match="must stay inside their source"):
            ask("folder", path)


def test_missing_root_says_what_the_source_is(places):
    roots = Roots()
    roots.sources["coco"] = Source(about="COCO val2017 pictures")
    assert not roots.has("coco", "a.jpg")
    with pytest.raises(UserError, match=r"source coco \(COCO val2017 pictures\) has no root"):
        roots.read("coco", "a.jpg")
    with pytest.raises(UserError, match=r"roots: coco=.*/none: no such folder or tar"):
        Roots({"coco": places / "none"}).has("coco", "a.jpg")
