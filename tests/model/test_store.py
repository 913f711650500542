"""A model's embeddings in shards: the same as asking the model, resumed to the same bytes, never over what is there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from clipkit import cli
from clipkit.data.build import write_shards
from clipkit.data.decode import read_picture
from clipkit.data.members import picture_bytes, read_sheet
from clipkit.data.shards import Index
from clipkit.data.stored import read_rows
from clipkit.errors import UserError
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.load import save
from clipkit.model.store import embed_shards
from tests.model.tiny import tiny
from tests.training.conftest import tiny_samples

PARTS = ("text", "negatives", "image")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    return build(tiny())


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    write_shards(tiny_samples(9), folder, per_shard=4, progress=False)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_they_are_what_the_model_says(model: DualEncoder, old: Path, tmp_path: Path):
    report = embed_shards(model, old, tmp_path, name="me", parts=PARTS, batch_size=3, progress=False)
    assert (report.shards, report.kept, report.pairs) == (3, 0, 9)
    before, after = Index.load(old), Index.load(tmp_path)
    assert [after.key(id) for id in range(9)] == [before.key(id) for id in range(9)]
    for id in range(9):
        members, sheet = after.read(id), read_sheet(before.read(id))
        assert {k: v for k, v in members.items() if not k.endswith("npy")} == before.read(id)
        rows = {part: read_rows(members[f"me.{part}.npy"], part, sheet) for part in PARTS}
        np.testing.assert_allclose(rows["text"], model.embed_texts(sheet.captions), atol=1e-3)
        picture = read_picture(picture_bytes(members)[1])
        np.testing.assert_allclose(rows["image"], model.embed_images([picture])[0], atol=1e-3)
        negatives = [negative["text"] for group in sheet.negatives for negative in group]
        assert rows["negatives"].shape == (len(negatives), 16)
        if negatives:
            np.testing.assert_allclose(rows["negatives"], model.embed_texts(negatives), atol=1e-3)


def test_taken_up_again_it_ends_with_the_same_bytes(model: DualEncoder, old: Path, tmp_path: Path):
    embed_shards(model, old, tmp_path, name="me", progress=False)
    whole = hashes(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    report = embed_shards(model, old, tmp_path, name="me", progress=False)
    assert (report.kept, report.pairs) == (2, 4) and hashes(tmp_path) == whole
    with pytest.raises(UserError, match=r"holds shards made otherwise \(name: me there, you now\)"):
        embed_shards(model, old, tmp_path, name="you", progress=False)


def test_a_second_set_stands_beside_the_first(model: DualEncoder, old: Path, tmp_path: Path):
    embed_shards(model, old, tmp_path / "one", name="one", progress=False)
    embed_shards(model, tmp_path / "one", tmp_path / "two", name="two", parts=["image"], progress=False)
    found = Index.load(tmp_path / "two").read(0)
    assert {"one.text.npy", "two.image.npy"} <= set(found) and "two.text.npy" not in found


def test_what_it_refuses(model: DualEncoder, old: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no such part; did you mean text"):
        embed_shards(model, old, tmp_path, name="me", parts=["texts"], progress=False)
    with pytest.raises(UserError, match="should be letters, digits"):
        embed_shards(model, old, tmp_path, name="m.e", progress=False)
    with pytest.raises(UserError, match="holds the shards that are read"):
        embed_shards(model, old, old, name="me", progress=False)
    (tmp_path / "x.tar").write_bytes((old / "shard-000000.tar").read_bytes())
    with pytest.raises(UserError, match="holds other shards already"):
        embed_shards(model, old, tmp_path, name="me", progress=False)


def test_the_command(model: DualEncoder, old: Path, tmp_path: Path):
    save(model, tmp_path / "model")
    words = ["shards", "embed", tmp_path / "model", old, "--out", tmp_path / "out", "--name", "me", "--parts", "image"]
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr or done.exception
    assert "3 shards in" in done.stdout and "0 of them made before; 9 pairs embedded" in done.stdout
    assert "me.image.npy" in Index.load(tmp_path / "out").read(8)
