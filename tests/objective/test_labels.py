"""Tags and classes: closed forms, and what is left out where nothing is known."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, log, log1p
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from tests.objective import oracle
from tests.objective.cases import orthonormal, ragged, run
from tests.objective.test_world import share
from tests.ranks import run_ranks

V = 7


def tagged(n: int = 5) -> Embeddings:
    """Logits of zero; the last picture has no tags."""
    tags = torch.zeros(n, V, dtype=torch.bool)
    tags[torch.arange(n - 1), torch.arange(n - 1)] = True
    return replace(orthonormal(n), tag_logits=torch.zeros(n, V, dtype=torch.float64), tags=tags)


def close(got: Tensor, expected: float) -> None:
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_logits_of_zero() -> None:
    """HQ-CLIP's and CatLIP's: V log 2 as a sum over words, log 2 as their mean."""
    close(run("stc", tagged()), log(2))
    close(run("stc", tagged(), reduction="sum"), V * log(2))


def test_pictures_without_tags_add_nothing() -> None:
    z = tagged()
    assert z.tag_logits is not None and z.tags is not None
    other = z.tag_logits.clone()
    other[-1] = torch.arange(V)
    other.requires_grad_()
    value = run("stc", replace(z, tag_logits=other))
    close(value, log(2))
    value.backward()
    assert other.grad is not None and not other.grad[-1].any() and other.grad[:-1].all()
    nothing = replace(z, tag_logits=other, tags=torch.zeros_like(z.tags))
    close(run("stc", nothing), 0.0)
    assert run("stc", nothing).requires_grad, "a batch without tags still has a gradient, of 0"


def test_negative_descriptions_like_the_positive() -> None:
    """HQ-CLIP's other part, `igc` with K = 1, at its limit."""
    z = orthonormal(4, 1)
    close(run("igc", replace(z, negative_text=z.text[:, None])), log(2))


def classes(sizes: list[int], d: int = 8) -> Embeddings:
    """Classes in one point each, at right angles, on both sides."""
    label = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    table = torch.eye(d, dtype=torch.float64)[label]
    return Embeddings(table, table, label=label, scale=10.0)


def test_separated_classes_have_minus_their_mean_frequency() -> None:
    sizes = [3, 1, 4]
    share = sum(size * size for size in sizes) / 8 / 8
    close(run("class_similarity", classes(sizes), of="image"), -share)
    close(run("class_similarity", classes(sizes)), -2 * share)
    close(run("class_similarity", classes([8])), -2.0)


def test_pairs_without_a_class_take_no_part() -> None:
    z = ragged()
    assert z.label is not None
    known = z.label >= 0
    some = Embeddings(z.image[known], z.text[known], label=z.label[known])
    close(run("class_similarity", z), run("class_similarity", some).item())
    close(run("class_similarity", replace(z, label=torch.full_like(z.label, -1))), 0.0)


def test_repeated_class_prompts_are_no_negatives() -> None:
    """The paper's targets are 0, 1, 2 ...: every other picture of the class counts as wrong."""
    z = classes([2, 2])
    close(run("infonce", z, mask_same_label=True), log1p(2 * exp(-10)))
    close(run("infonce", z), log(2) + log1p(exp(-10)))
    unknown = replace(z, label=torch.tensor([0, 0, -1, -1]))
    close(run("infonce", unknown, mask_same_label=True), (log1p(2 * exp(-10)) + log(2 + 2 * exp(-10))) / 2)
    pictures = replace(unknown, group=torch.tensor([5, 6, 7, 7]))
    close(run("infonce", pictures, mask_same_label=True), log1p(2 * exp(-10)))


def test_supervised_positives_are_those_of_a_group_named_so() -> None:
    z = ragged()
    named = torch.tensor([9, 2, 0, 2, 9, 0, 5, 2])  # rows 0 and 4 show one picture and have no class, row 6 is alone
    for settings in ({"log_k1": -inf, "within": True}, {"log_k1": 1.0}):
        assert torch.equal(
            run("tcl", z, positives="label", **settings), run("tcl", replace(z, group=named), **settings)
        )


def attributed() -> Embeddings:
    """Two further captions, one of which may be missing where the negatives are not."""
    z = ragged()
    exist = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [1, 1], [1, 0], [0, 0], [1, 0]]).bool()
    return replace(z, positive_text=z.image.flip(0)[:, None].repeat(1, 2, 1) * 1.0, positive_valid=exist)


def test_spurious_attributes_by_loops() -> None:
    z = attributed()
    assert z.positive_text is not None and z.positive_valid is not None and z.valid is not None
    p, rows = oracle.Pairs(z), []
    for i in range(8):
        for own, exists in zip(z.positive_text[i].tolist(), z.positive_valid[i].tolist()):
            if exists and p.n[i]:
                others = [p.scale * oracle.dot(p.v[i], x) for x in p.n[i]]
                rows.append(oracle.cross_entropy(p.scale * oracle.dot(p.v[i], own), others))
    assert 0 < len(rows) < int(z.positive_valid.sum())
    close(run("spurious", z), sum(rows) / len(rows))
    close(run("spurious", replace(z, valid=torch.zeros_like(z.valid))), 0.0)


def all_of(z: Embeddings) -> dict[str, float]:
    return {name: run(name, z).item() for name in ("stc", "class_similarity", "spurious")}


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    local = share(attributed(), rank, world)
    local.tag_logits = local.tag_logits.clone().requires_grad_()  # type: ignore[union-attr]
    z = local.world()
    run("stc", z).backward()
    assert local.tag_logits is not None and local.tag_logits.grad is not None
    return all_of(z) | {"grad": (distributed.all_gather(local.tag_logits.grad) / world).tolist()}


def test_two_ranks_equal_one() -> None:
    """Also with unequal numbers of further captions, tags and classes on them."""
    z = attributed()
    z.tag_logits = z.tag_logits.clone().requires_grad_()  # type: ignore[union-attr]
    expected = all_of(z)
    run("stc", z).backward()
    assert z.tag_logits is not None and z.tag_logits.grad is not None
    for got in run_ranks(on_a_rank, 2):
        torch.testing.assert_close(torch.tensor(got.pop("grad")), z.tag_logits.grad.float(), rtol=0, atol=1e-7)
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("stc", {}, r"needs embeddings\.tag_logits and tags; set data\.tags"),
        ("class_similarity", {}, r"set data\.labels"),
        ("tcl", {"positives": "label"}, r"needs embeddings\.label"),
        ("infonce", {"mask_same_label": True}, r"needs embeddings\.label"),
        ("spurious", {}, r"needs embeddings\.positive_text"),
    ],
)
def test_what_is_missing_is_the_users_mistake(name: str, settings: dict, message: str) -> None:
    z = replace(orthonormal(), negative_image=None)
    with pytest.raises(UserError, match=message):
        run(name, z, **settings)
