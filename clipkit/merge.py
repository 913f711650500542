"""Models merged by their weights: interpolations (WiSE-FT), soups, and what each of them scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.evaluation import pareto
from clipkit.evaluation.report import write_report
from clipkit.evaluation.result import Result
from clipkit.evaluation.run import evaluate
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.load import load, save
from clipkit.model.weights import mean_of_weights


@dataclass
class Merged:
    """A merged model in `folder`, which `clipkit.load` takes: which models it is of, and what it scores."""

    name: str
    folder: Path
    shares: dict[str, float]
    results: list[Result] = field(default_factory=list)

    @property
    def point(self) -> pareto.Point | None:
        """Recognition and composition, where both were evaluated."""
        return pareto.point_of(self.results)


@dataclass(frozen=True)
class Benchmarks:
    """What merged models are evaluated on; the arguments of `evaluate`."""

    suite: str | None = None
    names: Sequence[str] = ()
    roots: dict[str, str] = field(default_factory=dict)
    allow_missing: bool = False

    def __bool__(self) -> bool:
        return bool(self.suite or self.names)

    def run(self, model: DualEncoder, name: str, out: Path | None) -> list[Result]:
        """One result a benchmark."""
        return evaluate(model, self.suite, self.names, self.roots, out, self.allow_missing, model_name=name, show=False)


def interpolate(first: str, second: str, alphas: Sequence[float], out: Path, on: Benchmarks) -> list[Merged]:
    """(1 - alpha) × first + alpha × second, for every alpha, under `out` (WiSE-FT, arXiv 2109.01903).

    With benchmarks, `out`/report.html sets all of them side by side. Raises UserError for alphas that are no shares
    or come twice, and for models of different architectures.
    """
    _check_different([first, second])
    if wrong := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise UserError(f"alphas: should lie between 0 (the first model) and 1 (the second), found {wrong[0]:g}")
    if not alphas or len(set(alphas)) < len(alphas):
        raise UserError(f"alphas: should be different shares, found {', '.join(f'{a:g}' for a in alphas) or 'none'}")
    made = [
        _made(f"alpha {alpha:g}", {first: 1 - alpha, second: alpha}, out / f"alpha_{alpha:g}", on) for alpha in alphas
    ]
    _report(made, out)
    return made


def uniform_soup(models: Sequence[str], out: Path, on: Benchmarks) -> list[Merged]:
    """The mean of all models, in `out`/uniform (arXiv 2203.05482); with benchmarks, after the models themselves."""
    _check_different(models)
    return _soup("uniform soup", list(models), models, out / "uniform", on)


def greedy_soup(models: Sequence[str], held_out: str, out: Path, on: Benchmarks) -> list[Merged]:
    """Models from the best to the worst, each kept if the mean with it scores no less on the benchmark `held_out`.

    In `out`/greedy (arXiv 2203.05482, recipe 1). Raises UserError where `held_out` is also what is reported: a soup
    chosen by a benchmark flatters itself there.
    """
    from clipkit.evaluation.benchmark import suite

    _check_different(models)
    if held_out in {*on.names, *(suite(on.suite) if on.suite else ())}:
        raise UserError(f"--held-out {held_out}: the soup is chosen by it; report it on other benchmarks")
    judge = Benchmarks(names=[held_out], roots=on.roots, allow_missing=on.allow_missing)

    def score(chosen: list[str]) -> float:
        return judge.run(_mean(_equal(chosen)), "", None)[0].score.value

    alone = {model: score([model]) for model in models}
    first, *others = sorted(models, key=lambda model: -alone[model])
    kept, best = [first], alone[first]
    for model in others:
        if (found := score([*kept, model])) >= best:
            kept, best = [*kept, model], found
    return _soup("greedy soup", kept, models, out / "greedy", on)


def _check_different(models: Sequence[str]) -> None:
    if len(set(models)) < max(2, len(models)):
        raise UserError(f"give at least two models, each once; found {', '.join(models)}")


def _soup(name: str, kept: list[str], models: Sequence[str], folder: Path, on: Benchmarks) -> list[Merged]:
    made = []
    if on:
        for number, model in enumerate(models, 1):
            made.append(_made(Path(model).name or model, {model: 1.0}, folder.parent / f"model_{number}", on))
    made.append(_made(name, _equal(kept), folder, on))
    _report(made, folder.parent)
    return made


def _made(name: str, shares: dict[str, float], folder: Path, on: Benchmarks) -> Merged:
    model = _mean(shares)
    save(model, folder, merged=shares)
    return Merged(name, folder, shares, on.run(model, name, folder / "results") if on else [])


def _mean(shares: dict[str, float]) -> DualEncoder:
    return mean_of_weights((ref, share, load(ref)) for ref, share in shares.items()).eval()


def _equal(models: Sequence[str]) -> dict[str, float]:
    return {model: 1 / len(models) for model in models}


def _report(made: Sequence[Merged], out: Path) -> None:
    if made[0].results:
        write_report([(one.name, one.folder) for one in made], out / "report.html")


def choice(made: Sequence[Merged], most_loss: float) -> Merged:
    """What composes best of those that lose at most so much zero-shot accuracy (0 to 1) against the first.

    Raises UserError where zero-shot and compositional benchmarks were not both evaluated.
    """
    return made[pareto.choose([one.point for one in made if one.point], most_loss)]


def rows(made: Sequence[Merged]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table: every model with its headline numbers in percent, and where it lies.

    With zero-shot and compositional benchmarks also what it loses and gains against the first, and whether another
    model beats it in both.
    """
    points = [one.point for one in made if one.point]
    traded = len(points) == len(made) > 1
    columns = [f"{r.benchmark} {r.headline}" for r in made[0].results]
    columns = ["model", *columns, *(["zero-shot loss", "compositional gain", "front"] if traded else []), "folder"]
    best, lines = pareto.front(points), []
    for n, one in enumerate(made):
        line = [one.name, *(f"{100 * r.score.value:.1f}" for r in one.results)]
        if traded:
            loss, gain = points[0].recognition - points[n].recognition, points[n].composition - points[0].composition
            line += [f"{100 * loss + 0.0:+.1f}", f"{100 * gain + 0.0:+.1f}", "yes" if n in best else ""]
        lines.append([*line, str(one.folder)])
    return columns, lines
