"""Tags from captions: their nouns, for training without written tags (CatLIP, arXiv 2404.15653).

CatLIP takes each noun's first sense in WordNet, which has to be downloaded. Here a noun is its lemma by the lexicon of
the negatives, else its singular by TextBlob's rules: no senses, so words of one sense stay apart and those of several
stay one. Things a caption says are absent are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from clipkit.data.build import tracked
from clipkit.data.members import read_sheet, tags_of
from clipkit.data.shards import Shard, expand
from clipkit.negatives.lexicon import lexicon
from clipkit.negatives.make import check_free, check_places, rewrite
from clipkit.negatives.tagging import parse


@dataclass
class Nouns:
    """What was written. `untagged` counts pairs without a tag, `unlisted` tags from nouns the lexicon lacks."""

    shards: int = 0
    pairs: int = 0
    tags: int = 0
    untagged: int = 0
    unlisted: int = 0


def nouns(caption: str) -> list[str]:
    """Lemmas of the nouns that a caption says are there, in its order, none twice."""
    parsed = parse(caption)
    tokens = [
        parsed.tokens[place].lower
        for phrase in parsed.phrases
        if not parsed.is_negated(phrase)
        for place in range(phrase.start, phrase.stop)
        if parsed.letters[place] == "N"
    ]
    return list(dict.fromkeys(_lemma(token) for token in tokens if len(token) > 1 and not token.isdigit()))


def add_nouns(
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> Nouns:
    """Write every shard again, to `out`, with the nouns of its captions behind the `tags` in KEY.json.

    All else is copied byte for byte. Raises UserError for shards of one name, for a shard that is there already (unless
    `overwrite`) and for an unreadable sheet.
    """
    paths, folder = expand(shards), Path(out)
    check_places(paths, folder)
    if not overwrite:
        check_free(paths, folder)
    jobs = [(path, folder / path.name) for path in paths]
    total = Nouns()
    done = _run(jobs, workers)
    for report in tracked(done, "finding nouns", len(jobs)) if progress else done:
        for name, value in vars(report).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def _run(jobs: list[tuple[Shard, Path]], workers: int) -> Iterator[Nouns]:
    if workers == 1 or len(jobs) < 2:
        yield from map(_tag_shard, jobs)
        return
    # Started afresh, not forked: the caller may hold threads (a progress bar).
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_tag_shard, job) for job in jobs]):
            yield future.result()


def _tag_shard(job: tuple[Shard, Path]) -> Nouns:
    report = Nouns(shards=1)
    rewrite(*job, lambda members: _sheet(members, report))
    return report


def _sheet(members: dict[str, bytes], report: Nouns) -> bytes:
    """KEY.json with the nouns of all captions among its tags. Raises Unreadable."""
    sheet = read_sheet(members)
    given = tags_of(sheet)
    found = dict.fromkeys(noun for c in sheet.usable() for noun in nouns(sheet.captions[c]))
    tags = list(dict.fromkeys([*given, *found]))
    report.pairs += 1
    report.tags += len(tags)
    report.untagged += not tags
    report.unlisted += sum(noun not in lexicon().nouns.forms for noun in found)
    record = json.loads(members["json"]) if "json" in members else {}
    return json.dumps(record | {"tags": tags}, ensure_ascii=False).encode()


def _lemma(noun: str) -> str:
    known = lexicon().nouns
    if noun in known.forms:
        return known.lemma(noun)
    from textblob.en.inflect import singularize

    return str(singularize(noun))
