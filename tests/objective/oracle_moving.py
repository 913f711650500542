"""The terms of moving averages as plain loops. `past` holds what is known of every (side, id) and is moved on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Past = dict[tuple[str, int], dict[str, float]]
"""Of a side and a sample: u, and where there are such: tau, moment, square, visits."""


def mean(x: list[float]) -> float:
    return sum(x) / len(x)


def anchors(p: Any, mask_same_group: bool) -> Iterator[tuple[tuple[str, int], list[float]]]:
    """Each anchor with rivals: its side and id, and h against each of them."""
    for side, mine, others in (("image", p.v, p.t), ("text", p.t, p.v)):
        for i in p.rows:
            cosines = [sum(x * y for x, y in zip(mine[i], other)) for other in others]
            rivals = p.rivals(i, mask_same_group)
            if rivals:
                yield (side, p.id[i]), [cosines[j] - cosines[i] for j in rivals]


def average(old: dict[str, float], g: float, gamma: float) -> float:
    return (1 - gamma) * old["u"] + gamma * g if old else g


def settle(past: Past | None, news: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """Write every sample once: the mean of what its rows say, of u the geometric one."""
    for key, said in news.items() if past is not None else ():
        past[key] = {name: mean([one[name] for one in said]) for name in said[0]}
        past[key]["u"] = math.exp(mean([math.log(one["u"]) for one in said]))


def sogclr(p: Any, gamma: float = 0.1, mask_same_group: bool = True, past: Past | None = None) -> float:
    total, news = 0.0, {}
    for key, h in anchors(p, mask_same_group):
        powers = [math.exp(x * p.scale) for x in h]
        u = average((past or {}).get(key, {}), mean(powers), gamma)
        total += mean([power / u * x for power, x in zip(powers, h)]) / len(p.rows)
        news.setdefault(key, []).append({"u": u})
    settle(past, news)
    return total


def isogclr(
    p: Any,
    gamma: float = 0.8,
    tau: float = 0.01,
    rho: float = 6.0,
    eta: float = 0.03,
    beta: float = 0.9,
    mask_same_group: bool = True,
    past: Past | None = None,
) -> float:
    total, news = 0.0, {}
    for key, h in anchors(p, mask_same_group):
        old = (past or {}).get(key, {})
        warmth = old.get("tau", tau)
        powers = [math.exp(x / warmth) for x in h]
        u = average(old, mean(powers), gamma)
        weighed = mean([power / u * x for power, x in zip(powers, h)])
        total += weighed / len(p.rows)
        slope = max(-5.0, min(5.0, math.log(u) + rho - weighed / warmth))
        moment = (1 - beta) * old.get("moment", 0.0) + beta * slope
        news.setdefault(key, []).append({"u": u, "moment": moment, "tau": max(0.005, min(1.0, warmth - eta * moment))})
    settle(past, news)
    return total


def fastclip(
    p: Any,
    version: str = "v3",
    gamma: float = 0.2,
    visits: int = 16,
    rho: float | None = None,
    tau: float = 0.03,
    eta: float = 0.0133,
    mask_same_group: bool = True,
    past: Past | None = None,
) -> float:
    total, news = 0.0, {}
    rho = {"v0": 0.0, "v1": 0.0, "v2": 7.0, "v3": 6.5}[version] if rho is None else rho
    for key, h in anchors(p, mask_same_group):
        old = (past or {}).get(key, {"visits": 0.0})
        count = int(old["visits"]) + 1
        warmth = old.get("tau", tau) if version == "v2" else 1 / p.scale
        powers = [math.exp(x / warmth) for x in h]
        done = min((count - 1) / visits, 1.0) if visits else 1.0
        now = gamma + (1 - gamma) * (1 + math.cos(math.pi * done)) / 2
        u = average(old if "u" in old else {}, mean(powers), now)
        row = math.log(u) if version == "v0" else warmth * (math.log(u) + rho)
        total += row / (2 * len(p.rows))
        said = {"u": u, "visits": float(count)}
        if version == "v2":
            weighed = mean([power / u * x for power, x in zip(powers, h)])
            slope = max(-5.0, min(5.0, math.log(u) + rho - weighed / warmth))
            said["moment"] = 0.9 * old.get("moment", 0.0) + 0.1 * slope
            said["square"] = 0.999 * old.get("square", 0.0) + 0.001 * slope**2
            step = said["moment"] / (1 - 0.9**count) / (math.sqrt(said["square"] / (1 - 0.999**count)) + 1e-8)
            said["tau"] = max(0.01, min(1.0, warmth - eta * step))
        news.setdefault(key, []).append(said)
    settle(past, news)
    return total
