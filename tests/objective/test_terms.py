"""Every term: golden values, its own loops, gradients, layout, groups and extremes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from math import exp, log, log1p

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective import TERMS, objective
from tests.objective import oracle
from tests.objective.cases import EVERY_TERM, golden, leaves, named, orthonormal, ragged, run, unit

DEGLA = {
    "infonce": {},
    "igc": {"weight": 0.1},
    "tgc": {"weight": 0.1},
    "distill": {"weight": 0.005, "reference_batch": 4},
}
GOLDEN = [
    ("infonce", {"negatives": "none"}, 0.0223922532),
    ("infonce", {}, 0.4536639728),
    ("infonce", {"negatives": "own"}, 0.4408441726),
    ("igc", {}, 0.8494407754),
    ("tgc", {}, 0.4754882915),
    ("tgc", {"mask": "repeat"}, 0.1066482623),
    ("distill", {"reference_batch": 4}, 0.5008240660),
    ("siglip", {}, 4.6705694893),
    ("hn_nce", {"alpha": 1.0, "beta": 0.5}, 0.0451467398),
    ("hn_nce", {"alpha": 0.0, "beta": 0.0}, -4.0492278629),
    ("dcl", {}, -4.0492278629),
    ("imc", {}, 3.9983285381),
    ("fsc_global", {}, 0.3325667959),
    ("rank", {"least": 0.5, "most": 0.5}, 0.2998654753),
    ("m2_mix", {"scale": 10.0, "lam": 0.3}, 0.1991120808),
    ("mv_infonce", {}, 0.0224008188),
    ("mv_dhel", {}, 0.0686598030),
    ("alignment", {}, 0.9318800028),
    ("sogclr", {"gamma": 1.0}, -0.8882481248),
    ("fastclip", {"version": "v1"}, -1.0295680303 / 2),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}

OWN_NEGATIVES = ("igc", "tgc", "rank", "fsc_global", "fsc_local", "spurious")

every_term = pytest.mark.parametrize("case", EVERY_TERM)


def value(case: str, z: Embeddings) -> Tensor:
    return run(named(case), z, **EVERY_TERM[case])


def gradients(case: str, z: Embeddings) -> list[Tensor]:
    inputs = leaves(z)
    value(case, z).backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "settings", "expected"), GOLDEN)
def test_golden_values(name: str, settings: dict, expected: float, dtype: torch.dtype):
    z = replace(golden(dtype), bias=torch.tensor(-10.0, dtype=dtype))
    got = run(name, z, **settings)
    assert got.dtype == dtype and got.shape == ()
    # The specification gives ten decimals.
    assert got.item() == pytest.approx(expected, abs=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden_degla(dtype: torch.dtype):
    total, values = objective(golden(dtype), DEGLA)
    assert total.item() == pytest.approx(0.5886609998, abs=TOLERANCE[dtype])
    assert list(values) == list(DEGLA)
    assert values["igc"].item() == pytest.approx(0.8494407754, abs=TOLERANCE[dtype])
    weights = [1.0, 0.1, 0.1, 0.005]
    assert total.item() == pytest.approx(sum(w * v.item() for w, v in zip(weights, values.values())), abs=1e-6)
    assert not any(v.requires_grad for v in values.values())


@every_term
@pytest.mark.parametrize("seed", range(3))
def test_equals_its_loops(case: str, seed: int):
    z = ragged(seed=seed)
    assert z.valid is not None and z.valid.sum(1).unique().numel() > 2
    expected = oracle.term(named(case), z, EVERY_TERM[case])
    assert value(case, z).item() == pytest.approx(expected, abs=1e-11)


@every_term
def test_gradcheck(case: str):
    z = ragged(n=4, k=2, d=3)
    names = ["image", "text", "negative_text", "scale", "bias", *USED.get(named(case), ())]
    leaves(z)
    inputs, stopped = [getattr(z, name) for name in names], Stopped()

    def compute(*tables: Tensor) -> Tensor:
        with stopped.held():
            return value(case, replace(z, **dict(zip(names, tables))))

    assert torch.autograd.gradcheck(compute, inputs, eps=1e-6, atol=1e-7)


USED = {
    **dict.fromkeys(("triplet", "generative_negatives", "spurious"), ("negative_image",)),
    "stc": ("tag_logits",),
    "amcl": ("image_aspects", "text_aspects"),
    "fsc_local": ("local_logit", "negative_local_logit"),
    **dict.fromkeys(("mv_infonce", "mv_dhel", "tcl_views", "groco"), ("view_image",)),
}
"""Tables beside the usual ones."""


class Stopped:
    """Keeps what a term detaches as it was at the first call, so that finite differences do not move it either."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        first, before = not self.kept, iter(list(self.kept))
        detach = Tensor.detach

        def instead(x: Tensor) -> Tensor:
            if not first:
                return next(before)
            self.kept.append(detach(x).clone())  # the inputs are moved in place
            return self.kept[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "detach", instead)
            yield


@every_term
def test_no_gradient_reaches_the_teacher(case: str):
    z = ragged()
    assert z.teacher is not None and z.teacher.negative_text is not None
    inputs = leaves(z, teacher=True)
    value(case, z).backward()
    assert any(x.grad is not None for x in inputs)
    assert z.teacher.image.grad is None and z.teacher.text.grad is None and z.teacher.negative_text.grad is None


@every_term
def test_permuting_the_batch_changes_nothing(case: str):
    z = ragged()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    assert value(case, rearranged(z, order)).item() == pytest.approx(value(case, z).item(), abs=1e-12)


@every_term
def test_permuting_a_pairs_negatives_changes_nothing(case: str):
    z = ragged()
    assert z.negative_text is not None and z.valid is not None and z.teacher and z.teacher.negative_text is not None
    order = [2, 0, 1]
    assert z.negative_image is not None and z.negative_local_logit is not None
    turned = replace(
        z,
        negative_text=z.negative_text[:, order],
        negative_image=z.negative_image[:, order],
        negative_local_logit=z.negative_local_logit[:, order],
        valid=z.valid[:, order],
        teacher=replace(z.teacher, negative_text=z.teacher.negative_text[:, order]),
    )
    assert value(case, turned).item() == pytest.approx(value(case, z).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("case", "changes"),
    [(c, "own" in c or named(c) in OWN_NEGATIVES) for c in EVERY_TERM],
)
def test_swapping_negatives_between_pairs(case: str, changes: bool):
    """Own-negative terms must notice, all-negative terms must not; pair 0 shares its picture with another."""
    z = ragged()
    assert z.negative_text is not None and z.valid is not None and z.teacher and z.teacher.negative_text is not None
    order = torch.arange(len(z))
    order[0], order[3] = 3, 0
    assert z.negative_image is not None and z.negative_local_logit is not None
    swapped = replace(
        z,
        negative_text=z.negative_text[order],
        negative_image=z.negative_image[order],
        negative_local_logit=z.negative_local_logit[order],
        valid=z.valid[order],
        teacher=replace(z.teacher, negative_text=z.teacher.negative_text[order]),
    )
    difference = abs(value(case, swapped).item() - value(case, z).item())
    assert difference > 1e-3 if changes else difference < 1e-12


@every_term
def test_invalid_negatives_add_nothing(case: str):
    """Whatever stands in the padding: the value and every gradient stay, and the padding gets none."""
    z, other = ragged(), ragged()
    assert z.negative_text is not None and other.negative_text is not None and z.valid is not None
    assert z.negative_local_logit is not None
    other.negative_text = torch.where(z.valid[..., None], z.negative_text, unit(torch.Generator(), 8, 3, 6) * 50)
    other.negative_image = torch.where(z.valid[..., None], z.negative_image, unit(torch.Generator(), 8, 3, 6) * 50)
    other.negative_local_logit = z.negative_local_logit.where(z.valid, torch.tensor(77.0, dtype=torch.float64))
    first, second = gradients(case, z), gradients(case, other)
    torch.testing.assert_close(value(case, z), value(case, other), rtol=0, atol=1e-12)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    assert not any(first[place][~z.valid].any() for place in (2, 5, 8))


@pytest.mark.parametrize("case", ["igc", "tgc", "rank", "rank fixed", "imc", "imc own", "fsc_global"])
def test_no_valid_negative_gives_zero(case: str):
    z = ragged()
    assert z.negative_text is not None and z.valid is not None
    nothing = replace(z, valid=torch.zeros_like(z.valid))
    without = replace(z, negative_text=z.negative_text[:, :0], valid=z.valid[:, :0], negative_local_logit=None)
    for empty in (nothing, without, replace(z, negative_text=None, valid=None)):
        got = gradients(case, empty)
        assert value(case, empty).item() == 0.0
        assert not any(g.any() for g in got)


WITH_NEGATIVES = [c for c in EVERY_TERM if EVERY_TERM[c].get("negatives") in ("own", "all") and named(c) != "imc"]


@pytest.mark.parametrize("case", ["infonce", *WITH_NEGATIVES])
def test_without_negatives_it_is_the_plain_form(case: str):
    """Bit for bit with K = 0 or no table; within rounding when every negative is invalid."""
    z = replace(ragged(), group=torch.arange(8))
    assert z.negative_text is not None and z.valid is not None and z.teacher and z.teacher.negative_text is not None
    plain = EVERY_TERM[case] | {"negatives": "none"}
    images = leaves(z)[0]
    expected = run(named(case), z, **plain)
    slopes = torch.autograd.grad(expected, images)
    teacher = replace(z.teacher, negative_text=z.teacher.negative_text[:, :0], valid=None)
    z = replace(z, negative_image=None, negative_local_logit=None)
    without = replace(z, negative_text=z.negative_text[:, :0].detach(), valid=z.valid[:, :0])
    for empty in (replace(without, teacher=teacher), replace(without, negative_text=None, valid=None)):
        assert torch.equal(value(case, empty), expected)
        z.image.grad = None
        assert torch.equal(gradients(case, empty)[0], slopes[0])
    nothing = replace(z, valid=torch.zeros_like(z.valid))
    torch.testing.assert_close(value(case, nothing), expected, rtol=0, atol=1e-12)


def test_weight_zero_equals_the_rest_bit_for_bit():
    z = golden()
    clip, _ = objective(z, {"infonce": {"negatives": "none"}})
    same, values = objective(z, {"infonce": {"negatives": "none"}, "igc": {"weight": 0}, "tgc": {"weight": 0.0}})
    assert torch.equal(clip, same) and values["igc"] > 0.1


def test_scale_and_bias_get_a_gradient_from_every_objective():
    """DDP waits for one; it is 0 where no term uses them, and a lone term keeps its value."""
    z = ragged()
    _, _, _, scale, bias, *_, tag_logits = leaves(z)
    total, values = objective(z, {"alignment": {}})
    total.backward()
    assert total == values["alignment"]
    assert scale.grad is not None and bias.grad is not None and scale.grad.item() == bias.grad.item() == 0.0
    assert tag_logits.grad is not None and not tag_logits.grad.any()
    total, _ = objective(z, {"stc": {}})
    z.image.grad = None
    total.backward()
    assert z.image.grad is not None and not z.image.grad.any() and tag_logits.grad.any()


def test_a_tower_that_no_term_looks_at_gets_a_gradient_of_zeros():
    """Texts alone, as in ProCLIP's first stage: DDP waits for the parameters behind the pictures, too."""
    z = ragged()
    assert z.teacher is not None
    z.teacher = replace(z.teacher, image=None)
    images, texts, *_ = leaves(z)
    total, _ = objective(z, {"distill": {}})
    total.backward()
    assert images.grad is not None and not images.grad.any() and texts.grad is not None and texts.grad.any()


MASKABLE = [c for c in EVERY_TERM if "mask_same_group" in TERMS.entry(named(c)).settings.keys() - EVERY_TERM[c].keys()]


@pytest.mark.parametrize("case", [c for c in MASKABLE if EVERY_TERM[c].get("positives") != "group"])
def test_captions_of_the_same_picture_are_no_negatives(case: str):
    """By default; with `mask_same_group` off a pair of the same picture is like any other."""
    z, settings = ragged(), EVERY_TERM[case]
    apart = replace(z, group=torch.arange(8))
    masked, plain = run(named(case), z, **settings), run(named(case), apart, **settings)
    assert abs(masked - plain) > 1e-7
    if named(case) in ("infonce", "siglip", "gist", "cwcl", "gcl", "dcl", "m2_mix", "mv_infonce", "mv_dhel", "triplet"):
        assert masked < plain
    torch.testing.assert_close(run(named(case), z, **settings, mask_same_group=False), plain, rtol=0, atol=0)


# With alpha = 0.9 the detached form ends at log 0.9.
ALONE = ("dcl", "hn_nce", "gcl", "macl", "m2_mix", "mv_infonce", "mv_dhel", "uniformity", "tic", "groco")
ALONE += ("sogclr", "isogclr", "fastclip", "mochi")


@pytest.mark.parametrize(
    "case", ["infonce none", "gist", *(c for c in MASKABLE if named(c) in ALONE and c != "hn_nce detached")]
)
def test_one_picture_only(case: str):
    """All captions of one picture: nothing left to contrast with."""
    z = replace(ragged(), group=torch.zeros(8, dtype=torch.int64))
    assert value(case, z).item() == pytest.approx(0.0, abs=1e-12)
    assert all(g.isfinite().all() and g.abs().max() < 1e-9 for g in gradients(case, z))


B, K, S = 5, 2, 7.0


def test_closed_forms():
    z = orthonormal(B, K)
    image_rows, text_rows = log1p((B * (1 + K) - 1) * exp(-S)), log1p((B - 1) * exp(-S))
    expected = {
        "infonce none": text_rows,
        "infonce": (image_rows + text_rows) / 2,
        "infonce own": (log1p((B - 1 + K) * exp(-S)) + text_rows) / 2,
        "igc": log1p(K * exp(-S)),
        "tgc": log1p(K * exp(-7.0)),
        "distill": 0.0,
    }
    for case, closed in expected.items():
        assert value(case, z).item() == pytest.approx(closed, abs=1e-12), case


def test_closed_forms_of_siglip():
    z = replace(orthonormal(B, K), scale=10.0, bias=-10.0)
    assert TERMS["siglip"](z).item() == pytest.approx(log(2) + (B - 1) * log1p(exp(-10)), abs=1e-12)
    assert TERMS["siglip"](replace(z, scale=0.0, bias=None)).item() == pytest.approx(B * log(2), abs=1e-12)
    own = TERMS["siglip"](z, negatives="own") - TERMS["siglip"](z)
    assert own.item() == pytest.approx(K * log1p(exp(-10)), abs=1e-12)


def test_negatives_equal_to_their_caption():
    z = orthonormal(B, K)
    z = replace(z, negative_text=z.text[:, None].expand(-1, K, -1))
    assert TERMS["igc"](z).item() == pytest.approx(log(1 + K), abs=1e-12)
    assert TERMS["tgc"](z).item() == pytest.approx(log(1 + K), abs=1e-12)
    image_rows = log(1 + K + (B - 1) * (1 + K) * exp(-S))
    assert TERMS["infonce"](z).item() == pytest.approx((image_rows + log1p((B - 1) * exp(-S))) / 2, abs=1e-12)


def test_identical_embeddings():
    same = torch.ones(B, 4, dtype=torch.float64) / 2
    assert TERMS["infonce"](Embeddings(same, same, scale=S)).item() == pytest.approx(log(B), abs=1e-12)


def test_gradient_of_infonce_rows():
    """d/dlogits of the image half is (p - onehot) / 2B; with a fresh teacher, distillation has no gradient."""
    z = ragged()
    logits = (z.scale * z.image @ z.text.T).detach()
    scale_gradient = gradients("infonce none", replace(z, group=torch.arange(8)))[3]
    slope = (logits.softmax(1) + logits.softmax(0) - 2 * one_hot(torch.arange(8), 8)) / 16
    assert scale_gradient.item() == pytest.approx((slope * logits / 9.0).sum().item(), abs=1e-12)
    fresh = orthonormal(B, K)
    got = gradients("distill", replace(fresh, image=fresh.image.clone(), text=fresh.text.clone()))
    assert not any(g.any() for g in got)


@every_term
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "equal", "single", "duplicates", "opposite"])
def test_extremes_are_finite(case: str, dtype: torch.dtype, kind: str):
    z = extreme(kind, dtype)
    got = gradients(case, z)
    result = value(case, z)
    assert result.isfinite() and all(g.isfinite().all() for g in got)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in got[:3]] == [dtype] * 3


@every_term
def test_half_precision_is_computed_in_full(case: str):
    """From bf16 tables, also under autocast, the value is that of the same numbers in fp32."""
    half = extreme("random", torch.bfloat16)
    assert half.teacher is not None
    same = replace(half, **{name: getattr(half, name).float() for name in ROLES})
    same.teacher = replace(half.teacher, **{name: getattr(half.teacher, name).float() for name in ROLES[:3]})
    assert torch.equal(value(case, half), value(case, same))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value(case, half), value(case, same))
        assert torch.equal(value(case, same), value(case, half))


ROLES = ("image", "text", "negative_text", "negative_image", "view_image", "local_logit", "negative_local_logit")
ROLES += ("image_aspects", "text_aspects", "tag_logits")


def extreme(kind: str, dtype: torch.dtype) -> Embeddings:
    """Scale 100 and embeddings that break careless softmaxes."""
    z = ragged(n=1 if kind == "single" else 8)
    if kind == "equal":
        z = filled(z, z.image[:1])
    elif kind == "duplicates":
        z = rearranged(z, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    elif kind == "opposite":
        z = replace(z, text=-z.image, negative_text=z.image[:, None].expand(-1, 3, -1))
        z = replace(z, negative_image=-z.negative_text)
    teacher = z.teacher
    assert teacher is not None
    return replace(
        z,
        **{name: getattr(z, name).detach().to(dtype).clone() for name in ROLES},
        teacher=replace(teacher, **{name: getattr(teacher, name).to(dtype) for name in ROLES[:3]}),
        scale=torch.tensor([100.0]),
        bias=torch.tensor([-10.0]),
    )


def filled(z: Embeddings, row: Tensor) -> Embeddings:
    assert z.negative_text is not None
    same = row.expand_as(z.image)
    negatives = row.expand_as(z.negative_text)
    teacher = Embeddings(same, same, negatives)
    views = row.expand(len(z), 2, -1)
    return replace(
        z, image=same, text=same, negative_text=negatives, negative_image=negatives, view_image=views, teacher=teacher
    )


def rearranged(z: Embeddings, order: Tensor) -> Embeddings:
    """Rows in another order (or repeated), in every table."""
    tables = {
        f.name: x[order] for f in fields(z) if isinstance(x := getattr(z, f.name), Tensor) and x.shape[:1] == (len(z),)
    }
    return replace(z, **tables, teacher=z.teacher and rearranged(z.teacher, order))


def test_missing_teacher_and_unknown_term_are_the_users_mistake():
    z = ragged()
    with pytest.raises(UserError, match=r"teacher\.kind"):
        TERMS["tgc"](replace(z, teacher=None))
    with pytest.raises(UserError, match="negative_text"):
        assert z.teacher is not None
        TERMS["distill"](replace(z, teacher=replace(z.teacher, negative_text=None)))
    with pytest.raises(UserError, match="gist: the teacher has no negative_text"):
        run("gist", replace(z, teacher=replace(z.teacher, negative_text=None)), negatives="all")
    with pytest.raises(UserError, match="did you mean infonce"):
        objective(z, {"infonse": {}})
