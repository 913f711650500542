"""Distances kept from a teacher, and captions against their paraphrases: figures, limits, what changes nothing."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log1p

import pytest
import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective import TERMS
from tests.objective.cases import golden, leaves, orthonormal, ragged, run, unit

PAIRS = 4 * 3 // 2


def images_only(z: Embeddings) -> Embeddings:
    """As `teacher.towers: image` leaves it."""
    assert z.teacher is not None
    return replace(z, teacher=replace(z.teacher, text=None, negative_text=None, valid=None))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_golden_structure(dtype: torch.dtype, tolerance: float):
    """The figure on file is of the images, summed over the pairs of the four."""
    got = run("structure", images_only(golden(dtype)), reference_batch=4)
    assert got.dtype == dtype and got.item() == pytest.approx(0.0357603729, abs=tolerance)


def test_reference_batch_converts_the_papers_sum():
    """A mean over pairs times their number in the batch it was tuned for: 130,816 of 512."""
    z = ragged()
    mean = run("structure", z, reference_batch=2)
    assert run("structure", z).item() == pytest.approx(130_816 * mean.item(), rel=1e-12)


@pytest.mark.parametrize("term", ["structure", "distill"])
def test_a_student_equal_to_its_teacher_gets_nothing(term: str):
    z = ragged()
    assert z.negative_text is not None
    copies = {name: getattr(z, name).clone() for name in ("image", "text", "negative_text")}
    student = replace(z, **copies, teacher=replace(z, teacher=None))
    inputs = leaves(student)
    got = run(term, student)
    got.backward()
    assert (
        got.item() == 0.0 and inputs[0].grad is not None and not any(x.grad.any() for x in inputs if x.grad is not None)
    )


@pytest.mark.parametrize("smooth", [False, True])
def test_a_common_rotation_changes_the_structure_of_nothing(smooth: bool):
    z = ragged()
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    turned = replace(z, image=z.image @ turn, text=z.text @ turn)
    before, after = (run("structure", x, smooth=smooth).item() for x in (z, turned))
    assert after == pytest.approx(before, rel=1e-12)
    assert abs(run("distill", turned) - run("distill", z)) > 1


def test_a_teacher_of_another_width_can_be_followed_in_structure_alone():
    z, g = ragged(), torch.Generator().manual_seed(3)
    z.teacher = Embeddings(unit(g, 8, 10), unit(g, 8, 10))
    by_hand = 0.0
    for own, target in ((z.image, z.teacher.image), (z.text, z.teacher.text)):
        distances = [torch.linalg.norm(x[:, None] - x[None], dim=-1) for x in (own, target)]
        by_hand += ((distances[0] - distances[1]) ** 2).triu(1).sum().item() / 28
    assert run("structure", z, reference_batch=2).item() == pytest.approx(by_hand, abs=1e-12)
    assert run("gist", z).isfinite()


def test_one_side_of_the_teacher():
    """With `teacher.towers: image` or `text` only that side is compared, and the two add up."""
    z = ragged()
    assert z.teacher is not None
    images = images_only(z)
    texts = replace(z, teacher=replace(z.teacher, image=None))
    for term in ("distill", "structure"):
        both = run(term, images) + run(term, texts)
        assert both.item() == pytest.approx(run(term, z).item(), rel=1e-12)
    with pytest.raises(UserError, match=r"needs the teacher's text and found none; see teacher\.towers"):
        run("tgc", images)
    with pytest.raises(UserError, match="needs the teacher's image"):
        run("gist", texts)


def test_equal_embeddings_have_a_finite_slope():
    """Where two pairs coincide, the distance has no slope; it gets none."""
    z = ragged()
    z = replace(z, image=z.image[:1].expand(8, -1).clone(), text=z.text.clone())
    inputs = leaves(z)
    run("structure", z).backward()
    assert inputs[0].grad is not None and not inputs[0].grad.any() and inputs[1].grad is not None


B, S = 5, 7.0


def test_paraphrases_that_say_the_same():
    """T = T' = T'': each of the two contrasts is CLIP's on orthonormal pairs."""
    z = orthonormal(B, scale=S)
    same = replace(z, positive_text=z.text[:, None].expand(-1, 2, -1))
    assert TERMS["paraphrase"](same).item() == pytest.approx(2 * log1p((B - 1) * exp(-S)), abs=1e-12)
    once = replace(z, positive_text=z.text[:, None])
    assert TERMS["paraphrase"](once).item() == pytest.approx(log1p((B - 1) * exp(-S)), abs=1e-12)


def test_the_chain_joins_neighbours_only():
    """T with T', T' with T'', as the paper has it: never T with T''."""
    g = torch.Generator().manual_seed(4)
    t, first, second = (unit(g, B, 6) for _ in range(3))
    z = Embeddings(unit(g, B, 6), t, positive_text=torch.stack([first, second], 1), scale=S)

    def contrast(a: Tensor, b: Tensor) -> float:
        pair = torch.arange(B)
        logits = S * a @ b.T
        return ((cross(logits, pair) + cross(logits.T, pair)) / 2).item()

    cross = torch.nn.functional.cross_entropy
    expected = contrast(t, first) + contrast(first, second)
    assert TERMS["paraphrase"](z).item() == pytest.approx(expected, abs=1e-12)


def test_a_caption_without_paraphrase_is_no_rival():
    """What stands in its place changes neither value nor gradient, and gets none."""
    z, g = ragged(), torch.Generator().manual_seed(5)
    exist = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [0, 1], [1, 1], [1, 0], [0, 0]]).bool()
    found = []
    for _ in range(2):
        table = torch.where(exist[..., None], unit(torch.Generator().manual_seed(6), 8, 2, 6), unit(g, 8, 2, 6) * 9)
        table.requires_grad_()
        text = z.text.clone().requires_grad_()
        value = TERMS["paraphrase"](replace(z, text=text, positive_text=table, positive_valid=exist))
        value.backward()
        assert table.grad is not None and not table.grad[~exist].any() and text.grad is not None
        found.append((value.item(), text.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)
    none = TERMS["paraphrase"](replace(z, positive_text=table.detach(), positive_valid=torch.zeros_like(exist)))
    assert none.item() == 0.0
    with pytest.raises(UserError, match=r"paraphrase: .*data\.positives"):
        TERMS["paraphrase"](z)
