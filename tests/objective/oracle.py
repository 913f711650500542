"""Every term once more, as the plain loops of its definition: slow, obvious, and sharing no code with the package."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

from clipkit.model.embeddings import Embeddings
from tests.objective import oracle_labels, oracle_moving
from tests.objective.pairs import Pairs, Vector, cross_entropy, dot, squared_distance


def infonce(p: Pairs, negatives: str = "all", mask_same_group: bool = True, mask_same_label: bool = False) -> float:
    p = p.classed() if mask_same_label else p
    total = 0.0
    for i in p.rows:
        rivals = p.rivals(i, mask_same_group)
        pair = p.scale * dot(p.v[i], p.t[i])
        texts = [p.t[j] for j in rivals] + p.negatives(i, negatives)
        total += cross_entropy(pair, [p.scale * dot(p.v[i], x) for x in texts])
        total += cross_entropy(pair, [p.scale * dot(p.t[i], p.v[j]) for j in rivals])
    return total / (2 * len(p.rows))


def igc(p: Pairs) -> float:
    rows = [
        cross_entropy(p.scale * dot(p.v[i], p.t[i]), [p.scale * dot(p.v[i], x) for x in p.n[i]])
        for i in p.rows
        if p.n[i]
    ]
    return sum(rows) / len(rows) if rows else 0.0


def tgc(p: Pairs, scale: float = 10.0) -> float:
    rows = [
        cross_entropy(scale * dot(p.t[i], p.t_star[i]), [scale * dot(p.t[i], x) for x in p.n[i]])
        for i in p.rows
        if p.n[i]
    ]
    return sum(rows) / len(rows) if rows else 0.0


def distill(p: Pairs, reference_batch: int = 256) -> float:
    total = 0.0
    for i in p.rows:
        total += squared_distance(p.v[i], p.v_star[i]) + squared_distance(p.t[i], p.t_star[i])
        total += sum(squared_distance(x, y) for x, y in zip(p.n[i], p.n_star[i]))
    return reference_batch * total / len(p.rows)


def siglip(p: Pairs, positives: str = "pair", negatives: str = "none", mask_same_group: bool = True) -> float:
    total = 0.0
    for i in p.rows:
        own = p.alike(i) if positives == "group" else [i]
        others = p.rivals(i, mask_same_group or positives == "group")
        total += sum(math.log(1 + math.exp(-(p.scale * dot(p.v[i], p.t[j]) + p.bias))) for j in own)
        texts = [p.t[j] for j in others] + p.negatives(i, negatives)
        total += sum(math.log(1 + math.exp(p.scale * dot(p.v[i], x) + p.bias)) for x in texts)
    return total / len(p.rows)


def both(p: Pairs) -> list[tuple[list[Vector], list[Vector]]]:
    return [(p.v, p.t), (p.t, p.v)]


def log_sum(logits: list[float]) -> float:
    return math.log(sum(math.exp(x) for x in logits))


def dcl(p: Pairs, sigma: float | None = None, within: bool = False, mask_same_group: bool = True) -> float:
    n, pairs, total = len(p.rows), [dot(v, t) for v, t in zip(p.v, p.t)], 0.0
    for i in p.rows:
        weight = 2 - n * math.exp(pairs[i] / sigma) / sum(math.exp(x / sigma) for x in pairs) if sigma else 1.0
        rivals = p.rivals(i, mask_same_group)
        for anchor, other in both(p):
            against = [other[j] for j in rivals] + ([anchor[j] for j in rivals] if within else [])
            total += -weight * p.scale * pairs[i] + log_sum([p.scale * dot(anchor[i], x) for x in against])
    return total / (2 * n)


def hn_nce(
    p: Pairs, alpha: float = 1.0, beta: float = 0.5, detach_weights: bool = False, mask_same_group: bool = True
) -> float:
    total = 0.0
    for i in p.rows:
        for anchor, other in both(p):
            pair = math.exp(p.scale * dot(anchor[i], other[i]))
            logits = [p.scale * dot(anchor[i], other[j]) for j in p.rivals(i, mask_same_group)]
            norm = sum(math.exp(beta * x) for x in logits)
            weighted = sum(len(logits) * math.exp(beta * x) / norm * math.exp(x) for x in logits)
            total += -math.log(pair / (alpha * pair + weighted))
    return total / (2 * len(p.rows))


def tcl(
    p: Pairs,
    log_k1: float = math.log(5000),
    log_k2: float = 0.0,
    within: bool = False,
    negatives: str = "none",
    positives: str = "group",
) -> float:
    p = p.classed() if positives == "label" else p
    total = 0.0
    for side, (anchor, other) in enumerate(both(p)):
        for i in p.rows:
            positive = [dot(anchor[i], other[j]) for j in p.alike(i)]
            negative = [dot(anchor[i], other[j]) for j in p.rivals(i, True)]
            if within:
                positive += [dot(anchor[i], anchor[j]) for j in p.alike(i) if j != i]
                negative += [dot(anchor[i], anchor[j]) for j in p.rivals(i, True)]
            if within or side == 0:
                negative += [dot(anchor[i], x) for x in p.negatives(i, negatives)]
            below = sum(math.exp(p.scale * x) + math.exp(log_k1 - x) for x in positive)
            below += sum(math.exp(log_k2 + p.scale * x) for x in negative)
            total -= sum(p.scale * x - math.log(below) for x in positive) / len(positive)
    return total / (2 * len(p.rows))


def cwcl(p: Pairs, frozen: str = "image", power: float = 1.0, mask_same_group: bool = True) -> float:
    u, q = (p.v, p.t) if frozen == "image" else (p.t, p.v)
    total = 0.0
    for i in p.rows:
        weights = [((1 + dot(u[i], u[j])) / 2) ** power for j in p.rows]
        logits = [p.scale * dot(u[i], q[j]) for j in p.rows]
        total -= sum(w * (x - log_sum(logits)) for w, x in zip(weights, logits)) / sum(weights)
        rivals = [p.scale * dot(q[i], u[j]) for j in p.rivals(i, mask_same_group)]
        total += cross_entropy(p.scale * dot(q[i], u[i]), rivals)
    return total / (2 * len(p.rows))


def gist(
    p: Pairs, margin: float = 0.0, relative: bool = False, negatives: str = "none", mask_same_group: bool = True
) -> float:
    total = 0.0
    for i in p.rows:
        own = dot(p.v_star[i], p.t_star[i])
        most = (1 - margin) * own if relative else own - margin
        pair, rivals = p.scale * dot(p.v[i], p.t[i]), p.rivals(i, mask_same_group)
        texts = [(p.t[j], p.t_star[j]) for j in rivals]
        owners = {"all": list(p.rows), "own": [i], "none": []}[negatives]
        texts += [both for j in owners for both in zip(p.n[j], p.n_star[j])]
        total += cross_entropy(
            pair, [p.scale * dot(p.v[i], x) for x, guide in texts if dot(p.v_star[i], guide) <= most]
        )
        pictures = [j for j in rivals if dot(p.t_star[i], p.v_star[j]) <= most]
        total += cross_entropy(pair, [p.scale * dot(p.t[i], p.v[j]) for j in pictures])
    return total / (2 * len(p.rows))


def macl(p: Pairs, alpha: float = 0.5, a0: float = 0.0, mask_same_group: bool = True) -> float:
    aligned = sum(dot(v, t) for v, t in zip(p.v, p.t)) / len(p.rows)
    scale, total = p.scale / (1 + alpha * (aligned - a0)), 0.0
    for i in p.rows:
        for anchor, other in both(p):
            rivals = [scale * dot(anchor[i], other[j]) for j in p.rivals(i, mask_same_group)]
            row = cross_entropy(scale * dot(anchor[i], other[i]), rivals)
            total += row / (1 - math.exp(-row))
    return total / (2 * len(p.rows))


def gcl(p: Pairs, mask_same_group: bool = True) -> float:
    total = 0.0
    for i in p.rows:
        for anchor, other in both(p):
            rivals = [p.scale * dot(anchor[i], other[j]) for j in p.rivals(i, mask_same_group)]
            total += p.relevance[i] * cross_entropy(p.scale * dot(anchor[i], other[i]), rivals)
    return total / (2 * len(p.rows))


def one_to_k(p: Pairs) -> float:
    total = 0.0
    for i in p.rows:
        logits = [p.scale * dot(p.v[i], t) for t in p.t]
        total -= sum(logits[j] - log_sum(logits) for j in p.alike(i)) / len(p.alike(i))
        pictures = sum(math.exp(p.scale * dot(p.t[i], p.v[j])) / len(p.alike(j)) for j in p.rows)
        total -= p.scale * dot(p.t[i], p.v[i]) - math.log(pictures)
    return total / (2 * len(p.rows))


def rank(p: Pairs, least: float = 0.0, most: float = 10.0) -> float:
    margin = min(max(0.0, least), most)
    hinges = [
        max(0.0, margin + p.scale * dot(p.v[i], x) - p.scale * dot(p.v[i], p.t[i])) for i in p.rows for x in p.n[i]
    ]
    return sum(hinges) / len(hinges)


def imc(p: Pairs, negatives: str = "all") -> float:
    rows = [
        cross_entropy(p.scale * dot(p.v[i], p.t[i]), [p.scale * dot(p.t[i], x) for x in p.negatives(i, negatives)])
        for i in p.rows
        if p.negatives(i, negatives)
    ]
    return sum(rows) / len(rows)


def calibrated(logits: list[float], gamma: float, smoothing: float) -> float:
    row = 0.0
    for k, x in enumerate(logits):
        log_p = x - log_sum(logits)
        target = smoothing / len(logits) + (1 - smoothing if k == 0 else 0.0)
        row -= target * (1 - math.exp(log_p)) ** gamma * log_p
    return row


def fsc_global(p: Pairs, gamma: float = 2.0, smoothing: float = 0.02) -> float:
    logits = [[p.scale * dot(p.v[i], x) for x in [p.t[i], *p.n[i]]] for i in p.rows if p.n[i]]
    return sum(calibrated(row, gamma, smoothing) for row in logits) / len(logits)


def fsc_local(p: Pairs, gamma: float = 2.0, smoothing: float = 0.02) -> float:
    logits = [[p.local[i], *p.local_n[i]] for i in p.rows if p.local_n[i]]
    return sum(calibrated(row, gamma, smoothing) for row in logits) / len(logits)


def tic(p: Pairs, top: int = 10, cap: float = 0.95, mask_same_group: bool = True) -> float:
    rows = []
    for i in p.rows:
        cosines = [dot(p.t[i], p.t[j]) for j in p.rivals(i, mask_same_group)]
        nearest = sorted((x for x in cosines if x <= cap), reverse=True)[:top]
        if nearest:
            rows.append(log_sum(nearest))
    return sum(rows) / len(rows)


def triplet(p: Pairs, mask_same_group: bool = True) -> float:
    made = [(v, t) for i in p.rows for v, t in zip(p.made[i], p.n[i])]
    total = 0.0
    for i, (image, text) in enumerate(made):
        others = [pair for j, pair in enumerate(made) if j != i]
        logits = [p.scale * dot(image, x) for x in [t for _, t in others] + p.t]
        total += cross_entropy(p.scale * dot(image, text), logits)
        total += cross_entropy(p.scale * dot(image, text), [p.scale * dot(text, v) for v, _ in others])
    return infonce(p, "all", mask_same_group) + total / (2 * len(made))


def m2_mix(p: Pairs, scale: float = 100.0, lam: float | None = None, mask_same_group: bool = True) -> float:
    if lam is None:
        lam = math.sin(math.pi / 2 * (sum(p.id) * 2654435761 % 2**32) / 2**32) ** 2
    mixed = []
    for v, t in zip(p.v, p.t):
        angle = math.acos(dot(v, t))
        a, b = math.sin(lam * angle) / math.sin(angle), math.sin((1 - lam) * angle) / math.sin(angle)
        mixed.append([a * x + b * y for x, y in zip(v, t)])
    total = 0.0
    for i in p.rows:
        for anchor, other in both(p):
            rivals = [scale * dot(anchor[i], mixed[j]) for j in p.rivals(i, mask_same_group)]
            total += cross_entropy(scale * dot(anchor[i], other[i]), rivals)
    return total / len(p.rows)


def mv_infonce(p: Pairs, mask_same_group: bool = True) -> float:
    total, views = 0.0, [p.v, p.t, *p.views]
    ordered = [(a, b) for a in views for b in views if a is not b]
    for i in p.rows:
        every = [i, *p.rivals(i, mask_same_group)]
        pairs = sum(math.exp(p.scale * dot(a[i], b[i])) for a, b in ordered)
        total -= math.log(pairs / sum(math.exp(p.scale * dot(a[i], b[j])) for a, b in ordered for j in every))
    return total / len(p.rows)


def mv_dhel(p: Pairs, mask_same_group: bool = True) -> float:
    total, views = 0.0, [p.v, p.t, *p.views]
    for i in p.rows:
        total -= math.log(sum(math.exp(p.scale * dot(a[i], b[i])) for a in views for b in views if a is not b))
        for view in views:
            total += log_sum([p.scale * dot(view[i], view[j]) for j in p.rivals(i, mask_same_group)])
    return total / len(p.rows)


def tcl_views(p: Pairs, scale: float = 10.0, log_k1: float = math.log(5000), log_k2: float = 0.0) -> float:
    rows, seen = 0.0, [(x, p.group[i]) for view in (p.v, *p.views) for i, x in enumerate(view)]
    for a, (anchor, group) in enumerate(seen):
        others = [(dot(anchor, x), of == group) for b, (x, of) in enumerate(seen) if b != a]
        positive = [x for x, same in others if same]
        below = sum(math.exp(scale * x) + math.exp(log_k1 - x) for x in positive)
        below += sum(math.exp(log_k2 + scale * x) for x, same in others if not same)
        rows -= sum(scale * x - math.log(below) for x in positive) / len(positive)
    return rows / len(seen)


def soft_sort(values: Vector, steepness: float, missing: int = 0) -> list[Vector]:
    """Row i, column r: how likely value i comes out at rank r of an odd-even network, the lowest first.

    `missing` places of the network, its lowest, are not used.
    """
    size, values = len(values), list(values)
    shares = [[float(i == r) for r in range(size)] for i in range(size)]
    for layer in range(size + missing):
        for a in range((layer + missing) % 2, size - 1, 2):
            low, high = values[a], values[a + 1]
            stay = math.atan(steepness * (high - low)) / math.pi + 0.5
            values[a], values[a + 1] = stay * low + (1 - stay) * high, (1 - stay) * low + stay * high
            for row in shares:
                low, high = row[a], row[a + 1]
                row[a], row[a + 1] = stay * low + (1 - stay) * high, (1 - stay) * low + stay * high
    return shares


def groco(p: Pairs, top: int = 10, steepness: float = 1.0, mask_same_group: bool = True) -> float:
    views, rows = [p.v, *p.views], []
    for view in views:
        for i in p.rows:
            positives = sorted(dot(view[i], other[i]) for other in views if other is not view)
            negatives = sorted(dot(view[i], view[j]) for j in p.rivals(i, mask_same_group))[-top:]
            shares = soft_sort([*negatives, *positives], steepness, top - len(negatives))
            above = [sum(row[-len(positives) :]) for row in shares]
            right = [1 - q for q in above[: len(negatives)]] + above[len(negatives) :]
            rows.append(-sum(math.log(q) for q in right) / len(right))
    return sum(rows) / len(rows)


def alignment(p: Pairs, alpha: float = 2.0) -> float:
    return sum(math.sqrt(squared_distance(v, t)) ** alpha for v, t in zip(p.v, p.t)) / len(p.rows)


def uniformity(p: Pairs, t: float = 2.0, mask_same_group: bool = True) -> float:
    total = 0.0
    for x in (p.v, p.t):
        energies = [
            math.exp(-t * squared_distance(x[i], x[j])) for i in p.rows for j in p.rivals(i, mask_same_group) if i < j
        ]
        total += math.log(sum(energies) / len(energies))
    return total / 2


def generative_negatives(p: Pairs, mask_same_group: bool = True) -> float:
    """Every pair that there is, as (picture, caption, group); made ones are of no group."""
    pairs = [(p.v[i], p.t[i], p.group[i]) for i in p.rows]
    pairs += [(v, t, None) for i in p.rows for v, t in zip(p.made[i], p.n[i])]
    total = 0.0
    for i, (v, t, group) in enumerate(pairs):
        rivals = [
            pair
            for j, pair in enumerate(pairs)
            if j != i and not (mask_same_group and group is not None and pair[2] == group)
        ]
        total += cross_entropy(p.scale * dot(v, t), [p.scale * dot(v, x) for _, x, _ in rivals])
        total += cross_entropy(p.scale * dot(v, t), [p.scale * dot(t, x) for x, _, _ in rivals])
    return total / (2 * len(pairs))


def blend(share: float, a: Vector, b: Vector) -> Vector:
    mixed = [share * x + (1 - share) * y for x, y in zip(a, b)]
    length = math.sqrt(dot(mixed, mixed))
    return [x / length for x in mixed]


def mochi(p: Pairs, hardest: int = 1024, mixed: int = 1024, pulled: int = 128, mask_same_group: bool = True) -> float:
    """Of a first batch, behind which there is no queue yet."""
    generator, width = torch.Generator().manual_seed(sum(p.id)), 3 * mixed + 2 * pulled
    table = torch.rand(len(p.rows), 2 * width, generator=generator, dtype=torch.float64).tolist()
    total = 0.0
    for i in p.rows:
        drawn = table[sorted(p.id).index(p.id[i])]
        for side, (query, keys) in enumerate(((p.v, p.t_star), (p.t, p.v_star))):
            u = drawn[side * width : (side + 1) * width]
            rivals = [keys[j] for j in p.rivals(i, mask_same_group)]
            ranked = sorted(rivals, key=lambda key: -dot(query[i], key))[:hardest]
            picks = [ranked[int(share * len(ranked))] for share in u[: 2 * mixed]]
            made = [blend(share, a, b) for share, a, b in zip(u[2 * mixed : 3 * mixed], picks[:mixed], picks[mixed:])]
            for share, b in zip(u[3 * mixed : 3 * mixed + pulled], u[3 * mixed + pulled :]):
                made.append(blend(b / 2, query[i], ranked[int(share * len(ranked))]))
            total += cross_entropy(
                p.scale * dot(query[i], keys[i]), [p.scale * dot(query[i], x) for x in rivals + made]
            )
    return total / (2 * len(p.rows))


def amcl(
    p: Pairs,
    hardest: int = 100,
    beta: float = 1e-4,
    least: float = 1e-5,
    most: float = 2.0,
    mask_same_group: bool = True,
) -> float:
    total = 0.0
    for head, (one, other) in product(range(2), ((0, 1), (1, 0))):
        x, y = ([row[head] for row in p.seen[side]] for side in (one, other))
        for i in p.rows:

            def tau(j: int, i: int = i, x: list = x, y: list = y) -> float:
                return least + (most - least) / (1 + math.exp(dot(x[i][1], y[j][1])))

            hard = sorted(p.rivals(i, mask_same_group), key=lambda j: -dot(x[i][0], y[j][0]))[:hardest]
            total -= dot(x[i][0], y[i][0]) / tau(i)
            total += sum(dot(x[i][0], y[j][0]) / tau(j) for j in hard) / max(1, len(hard))
            total += beta * (3 / 2 * math.log(tau(i)) + 1 / tau(i))
            total -= beta * sum(math.log(tau(j)) + 1 / tau(j) for j in hard)
    return total / (2 * len(p.rows))


def structure(p: Pairs, smooth: bool = False, reference_batch: int = 512) -> float:
    total, pairs = 0.0, [(i, j) for i in p.rows for j in p.rows if i < j]
    for i, j in pairs:
        for own, target in ((p.v, p.v_star), (p.t, p.t_star)):
            x = math.sqrt(squared_distance(own[i], own[j])) - math.sqrt(squared_distance(target[i], target[j]))
            total += (x * x / 2 if abs(x) < 1 else abs(x) - 0.5) if smooth else x * x
    return reference_batch * (reference_batch - 1) / 2 * total / len(pairs)


def paraphrase(p: Pairs, mask_same_group: bool = True) -> float:
    """Of the paraphrases that the cases make up."""
    backwards = [t[::-1] for t in p.t]
    second = [i for i in p.rows if p.relevance[i] > 0.5]
    total = 0.0
    for first, other, rows in ((p.t, backwards, list(p.rows)), (backwards, p.v, second)):
        for i in rows:
            rivals = [j for j in p.rivals(i, mask_same_group) if j in rows]
            for a, b in ((first, other), (other, first)):
                logits = [p.scale * dot(a[i], b[j]) for j in rivals]
                total += cross_entropy(p.scale * dot(a[i], b[i]), logits) / (2 * len(rows))
    return total


TERMS = {
    f.__name__: f
    for f in (
        infonce, igc, tgc, distill, siglip, dcl, hn_nce, tcl, cwcl, gist, macl, gcl, one_to_k, rank, imc, fsc_global,
        tic, triplet, m2_mix, mv_infonce, mv_dhel, alignment, uniformity,
        oracle_moving.sogclr, oracle_moving.isogclr, oracle_moving.fastclip,
        generative_negatives, mochi,
        oracle_labels.stc, oracle_labels.class_similarity, oracle_labels.spurious,
        structure, paraphrase,
        fsc_local, tcl_views, groco, amcl,
    )
}  # fmt: skip


def term(name: str, z: Embeddings, settings: dict[str, Any]) -> float:
    return TERMS[name](Pairs(z), **settings)


def contrast_row(
    logits: Vector,
    targets: Vector,
    weights: Vector,
    alpha: float = 1.0,
    extra: Vector = (),  # type: ignore[assignment]
    gamma: float = 0.0,
    mode: str = "mean_log",
) -> float:
    """One row of the kernel; weights and alpha are plain factors, `extra` are logarithms."""
    below = sum(math.exp(x) for x in extra)
    for x, target, weight in zip(logits, targets, weights):
        below += weight * (alpha if target > 0 else 1.0) * math.exp(x)
    shares = [math.exp(x) / below for x in logits]
    if mode == "log_sum":
        return -math.log(sum(p for p, target in zip(shares, targets) if target > 0))
    return -sum(t * (max(1 - p, 0.0) ** gamma if gamma else 1.0) * math.log(p) for t, p in zip(targets, shares) if t)
