"""What sets each method apart: golden values that need inputs of their own, limits, slopes, and bugs seen elsewhere."""

from __future__ import annotations

from dataclasses import replace
from math import exp, inf, log, log1p

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.synthetic import arcsine, between
from clipkit.objective.weighted import macl_warmth
from tests.objective import oracle
from tests.objective.cases import golden, leaves, orthonormal, ragged, run, table

T2I = 0.0224840966
"""InfoNCE's caption rows on the golden tables."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6}
"""The specification's rounding and kernel, twice where two of its figures are combined."""


def grouped(dtype: torch.dtype) -> Embeddings:
    return replace(golden(dtype), group=torch.tensor([0, 0, 1, 1]))


def with_pictures(dtype: torch.dtype) -> Embeddings:
    z = golden()
    assert z.negative_text is not None
    made = normalize(z.image + 0.3 * table(2.9, 4), dim=1)[:, None].to(dtype)
    return replace(golden(dtype), negative_text=z.negative_text[:, :1].to(dtype), valid=None, negative_image=made)


def two_captions(dtype: torch.dtype) -> Embeddings:
    """Each picture twice, with its caption and a second one."""
    z = golden()
    texts = torch.stack([z.text, normalize(z.text + 0.2 * table(3.1, 4), dim=1)], 1).flatten(0, 1)
    group = torch.arange(4).repeat_interleave(2)
    return Embeddings(z.image.repeat_interleave(2, 0).to(dtype), texts.to(dtype), group=group, scale=10.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden_values_of_other_inputs(dtype: torch.dtype):
    z = golden(dtype)
    assert z.negative_text is not None
    captions = z.negative_text.flatten(0, 1)
    expected = {
        7.2325029414: run("tcl", grouped(dtype), within=True),
        3.3804178587: run("tcl", grouped(dtype), within=True, log_k1=-inf),
        6.3866460937: run("tcl", grouped(dtype)),
        2.6481305062: 2 * run("cwcl", z) - T2I,
        0.8619486099: run("triplet", with_pictures(dtype)),
        0.0175130809: run("gcl", replace(z, relevance=torch.tensor([1, 0.5, 0.25, 0.75], dtype=dtype))),
    }
    exactly = {
        1.4383274757: run("tic", Embeddings(captions, captions), top=3),
        -3.8041049060: run("uniformity", replace(z, text=z.image)),
        0.1267029999: macl_warmth((z.image * z.text).sum(1).mean()) / z.scale,
    }
    for figures, tolerance in ((expected, TOLERANCE), (exactly, {torch.float64: 1e-10, torch.float32: 1e-6})):
        for figure, got in figures.items():
            assert got.dtype == dtype and got.item() == pytest.approx(figure, abs=tolerance[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden_one_to_k(dtype: torch.dtype):
    """The first half is on file; the second, on the four distinct pictures, is plain."""
    z = two_captions(dtype)
    logits = 10 * z.text @ z.image[::2].T
    captions = torch.nn.functional.cross_entropy(logits, torch.arange(4).repeat_interleave(2))
    assert (2 * run("one_to_k", z) - captions).item() == pytest.approx(0.7226571151, abs=TOLERANCE[dtype])


def test_golden_gist():
    """The image rows with the guide on file; the caption rows by their loops."""
    z = replace(golden(), teacher=Embeddings(table(0.7, 4), table(0.9, 4)))
    guide = table(0.7, 4) @ table(0.9, 4).T
    assert (guide > guide.diagonal()[:, None]).sum() == 3
    captions = 0.0
    for i in range(4):
        seen = [float(10 * z.text[i] @ z.image[j]) for j in range(4) if j != i and guide[j, i] <= guide[i, i]]
        captions += oracle.cross_entropy(float(10 * z.text[i] @ z.image[i]), seen) / 4
    assert 2 * run("gist", z).item() - captions == pytest.approx(0.0191241288, abs=1e-10)


def test_golden_macl():
    """The temperature on file is that of the loss: equal rows come out at s = 1 / tau of an unadapted one."""
    z = golden()
    adapted = run("macl", z, alpha=0.5)
    assert adapted.item() == pytest.approx(run("macl", replace(z, scale=1 / 0.1267029999), alpha=0.0).item(), abs=1e-8)


B, S = 12, 7.0


def collapsed(n: int = B) -> Embeddings:
    same = torch.ones(n, 4, dtype=torch.float64) / 2
    return Embeddings(same, same, scale=S)


def close(got: Tensor, expected: float) -> None:
    assert got.item() == pytest.approx(expected, abs=1e-11)


def test_closed_forms_on_orthonormal_pairs():
    z, clip = orthonormal(B), log1p((B - 1) * exp(-S))
    close(run("dcl", z), -S + log(B - 1))
    close(run("dcl", z, within=True), -S + log(2 * (B - 1)))
    close(run("hn_nce", z, beta=0.7), clip)  # equal rivals weigh 1
    close(run("cwcl", z), clip + S * 0.5 * (B - 1) / (1 + 0.5 * (B - 1)) / 2)
    close(run("gist", z), clip)
    close(run("tcl", z, log_k1=-inf), clip)
    close(run("one_to_k", z), clip)
    close(run("gcl", replace(z, relevance=torch.full((B,), 0.5))), clip / 2)
    close(run("imc", z, negatives="own"), log1p(2 * exp(-S)))
    close(run("fsc_global", z, gamma=0.0, smoothing=0.0), log1p(2 * exp(-S)))
    close(run("mv_infonce", z), clip)
    close(run("mv_dhel", z), 2 * log(B - 1) - S - log(2))
    close(run("tic", z), log(10))
    close(run("tic", z, top=100), log(B - 1))
    close(run("alignment", z), 0.0)
    close(run("uniformity", z), -4.0)
    close(run("generative_negatives", z), log1p((3 * B - 1) * exp(-S)))
    one = orthonormal(B, 1)
    close(run("triplet", one), log1p((2 * B - 1) * exp(-S)) + log1p((B - 1) * exp(-S)))


def test_closed_forms_of_collapsed_embeddings():
    z = collapsed()
    for name in ("hn_nce", "cwcl", "mv_infonce"):
        close(run(name, z), log(B))
    close(run("dcl", z), log(B - 1))
    close(run("uniformity", z), 0.0)
    close(run("alignment", z), 0.0)
    group = torch.arange(B) // 3
    pulled = log(3 + (B - 3) + exp(2.0) * 3 * exp(-1 - S))
    close(run("tcl", replace(z, group=group), log_k1=2.0), pulled)
    independent = replace(z, image=torch.eye(2 * B)[:B].double(), text=torch.eye(2 * B)[B:].double())
    close(run("alignment", independent), 2.0)


# dcl, hn_nce


def test_hn_nce_between_infonce_and_dcl():
    z = ragged()
    close(run("hn_nce", z, beta=0.0), run("infonce", z, negatives="none").item())
    close(run("hn_nce", z, alpha=0.0, beta=0.0), run("dcl", z).item())
    values = [run("hn_nce", z, beta=beta).item() for beta in (0.0, 0.25, 0.5, 1.0)]
    assert values == sorted(values) and values[0] < values[-1]


def test_hn_nces_weights_belong_to_their_rows():
    """A copy in circulation normalises them along the wrong axis; whatever the axis, both directions must be alike."""
    z = ragged()
    close(run("hn_nce", z), run("hn_nce", replace(z, image=z.text, text=z.image)).item())


def test_detached_weights_change_the_slope_alone():
    z = ragged()
    slopes = []
    for detach in (False, True):
        inputs = leaves(replace(z, image=z.image.detach().clone()))
        fresh = replace(z, image=inputs[0])
        loss = run("hn_nce", fresh, detach_weights=detach)
        slopes.append((loss.item(), torch.autograd.grad(loss, inputs[0])[0]))
    assert slopes[0][0] == slopes[1][0] and not torch.allclose(slopes[0][1], slopes[1][1], atol=1e-3)


def test_weighted_dcl():
    """Weights average to 1: pairs that are all alike make it plain; the worst aligned pair weighs most."""
    close(run("dcl", orthonormal(B), sigma=0.5), run("dcl", orthonormal(B)).item())
    z = ragged()
    pairs = (z.image * z.text).sum(1)
    weights = 2 - len(z) * (pairs / 0.5).softmax(0)
    close(weights.mean(), 1.0)
    expected = run("dcl", z) + 9.0 * ((1 - weights) * pairs).mean()
    close(run("dcl", z, sigma=0.5), expected.item())


def test_a_masked_self_similarity_does_not_leak_at_scale_100():
    """The released mask adds -103.6 to the logits, less than a self-similarity of 1 at temperature 0.01 puts on top."""
    close(run("dcl", orthonormal(B, scale=100.0), within=True), -100 + log(2 * (B - 1)))


# tcl


def test_slopes_of_tcl():
    """d/ds_p = -s/|P| + (s e^{s c_p} - k1 e^{-c_p}) / D, d/ds_n = k2 s e^{s c_n} / D, per row of the image side."""
    z = replace(ragged(), group=torch.tensor([0, 0, 0, 1, 1, 2, 3, 4]))
    cosines = (z.image @ z.text.T).detach().requires_grad_()
    k1, k2, s = 40.0, 1.5, 9.0
    same = z.group[:, None] == z.group
    grams = torch.eye(8, dtype=torch.float64)
    fake = Embeddings(grams, cosines.T, group=z.group, scale=s)  # image rows see exactly `cosines`
    (slope,) = torch.autograd.grad(2 * 8 * run("tcl", fake, log_k1=log(k1), log_k2=log(k2)), cosines)

    def side(c: Tensor) -> Tensor:
        up = (s * c).exp()
        below = (torch.where(same, up + k1 * (-c).exp(), k2 * up)).sum(1, keepdim=True)
        drawn = -s / same.sum(1, keepdim=True) + (s * up - k1 * (-c).exp()) / below
        return torch.where(same, drawn, k2 * s * up / below)

    c = cosines.detach()
    torch.testing.assert_close(slope, side(c) + side(c.T).T, rtol=0, atol=1e-10)


def test_tcls_k1_is_inert_at_clips_temperature():
    z = replace(ragged(), scale=100.0, group=torch.arange(8) // 2)
    z = replace(z, text=normalize(z.image + 0.5 * z.text, dim=1))
    supcon = run("tcl", z, log_k1=-inf).item()
    assert run("tcl", z).item() == pytest.approx(supcon, abs=1e-3)
    assert run("tcl", z, log_k1=120.0).item() > supcon + 1


def test_tcl_without_k2_does_not_see_negatives():
    z = replace(ragged(), group=torch.arange(8) // 2)
    one = run("tcl", z, log_k2=-inf, negatives="all")
    assert z.negative_text is not None
    close(one, run("tcl", replace(z, negative_text=-z.negative_text), log_k2=-inf, negatives="all").item())


# cwcl, gist, macl, gcl


def test_cwcl_with_opposite_pictures_is_infonce():
    """Weights are 1 for the pair and 0 for the other: w = I."""
    z = replace(ragged(), group=torch.arange(8))
    image = torch.stack([z.image[0], -z.image[0]])
    two = Embeddings(image, z.text[:2], scale=9.0)
    close(run("cwcl", two), run("infonce", two).item())


def test_cwcls_weights_send_no_slope():
    z = replace(ragged(), group=torch.arange(8))
    image = leaves(z)[0]
    got = torch.autograd.grad(run("cwcl", z), image)[0]
    weights = ((1 + image @ image.T) / 2).detach()
    logits = 9.0 * image @ z.text.T
    soft = -(weights / weights.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    plain = torch.nn.functional.cross_entropy(logits.T, torch.arange(8))
    torch.testing.assert_close(got, torch.autograd.grad((soft + plain) / 2, image)[0], rtol=0, atol=1e-12)


def test_gist_masks_less_the_surer_the_guide():
    z = ragged()
    values = [run("gist", z, margin=margin).item() for margin in (0.0, 0.3, 0.8, 2.0)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(0.0, abs=1e-12)
    guide = orthonormal(8, 3).teacher
    assert guide is not None
    close(run("gist", replace(z, teacher=guide)), run("infonce", z, negatives="none").item())


def test_masked_candidates_get_no_slope():
    """The guide finds picture 0 nearer to caption 1 than either pair: neither feels the other."""
    guide = orthonormal(8, 3).teacher
    assert guide is not None
    image = guide.image.clone()
    image[0] = 0.6 * guide.text[0] + 0.8 * guide.text[1]
    image[1] = 0.6 * guide.text[1] + 0.8 * guide.text[2]
    z = replace(ragged(), teacher=replace(guide, image=image), group=torch.arange(8))
    picture = leaves(z)[0]
    moved = z.text.detach().clone()
    moved[1] = -moved[1]
    before, after = (torch.autograd.grad(run("gist", replace(z, text=x)), picture)[0] for x in (z.text.detach(), moved))
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[2], after[2], atol=1e-6)


def test_macl_tends_to_one_and_has_the_slope_of_dcl():
    close(run("macl", orthonormal(B, scale=80.0), alpha=0.0), 1.0)
    half = replace(orthonormal(B, scale=1000.0), image=orthonormal(B).image.float(), text=orthonormal(B).text.float())
    assert run("macl", half).item() == 1.0
    z = ragged()
    inputs = leaves(z)[:2]
    aligned = (z.image * z.text).sum(1).mean().item()
    got = torch.autograd.grad(run("macl", z), inputs)
    expected = torch.autograd.grad(run("dcl", replace(z, scale=9.0 / (1 + 0.5 * aligned))), inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_pair_of_no_relevance_is_still_a_rival():
    z = replace(ragged(), group=torch.arange(8))
    relevance = torch.ones(8)
    close(run("gcl", replace(z, relevance=relevance)), run("infonce", z, negatives="none").item())
    relevance[3] = 0
    image = leaves(replace(z, relevance=relevance))[0]
    assert torch.autograd.grad(run("gcl", replace(z, relevance=relevance)), image)[0][3].abs().max() > 1e-4
    with pytest.raises(UserError, match=r"gcl: needs embeddings\.relevance"):
        run("gcl", replace(z, relevance=None))


# imc, fsc_global


def test_every_caption_of_imc_has_its_own_positive():
    """A later release labels every row with the first negative of the first pair."""
    z = orthonormal(4, 2)
    close(run("imc", z), log1p(8 * exp(-S)))
    assert z.negative_text is not None
    drawn = replace(z, text=z.negative_text[0, 0].expand(4, -1))
    assert run("imc", drawn) > run("imc", z) + 1


@pytest.mark.parametrize("smoothing", [0.0, 0.02, 0.5])
def test_focal_rows_of_uniform_logits(smoothing: float):
    same = torch.ones(4, 3, 4, dtype=torch.float64) / 2
    z = Embeddings(same[:, 0], same[:, 0], same, scale=S)
    close(run("fsc_global", z, smoothing=smoothing), 0.75**2 * log(4))


def test_negatives_that_do_not_exist_leave_the_softmax():
    """In the released code they stay with logit 0, which the others, at -s, lose to."""
    z = orthonormal(4, 3)
    z = replace(z, text=-z.image, negative_text=-z.image[:, None].expand(-1, 3, -1), teacher=None)
    assert z.valid is not None
    valid = torch.arange(3) < torch.tensor([[1], [2], [3], [1]])
    got = run("fsc_global", replace(z, valid=valid), gamma=0.0, smoothing=0.0)
    close(got, (2 * log(2) + log(3) + log(4)) / 4)


def test_a_settled_row_is_left_alone():
    z = orthonormal(4, 2, scale=60.0)
    inputs = leaves(replace(z, image=z.image.clone(), text=z.text.clone()))
    loss = run("fsc_global", replace(z, image=inputs[0]), smoothing=0.0)
    close(loss, 0.0)
    assert torch.autograd.grad(loss, inputs[0])[0].abs().max() < 1e-20


def test_the_local_form_is_the_global_one_on_other_logits():
    z = ragged()
    assert z.negative_text is not None and z.valid is not None
    negatives = z.scale * (z.image[:, None] * z.negative_text).sum(2)
    local = replace(z, local_logit=z.scale * (z.image * z.text).sum(1), negative_local_logit=negatives)
    close(run("fsc_local", local), run("fsc_global", z).item())
    close(run("fsc_local", local, gamma=0.0, smoothing=0.0), run("igc", z).item())
    assert run("fsc_local", replace(local, valid=torch.zeros_like(z.valid))).item() == 0.0
    with pytest.raises(UserError, match=r"fsc_local: needs embeddings\.local_logit and negative_local_logit"):
        run("fsc_local", replace(local, local_logit=None))


# triplet, m2_mix


def test_made_and_real_pairs_stand_alike():
    z = with_pictures(torch.float64)
    assert z.negative_text is not None and z.negative_image is not None
    turned = Embeddings(
        z.negative_image[:, 0], z.negative_text[:, 0], z.text[:, None], z.image[:, None], scale=z.scale, id=z.id
    )
    close(run("triplet", z), run("triplet", turned).item())
    with pytest.raises(UserError, match="needs a negative picture for each negative caption"):
        run("triplet", golden())


def test_a_negative_caption_without_a_picture_is_no_pair():
    z = with_pictures(torch.float64)
    assert z.negative_image is not None
    pictured = torch.arange(len(z))[:, None] != 1
    blank = replace(
        z, negative_image=z.negative_image.masked_fill(~pictured[..., None], 0.0), negative_image_valid=pictured
    )
    other = replace(blank, negative_image=torch.where(pictured[..., None], z.negative_image, z.negative_image.flip(0)))
    close(run("triplet", blank), run("triplet", other).item())
    none = replace(z, negative_image_valid=torch.zeros_like(pictured))
    close(run("triplet", none), run("infonce", none).item())


def test_a_negative_equal_to_its_caption_cannot_be_told_apart():
    z = orthonormal(4, 1, scale=400.0)
    z = replace(z, negative_text=z.text[:, None], negative_image=z.image[:, None])
    close(run("triplet", z), 2 * log(2) / 2)


def test_made_pairs_are_pairs_like_others():
    """CLIP on the flattened batch of those that exist, whichever of them were made; real ones alone are CLIP."""
    z = ragged()
    assert z.negative_text is not None and z.negative_image is not None and z.valid is not None
    kept = z.valid & (torch.arange(3) != 1)
    image, text = torch.cat([z.image, z.negative_image[kept]]), torch.cat([z.text, z.negative_text[kept]])
    flat = Embeddings(image, text, group=torch.cat([z.group, 100 + torch.arange(int(kept.sum()))]), scale=z.scale)
    got = run("generative_negatives", replace(z, negative_image_valid=torch.arange(3).expand(8, 3) != 1))
    close(got, run("infonce", flat).item())
    none = replace(z, negative_image_valid=torch.zeros_like(z.valid))
    assert torch.equal(run("generative_negatives", none), run("infonce", z, negatives="none"))
    with pytest.raises(UserError, match="generative_negatives: needs a negative picture for each negative caption"):
        run("generative_negatives", golden())


def test_mixtures_lie_on_the_circle():
    z = ragged()
    for share in (0.0, 0.2, 0.5, 1.0):
        mixed = between(z.image, z.text, share)
        torch.testing.assert_close(mixed.norm(dim=1), torch.ones(8, dtype=torch.float64))
        angle = (z.image * z.text).sum(1).acos()
        torch.testing.assert_close((mixed * z.text).sum(1), (share * angle).cos())
    torch.testing.assert_close(between(z.image, z.text, 1.0), z.image)
    torch.testing.assert_close(between(z.image, z.image, 0.3), z.image)


def test_m2_mix_at_its_ends_is_half_of_infonce():
    """lam = 0 puts captions in the images' rows; lam = 1 pictures in the captions' rows."""
    z = golden()
    logits, pair = 10 * z.image @ z.text.T, torch.eye(4, dtype=torch.bool)

    def cross_entropy(rows: Tensor) -> float:
        return torch.nn.functional.cross_entropy(rows, torch.arange(4)).item()

    def among_their_own(x: Tensor) -> float:
        return cross_entropy(torch.where(pair, logits, 10 * x @ x.T))

    close(run("m2_mix", z, scale=10.0, lam=0.0), cross_entropy(logits) + among_their_own(z.text))
    close(run("m2_mix", z, scale=10.0, lam=1.0), cross_entropy(logits.T) + among_their_own(z.image))


def test_the_share_is_drawn_from_the_ids():
    """The same for any order of them; over many batches Beta(½, ½), whose quartiles are 0.146, 0.5 and 0.854."""
    ids = torch.arange(40) * 17
    assert arcsine(ids) == arcsine(ids.flip(0))
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([arcsine(torch.randint(1 << 40, (32,), generator=g)) for _ in range(2000)])
    quartiles = draws.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    assert quartiles == pytest.approx([0.1464, 0.5, 0.8536], abs=0.06)
    assert draws.min() >= 0 and draws.max() <= 1


# views, groups, uniformity, sigmoid


def test_mv_infonce_of_two_views_is_not_clip():
    z = ragged()
    assert abs(run("mv_infonce", z) - run("infonce", z, negatives="none")) > 1e-2


def test_one_to_k_has_a_floor_and_counts_each_picture_once():
    perfect = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 0)
    z = Embeddings(perfect, perfect, group=torch.arange(4).repeat_interleave(2), scale=60.0)
    close(run("one_to_k", z), log(2) / 2)
    alone = replace(ragged(), group=torch.arange(8))
    close(run("one_to_k", alone), run("infonce", alone, negatives="none").item())


def test_tic_only_repels_and_leaves_near_duplicates():
    gram = replace(ragged(), group=torch.arange(8)).text
    cosines = (gram @ gram.T).requires_grad_()
    fake = Embeddings(gram, gram)
    text = fake.text.requires_grad_()
    (slope,) = torch.autograd.grad(run("tic", fake, top=3), text)
    pushes = torch.autograd.grad(cosines.topk(4).values[:, 1:].logsumexp(1).mean(), cosines)[0]
    assert (pushes >= 0).all()
    torch.testing.assert_close(slope, (pushes + pushes.T) @ gram.detach(), rtol=0, atol=1e-12)
    twins = Embeddings(gram.detach()[[0, 0]], gram.detach()[[0, 0]])
    assert run("tic", twins).item() == 0.0


def test_few_texts_do_not_put_zeros_among_the_nearest():
    """The released code masks with 0 before the top 10 and fails outright on fewer than ten texts."""
    text = torch.tensor([[1.0, 0.0], [-0.8, 0.6], [-0.8, -0.6]], dtype=torch.float64)
    expected = [2 * exp(-0.8), exp(-0.8) + exp(0.28), exp(-0.8) + exp(0.28)]
    close(run("tic", Embeddings(text, text)), sum(map(log, expected)) / 3)


def test_siglip_with_all_captions_of_a_picture():
    z = replace(ragged(), bias=-3.0)
    masked, grouped = run("siglip", z), run("siglip", z, positives="group")
    pair = [9.0 * (z.image[a] @ z.text[b]).item() - 3.0 for a, b in ((0, 4), (4, 0))]
    close(grouped - masked, sum(log1p(exp(-x)) for x in pair) / 8)
    apart = replace(z, group=torch.arange(8))
    close(run("siglip", apart, positives="group"), run("siglip", apart).item())


def test_siglips_best_bias_without_scale():
    bias = torch.tensor(-log(B - 1), dtype=torch.float64, requires_grad=True)
    run("siglip", replace(orthonormal(B), scale=0.0, bias=bias)).backward()
    assert bias.grad is not None and bias.grad.item() == pytest.approx(0.0, abs=1e-12)
