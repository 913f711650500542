"""The kernel: golden rows of many published methods, its own loops, gradients, empty rows."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.objective.kernel import contrast_rows, log_mask, mean_rows, similarity
from tests.objective import oracle
from tests.objective.cases import golden, table

S = 10.0
B = 4


class Tables:
    """The golden tables in one dtype, negatives flat and sample-major."""

    def __init__(self, dtype: torch.dtype):
        z = golden(dtype)
        assert z.negative_text is not None and z.teacher is not None
        self.v, self.t, self.n, self.t_star = z.image, z.text, z.negative_text.flatten(0, 1), z.teacher.text
        self.v2 = normalize(golden().image + 0.3 * table(2.9, 4), dim=1).to(dtype)
        self.t2 = normalize(golden().text + 0.2 * table(3.1, 4), dim=1).to(dtype)
        self.owner = torch.arange(B).repeat_interleave(2)
        self.eye = torch.eye(B, dtype=torch.bool)
        self.own = self.owner == torch.arange(B)[:, None]
        self.repeat = torch.arange(2 * B) % B == torch.arange(B)[:, None]


def over(logits: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with further candidate columns, and the targets: the diagonal of the first block."""
    every = torch.cat([logits, *more], 1)
    return every, torch.eye(*every.shape, dtype=torch.bool)


def cross_entropy(logits: Tensor, *more: Tensor) -> Tensor:
    return mean_rows(contrast_rows(*over(logits, *more)))


def first_of(positive: Tensor, negatives: Tensor, mask: Tensor) -> Tensor:
    """Rows of [positive, negatives] with the masked negatives only."""
    logits = torch.cat([positive[:, None], negatives], 1)
    keep = torch.cat([torch.ones(len(mask), 1, dtype=torch.bool), mask], 1)
    targets = torch.zeros_like(keep)
    targets[:, 0] = True
    return mean_rows(contrast_rows(logits, targets, log_weights=log_mask(keep)))


def both_ways(rows: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    return (rows(logits) + rows(logits.T)) / 2


def negclip(x: Tables) -> Tensor:
    return (cross_entropy(S * x.v @ x.t.T, S * x.v @ x.n.T) + cross_entropy(S * x.t @ x.v.T)) / 2


def base_own(x: Tables) -> Tensor:
    logits, targets = over(S * x.v @ x.t.T, S * x.v @ x.n.T)
    keep = log_mask(torch.cat([torch.ones_like(x.eye), x.own], 1))
    return (mean_rows(contrast_rows(logits, targets, log_weights=keep)) + cross_entropy(S * x.t @ x.v.T)) / 2


def ce_clip_imc(x: Tables) -> Tensor:
    return first_of(S * (x.v * x.t).sum(1), S * x.t @ x.n.T, torch.ones_like(x.own))


def fsc_global(x: Tables) -> Tensor:
    logits = torch.cat([(x.v * x.t).sum(1, keepdim=True), (x.v[:, None] * x.n.reshape(B, 2, -1)).sum(-1)], 1)
    targets = torch.full_like(logits, 0.02 / 3)
    targets[:, 0] += 0.98
    return mean_rows(contrast_rows(S * logits, targets, gamma=2.0))


def triplet_clip(x: Tables) -> Tensor:
    t2 = x.n[0::2]

    def half(a: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return (cross_entropy(S * a @ p.T, S * a @ q.T) + cross_entropy(S * p @ a.T)) / 2

    return half(x.v, x.t, t2) + half(x.v2, t2, x.t)


def tcl_rows(similarities: Tensor, positive: Tensor, temperature: float, k1: float, alone: Tensor | None) -> Tensor:
    keep = torch.ones_like(positive) if alone is None else ~alone
    log_k1 = log(k1) if k1 else -torch.inf
    pulls = (log_k1 - similarities).masked_fill(~positive, -torch.inf)
    targets = positive.to(similarities.dtype) / positive.sum(1, keepdim=True)
    rows = contrast_rows(similarities / temperature, targets, log_weights=log_mask(keep), extra=pulls)
    return mean_rows(rows)


def tcl(x: Tables, k1: float) -> Tensor:
    z, label = torch.cat([x.v, x.t]), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    alone = torch.eye(8, dtype=torch.bool)
    return tcl_rows(z @ z.T, (label[:, None] == label) & ~alone, 0.1, k1, alone)


def tcl_image_text(x: Tables) -> Tensor:
    group = torch.tensor([0, 0, 1, 1])
    return both_ways(lambda s: tcl_rows(s, group[:, None] == group, 0.1, 5000.0, None), x.v @ x.t.T)


def hn_nce(x: Tables, log_alpha: float, beta: float) -> Tensor:
    def rows(logits: Tensor) -> Tensor:
        hardness = (beta * logits).masked_fill(x.eye, -torch.inf).log_softmax(1) + log(B - 1)
        hardness = hardness.masked_fill(x.eye, 0.0)
        return mean_rows(contrast_rows(logits, x.eye, log_weights=hardness, log_alpha=log_alpha))

    return both_ways(rows, S * x.v @ x.t.T)


def cwcl(x: Tables) -> Tensor:
    likeness = (1 + x.v @ x.v.T) / 2
    return mean_rows(contrast_rows(S * x.v @ x.t.T, likeness / likeness.sum(1, keepdim=True)))


def m2_mix(x: Tables) -> Tensor:
    angle = (x.v * x.t).sum(1, keepdim=True).acos()
    mixed = ((0.3 * angle).sin() * x.v + (0.7 * angle).sin() * x.t) / angle.sin()

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(S * torch.where(x.eye, a @ b.T, a @ mixed.T))

    return rows(x.v, x.t) + rows(x.t, x.v)


def one_to_k(x: Tables) -> Tensor:
    texts = torch.stack([x.t, x.t2], 1).flatten(0, 1)
    return mean_rows(contrast_rows(S * x.v @ texts.T, x.own / 2))


def mv_infonce(x: Tables) -> Tensor:
    logits = S * x.v @ x.t.T
    both = torch.cat([logits, logits.T], 1)
    return mean_rows(contrast_rows(both, torch.cat([x.eye, x.eye], 1), mode="log_sum"))


def gcl(x: Tables) -> Tensor:
    relevance = torch.tensor([1.0, 0.5, 0.25, 0.75])
    return both_ways(lambda s: mean_rows(contrast_rows(s, x.eye), weights=relevance.to(s.dtype)), S * x.v @ x.t.T)


def gist(x: Tables) -> Tensor:
    guide = table(0.7, B) @ table(0.9, B).T
    doubtful = guide > guide.diagonal()[:, None]
    assert doubtful.sum() == 3
    return mean_rows(contrast_rows(S * x.v @ x.t.T, x.eye, log_weights=log_mask(~doubtful)))


GOLDEN: dict[str, tuple[float, Callable[[Tables], Tensor]]] = {
    "InfoNCE i2t rows": (0.0223004099, lambda x: cross_entropy(S * x.v @ x.t.T)),
    "InfoNCE t2i rows": (0.0224840966, lambda x: cross_entropy(S * x.t @ x.v.T)),
    "InfoNCE": (0.0223922532, lambda x: both_ways(cross_entropy, S * x.v @ x.t.T)),
    "NegCLIP": (0.4536639728, negclip),
    "base, own negatives": (0.4408441726, base_own),
    "IGC": (0.8494407754, lambda x: first_of(S * (x.v * x.t).sum(1), S * x.v @ x.n.T, x.own)),
    "IGC, repeat mask": (0.3254322311, lambda x: first_of(S * (x.v * x.t).sum(1), S * x.v @ x.n.T, x.repeat)),
    "TGC": (0.4754882915, lambda x: first_of(S * (x.t * x.t_star).sum(1), S * x.t @ x.n.T, x.own)),
    "TGC, released mask": (0.1066482623, lambda x: first_of(S * (x.t * x.t_star).sum(1), S * x.t @ x.n.T, x.repeat)),
    "CE-CLIP IMC": (3.9983285381, ce_clip_imc),
    "FSC global": (0.3325667959, fsc_global),
    "TripletCLIP": (0.8619486099, triplet_clip),
    "TCL": (7.2325029414, lambda x: tcl(x, 5000.0)),
    "SupCon": (3.3804178587, lambda x: tcl(x, 0.0)),
    "TCL image-text": (6.3866460937, tcl_image_text),
    "HN-NCE": (0.0451467398, lambda x: hn_nce(x, 0.0, 0.5)),
    "DCL": (-4.0492278629, lambda x: hn_nce(x, -torch.inf, 0.0)),
    "CWCL": (2.6481305062, cwcl),
    "m2-mix": (0.1991120808, m2_mix),
    "tau log mean exp": (-1.0295680303, lambda x: 2 * 0.1 * (hn_nce(x, -torch.inf, 0.0) - log(B - 1))),
    "1-to-K": (0.7226571151, one_to_k),
    "MV-InfoNCE": (0.0224008188, mv_infonce),
    "GCL": (0.0175130809, gcl),
    "GIST": (0.0191241288, gist),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("method", GOLDEN)
def test_golden_rows(method: str, dtype: torch.dtype, tolerance: float):
    expected, compute = GOLDEN[method]
    got = compute(Tables(dtype))
    assert got.dtype == dtype
    assert got.item() == pytest.approx(expected, abs=tolerance, rel=tolerance)


def test_limits_of_the_families():
    """HN-NCE without hardness is InfoNCE; e^InfoNCE = 1 + e^DCL row by row; focal rows of uniform logits."""
    x = Tables(torch.float64)
    logits = S * x.v @ x.t.T
    torch.testing.assert_close(hn_nce(x, 0.0, 0.0), both_ways(cross_entropy, logits))
    dcl = contrast_rows(logits, x.eye, log_alpha=-torch.inf)
    torch.testing.assert_close(contrast_rows(logits, x.eye).exp(), 1 + dcl.exp())
    smooth = torch.tensor([[0.985, 0.005, 0.005, 0.005]])
    assert contrast_rows(torch.zeros(1, 4), smooth, gamma=2.0).item() == pytest.approx(0.75**2 * log(4))
    assert contrast_rows(torch.zeros(1, 6), torch.ones(1, 6), mode="log_sum").item() == pytest.approx(0.0, abs=1e-6)


SETTINGS = [
    {},
    {"gamma": 2.0},
    {"gamma": 0.5},
    {"alpha": 0.3, "weights": True},
    {"alpha": 0.0, "extra": True},
    {"mode": "log_sum"},
    {"mode": "log_sum", "weights": True, "extra": True},
    {"gamma": 1.5, "weights": True, "extra": True, "alpha": 2.0},
]


def random_case(settings: dict) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(5, 7, generator=g, dtype=torch.float64)
    targets = torch.rand(5, 7, generator=g, dtype=torch.float64) * (torch.rand(5, 7, generator=g) < 0.4)
    targets[:, 0] = 0.5
    weights = torch.rand(5, 7, generator=g, dtype=torch.float64) * (torch.rand(5, 7, generator=g) < 0.8)
    extra = torch.randn(5, 3, generator=g, dtype=torch.float64)
    if not settings.get("weights"):
        weights = torch.ones_like(weights)
    return logits, targets, weights, extra if settings.get("extra") else None


def run_case(logits: Tensor, targets: Tensor, weights: Tensor, extra: Tensor | None, settings: dict) -> Tensor:
    kept = {key: settings[key] for key in ("gamma", "mode") if key in settings}
    alpha = torch.tensor(settings.get("alpha", 1.0), dtype=torch.float64).log().item()
    return contrast_rows(logits, targets, log_weights=weights.log(), log_alpha=alpha, extra=extra, **kept)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_equal_their_loops(settings: dict):
    logits, targets, weights, extra = random_case(settings)
    kept = {key: settings[key] for key in ("gamma", "mode", "alpha") if key in settings}
    expected = [
        oracle.contrast_row(
            logits[i].tolist(),
            targets[i].tolist(),
            weights[i].tolist(),
            extra=[] if extra is None else extra[i].tolist(),
            **kept,
        )
        for i in range(5)
    ]
    assert run_case(logits, targets, weights, extra, settings).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck(settings: dict):
    logits, targets, weights, extra = random_case(settings)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run_case(x, targets, weights, extra, settings), logits)


@pytest.mark.parametrize("mode", ["mean_log", "log_sum"])
def test_empty_rows_are_zero_without_gradient(mode):
    """No positive; no candidate; neither: 0, and the gradient of the other rows is untouched."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    keep = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    rows = contrast_rows(logits, targets, log_weights=log_mask(keep), mode=mode)
    assert rows[1:].tolist() == [0.0, 0.0, 0.0] and rows[0] > 0
    with torch.autograd.set_detect_anomaly(True):
        rows.sum().backward()
    assert logits.grad is not None and not logits.grad[1:].any() and logits.grad[0].any()
    alone = torch.zeros(1, 1, requires_grad=True)
    single = contrast_rows(alone, torch.ones(1, 1, dtype=torch.bool), log_alpha=-torch.inf, mode=mode)
    single.sum().backward()
    assert single.item() == 0.0 and alone.grad is not None and alone.grad.item() == 0.0
    assert contrast_rows(torch.zeros(2, 0), torch.zeros(2, 0), mode=mode).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits(gamma: float):
    """Far beyond what exp can hold, also for masked candidates: finite value and gradient."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 1e4]], requires_grad=True)
    keep = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    targets = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.0, 0.1], [1.0, 0.0, 0.0]])
    rows = contrast_rows(logits, targets, log_weights=log_mask(keep), gamma=gamma)
    rows.sum().backward()
    assert logits.grad is not None and rows.isfinite().all() and logits.grad.isfinite().all()
    assert logits.grad[2, 2] == 0.0


def test_a_nan_is_not_hidden():
    """A broken embedding must reach the guard of the training loop, not vanish as an empty row."""
    logits = torch.full((1, 3), torch.nan)
    assert contrast_rows(logits, torch.eye(1, 3, dtype=torch.bool)).isnan().all()


def test_mean_rows():
    rows = torch.tensor([1.0, torch.inf, 3.0])
    counted = torch.tensor([True, False, True])
    assert mean_rows(rows, counted=counted).item() == 2.0
    assert mean_rows(rows, counted=~(counted | ~counted)).item() == 0.0
    assert mean_rows(rows[::2], weights=torch.tensor([0.0, 0.5])).item() == 0.75


def test_similarity_is_computed_in_full():
    a = torch.randn(3, 5).bfloat16()
    expected = a.float() @ a.float().T
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(a, a), expected)
        assert torch.equal(similarity(a.float(), a), expected)
    assert similarity(a.double(), a.double()).dtype == torch.float64
