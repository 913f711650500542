"""Negatives and paraphrases written by a language model: behind an OpenAI-compatible server, or run here.

DeGLA's five kinds (arXiv 2504.16801) are asked for by its recipe: a rule, examples, the constraint that the meaning
changes, the caption; paraphrases are ParaCLIP's (arXiv 2402.15120), descriptions and tags HQ-CLIP's (arXiv 2507.22431).
First each question is asked, its answer kept in a file; then the shards are written from that file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from clipkit.data.build import tracked
from clipkit.data.members import Sheet, plain, read_sheet
from clipkit.data.shards import Shard, expand
from clipkit.data.web import shown
from clipkit.errors import UserError
from clipkit.negatives.album import Album
from clipkit.negatives.answers import Answers, Order, Question
from clipkit.negatives.asking import Asker
from clipkit.negatives.chat import Chat
from clipkit.negatives.filters import Case, content, keep, mark_of, reason_to_drop
from clipkit.negatives.make import (
    KINDS,
    Report,
    captions_of,
    check_own,
    check_places,
    claim,
    finish,
    finished_before,
    rewrite,
    rules_mark,
    sizes,
)
from clipkit.negatives.prompts import Prompt, answer, load_prompts

if TYPE_CHECKING:
    from clipkit.negatives.local import LocalChat

SOURCE = "llm"
"""The `source` of every negative written here."""
KEY = "CLIPKIT_LLM_KEY"
"""Environment variable that holds the server's key."""
FILE = "answers.jsonl"
PARAPHRASE, AGAIN = "paraphrase", "paraphrase_again"
"""ParaCLIP's T', and T'', which is asked about T'."""
CAPTION_KINDS = {PARAPHRASE: "once", AGAIN: "twice", "long_description": "long", "short_description": "short"}
"""Kinds that become captions, and what these are called: paraphrases, and HQ-CLIP's descriptions."""
TAG_KINDS = ("tags", "false_tags")
"""Kinds whose texts are lists of tags: fields of KEY.json."""
ORIGINAL = "original"
"""The kind of captions that had none, beside paraphrases."""
OURS = ("model", "messages", "response_format")
"""Fields of a request that are not the user's; None leaves out the last."""
NEWS_S = 60.0
"""Where no bar is drawn, a line so often."""
CHARACTERS = 4.0
"""Characters a token, where the server has counted few."""
MEASURED = 20
"""Answers from which on their own tokens are the estimate."""


@dataclass
class Asked(Report):
    """What was made, as `Report`; and what was asked for it.

    `asked` counts questions put now, `known` those answered before; `again` attempts repeated, `failed` questions that
    have no answer for good, `unanswered` those the server said nothing to, by reason; `said` has the last message
    behind a reason, where there was one.
    """

    asked: int = 0
    known: int = 0
    again: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Cost:
    """Requests of a kind that are still to be made, and about how many tokens they take.

    `measured`: by what the server counted for earlier answers; else by characters.
    """

    kind: str
    requests: int
    tokens_in: int
    tokens_out: int
    measured: bool


class Wish:
    """What is asked for. Raises UserError for an unknown kind, a paraphrase of none, and a setting that is not free.

    `per_kind` texts of each kind for every caption, or for the first `limit`; `settings` are added to requests;
    KIND.yaml in `folder` replaces a packaged prompt. `pictures`: the model sees the picture, too, of so many pixels on
    its longer side at most (0: it does not), and a caption of two pictures is two questions.
    """

    def __init__(
        self,
        model: str,
        kinds: Sequence[str] = KINDS,
        *,
        per_kind: int = 1,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        folder: str | Path | None = None,
        limit: int | None = None,
        pictures: int = 0,
    ):
        if AGAIN in kinds and PARAPHRASE not in kinds:
            raise UserError(f"{AGAIN}: asks about what {PARAPHRASE} gave; name both")
        for name in (settings or {}).keys() & set(OURS):
            if name != "response_format" or (settings or {})[name] is not None:
                raise UserError(f"{name}: is not to be set; only response_format=null leaves that out")
        self.kinds, self.limit, self.pictures = tuple(dict.fromkeys(kinds)), limit, pictures
        self.direct = tuple(kind for kind in self.kinds if kind != AGAIN)
        self.prompts: dict[str, Prompt] = load_prompts(self.direct, folder, pictured=pictures > 0)
        marks = {kind: prompt.mark for kind, prompt in self.prompts.items()}
        self.order = Order(model, per_kind, seed, marks, settings or {})

    def album(self, shards: str | Path | Sequence[str | Path]) -> Album | None:
        """The pictures to be shown, if any are."""
        return Album(shards, self.pictures) if self.pictures else None

    def questions(self, shards: str | Path | Sequence[str | Path], album: Album | None = None) -> Iterator[Question]:
        """About every caption, each once."""
        pairs = album.pairs() if album else ((caption, "") for caption in captions_of(shards))
        for caption, picture in islice(dict.fromkeys(pair for pair in pairs if pair[0]), self.limit):
            yield from (Question(caption, kind, picture) for kind in self.direct)

    def further(self, questions: Iterable[Question], answers: Answers) -> Iterator[Question]:
        """About the paraphrases that came."""
        if AGAIN not in self.kinds:
            return
        for question in questions:
            found = answers.get(self.order.fields(question)) if question.kind == PARAPHRASE else None
            for text in found.texts if found else ():
                if not reason_to_drop(Case(text, question.caption, question.kind)):
                    yield question._replace(caption=text)


def ask(
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    wish: Wish,
    *,
    url: str | None,
    file: str | Path | None = None,
    concurrency: int = 16,
    per_minute: float = 0.0,
    timeout_s: float = 120.0,
    overwrite: bool = False,
    progress: bool = True,
) -> Asked:
    """Write every shard again, to `out`, with what the model at `url` writes about the captions.

    Answers are kept in `file` (out/answers.jsonl) and never asked for again: a call that was ended goes on where it
    was. Negatives go beside those of other sources, paraphrases behind the captions, with `caption_kinds`. Shards that
    would become the same are kept. Without `url` the model is one of transformers, run here, `concurrency` prompts at
    once, and sees no pictures. Raises UserError for what `expand` refuses, for a shard that is there and not by `ask`
    (unless `overwrite`), for a server or model of no use, for questions of which not one was answered (when what is
    known has been written), and for a file that another call has open.
    """
    folder, started = Path(out), time.perf_counter()
    paths = expand(shards)
    check_places(paths, folder)
    if not overwrite:
        check_own(paths, folder, SOURCE)
    chat = _chat(wish, url, timeout_s, concurrency)
    total, album = Asked(), wish.album(shards)
    with Answers(file or folder / FILE) as answers:
        asker = Asker(chat, wish.order, wish.prompts, answers, album, concurrency=concurrency, per_minute=per_minute)
        questions = list(wish.questions(shards, album))
        for number, some in enumerate((questions, wish.further(questions, answers))):
            wanted = list(dict.fromkeys(some))
            open_ = [question for question in wanted if wish.order.fields(question) not in answers]
            total.known += len(wanted) - len(open_)
            total.asked += len(open_)
            what = "asking about paraphrases" if number else "asking"
            for _ in _told(asker.ask_all(open_), what, len(open_), progress):
                pass
        total.again, total.failed, total.unanswered = asker.again, asker.failed, asker.unanswered
        total.said, (total.tokens_in, total.tokens_out) = asker.said, asker.tokens
        silent = 0 < total.asked == total.unanswered.total()
        if total.known or not silent:
            for path in paths:
                _write(path, folder / path.name, wish, answers, album, total)
        if silent:
            said = "; ".join(total.said[reason] for reason in total.unanswered)
            raise UserError(
                f"{shown(chat.url)}: not one of {total.asked} questions was answered, at last: {said}; mend the "
                "server, or the request (--set), and call again"
            )
    total.seconds = time.perf_counter() - started
    return total


def _chat(wish: Wish, url: str | None, timeout_s: float, concurrency: int) -> Chat | LocalChat:
    if url is not None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"--url {shown(url)}: begins with http:// or https://, as http://localhost:8000/v1 does")
        return Chat(url, wish.order.model, _key(), wish.order.settings, timeout_s, concurrency)
    if wish.pictures:
        raise UserError(
            "--pictures: a model that is run here sees none; name a server that shows them to its model, --url"
        )
    from clipkit.negatives.local import LocalChat

    return LocalChat.load(wish.order.model, wish.order.settings, concurrency)


def estimate(shards: str | Path | Sequence[str | Path], out: str | Path, wish: Wish, file: Any = None) -> list[Cost]:
    """What `ask` would still cost; nothing is asked."""
    characters: dict[str, list[int]] = {kind: [0, 0, 0] for kind in wish.direct}
    album = wish.album(shards)
    seen = round(album.tokens * CHARACTERS) if album else 0
    with Answers(file or Path(out) / FILE, write=False) as answers:
        questions = list(wish.questions(shards, album))
        asked = {question for question in questions if wish.order.fields(question) not in answers}
        for question in asked:
            _count(characters[question.kind], question, wish, seen)
        costs = [_cost(kind, sums, wish.order, answers) for kind, sums in characters.items()]
        if AGAIN in wish.kinds:  # about paraphrases that are still to come, and about those that came
            sums = [wish.order.count * number for number in characters[PARAPHRASE]]
            for question in set(wish.further(questions, answers)) - asked:
                if wish.order.fields(question) not in answers:
                    _count(sums, question, wish, seen)
            costs.append(replace(_cost(PARAPHRASE, sums, wish.order, answers), kind=AGAIN))
    return costs


def _count(sums: list[int], question: Question, wish: Wish, seen: int) -> None:
    """Count a question's request, its characters and `seen`, those of a picture, and what would be answered."""
    order = wish.order
    sums[0] += 1
    sums[1] += len(wish.prompts[question.kind].text(question.caption, order.count, order.seed)) + seen
    sums[2] += len(answer(question.kind, [question.caption] * order.count))


def _cost(kind: str, sums: list[int], order: Order, answers: Answers) -> Cost:
    """`sums`: requests, characters of their prompts, and of what would be answered."""
    requests, sent, came = sums
    seen = answers.tokens.get((kind, order.prompts[kind], order.model), Counter())
    if seen["answers"] >= MEASURED and seen["in"]:
        each = requests / seen["answers"]
        return Cost(kind, requests, round(each * seen["in"]), round(each * seen["out"]), True)
    return Cost(kind, requests, round(sent / CHARACTERS), round(came / CHARACTERS), False)


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not all(character.isprintable() for character in key):
        raise UserError(f"{KEY}: holds characters that no key has")  # and no message may show it
    return key


def _told(items: Iterable[Question], what: str, total: int, progress: bool) -> Iterator[Question]:
    """`items` behind a progress bar on a terminal; elsewhere a line now and then."""
    began = told = time.monotonic()
    for number, item in enumerate(tracked(items, what, total) if progress else items, start=1):
        yield item
        now = time.monotonic()
        if progress and not sys.stderr.isatty() and now - told >= NEWS_S:
            told, rate = now, number / (now - began)
            left = (total - number) / rate / 60
            print(f"{what}: {number} of {total}, {rate:.1f} a second, {left:.0f} minutes left", file=sys.stderr)


def _write(source: Shard, target: Path, wish: Wish, answers: Answers, album: Album | None, total: Asked) -> None:
    """Write one shard, unless it would be as it is; count it."""
    order = wish.order
    stamp = {
        "by": SOURCE,
        "kinds": list(wish.kinds),
        "order": [order.model, order.count, order.seed, order.prompts, order.settings, wish.pictures],
        "answers": [str(answers.path.resolve()), answers.size],
        "rules": rules_mark(),
    }
    before = finished_before(target, stamp | sizes(source, target))
    if before:
        total.add(before)
        total.kept_shards += 1
        return
    report = Report(shards=1)
    claim(target, SOURCE)
    writer = _Writer(wish, answers, album, report)
    rewrite(source, target, writer.sheet)
    finish(target, stamp | sizes(source, target), report)
    total.add(report)


class _Writer:
    """Puts answers into sheets."""

    def __init__(self, wish: Wish, answers: Answers, album: Album | None, report: Report):
        self.wish, self.answers, self.album, self.report = wish, answers, album, report
        self._picture = ""
        self._tag_kinds = [kind for kind in wish.direct if kind in TAG_KINDS]

    def sheet(self, members: dict[str, bytes]) -> bytes:
        """KEY.json with what was written about every caption."""
        sheet = read_sheet(members)
        self._picture = self.album.mark(members) if self.album else ""
        record = json.loads(members["json"]) if "json" in members else {}
        negatives, captions, kinds = [], list(sheet.captions), list(sheet.caption_kinds)
        relevance = list(sheet.relevance)
        tags = {kind: list(record.get(kind) or []) for kind in self._tag_kinds}
        for c, caption in enumerate(sheet.captions):
            stay = [
                n for n in sheet.negatives_of(c) if n.get("source") != SOURCE or n.get("kind") not in self.wish.kinds
            ]
            if not caption:
                negatives.append(stay)
                continue
            self.report.captions += 1
            made = self._negatives(sheet, c, {mark_of(n["text"]) for n in stay})
            more = list(self._captions(caption, captions))
            self.report.covered["any"] += bool(made or more)
            for kind in self._tag_kinds:
                tags[kind] += [tag for tag in self._tags(caption, kind) if tag not in tags[kind]]
            negatives.append(stay + made)
            captions += [text for text, _ in more]
            kinds += [kind for _, kind in more]
            relevance += [sheet.relevance[c]] * len(more)
        record |= {"captions": captions, "negatives": negatives} | tags
        if set(CAPTION_KINDS) & set(self.wish.kinds):
            record["caption_kinds"] = [kind or ORIGINAL for kind in kinds]
            if isinstance(record.get("relevance"), list):
                record["relevance"] = relevance
        return json.dumps(record, ensure_ascii=False).encode()

    def _negatives(self, sheet: Sheet, c: int, taken: set[str]) -> list[dict[str, Any]]:
        caption, order = sheet.captions[c], self.wish.order
        siblings = sheet.captions[:c] + sheet.captions[c + 1 :]
        return [
            {
                "text": text,
                "kind": kind,
                "source": SOURCE,
                "model": order.model,
                "prompt": order.prompts[kind],
                "seed": order.seed,
            }
            for kind in self.wish.direct
            if kind not in CAPTION_KINDS and kind not in TAG_KINDS
            for text in self._kept(caption, kind, kind, siblings, taken)
        ]

    def _captions(self, caption: str, captions: list[str]) -> Iterator[tuple[str, str]]:
        """(text, kind of caption): descriptions, and each T' with the T'' that belong to it."""
        taken = {mark_of(known) for known in captions}
        for kind in self.wish.direct:
            if kind in CAPTION_KINDS and kind != PARAPHRASE:
                for text in self._kept(caption, kind, kind, (), taken):
                    yield text, CAPTION_KINDS[kind]
        if PARAPHRASE not in self.wish.kinds:
            return
        for once in self._kept(caption, PARAPHRASE, PARAPHRASE, (), taken):
            yield once, CAPTION_KINDS[PARAPHRASE]
            if AGAIN in self.wish.kinds:
                for twice in self._kept(once, PARAPHRASE, AGAIN, (), taken):
                    yield twice, CAPTION_KINDS[AGAIN]

    def _tags(self, caption: str, kind: str) -> list[str]:
        """The tags of the texts, which are lists; no false one that the caption says."""
        said = content(caption) if kind == "false_tags" else frozenset()
        texts = self._kept(caption, kind, kind, (), set())
        tags = dict.fromkeys(plain(tag).strip(" .") for text in texts for tag in text.split(","))
        return [tag for tag in tags if tag and not (said and content(tag) <= said)]

    def _kept(self, caption: str, kind: str, name: str, siblings: Sequence[str], taken: set[str]) -> list[str]:
        """The texts of an answer that are fit for this picture, counted under `name`."""
        found = self.answers.get(self.wish.order.fields(Question(caption, kind, self._picture)))
        drops = self.report.drops.setdefault(name, Counter())
        candidates, limit = found.texts if found else (), self.wish.order.count
        texts = keep(candidates, caption, kind, limit=limit, siblings=siblings, taken=taken, drops=drops)
        if texts:
            self.report.kinds[name] += len(texts)
            self.report.covered[name] += 1
        else:
            reason = (found.failed or "every text dropped") if found else "not answered"
            self.report.empty.setdefault(name, Counter())[reason] += 1
        return texts
