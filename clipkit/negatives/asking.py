"""Many questions to one server: side by side, at its pace, until each has an answer or a reason why there is none."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Protocol

from clipkit.data.members import Unreadable
from clipkit.data.web import Transient, shown
from clipkit.errors import UserError
from clipkit.negatives.album import Album
from clipkit.negatives.answers import Answer, Answers, Order, Question
from clipkit.negatives.chat import Fault, Rejected, Reply, read_texts
from clipkit.negatives.filters import Case, reason_to_drop
from clipkit.negatives.prompts import Prompt

TRIES = 6
"""Attempts at reaching the server: half a minute of pauses, more where it asks for more."""
PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
LONGEST_RETRY_AFTER_S = 600.0
ANSWERS = 3
"""Answers looked at before a question is given up."""
PATIENCE = 8
"""Questions in a row without any answer before the server is given up."""
_CHANCE = random.SystemRandom()


class Answering(Protocol):
    """Who is asked: a server, or a model that is run here; `url` names it."""

    @property
    def url(self) -> str: ...

    def ask(self, text: str, kind: str, *, seed: int, max_tokens: int, picture: str = "") -> Reply: ...


class Halted(Exception):
    """The asking ends; this question was not put."""


class Pace:
    """When the next request may go: so many a minute (0: any), and none while the server wants a pause."""

    def __init__(self, per_minute: float = 0.0):
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = self._held = 0.0
        self._lock = threading.Lock()
        self._halt = threading.Event()

    def take(self) -> None:
        """Return when it is this caller's turn. Raises Halted when the asking ends."""
        with self._lock:
            at = self._next = max(time.monotonic(), self._next)
            self._next += self._interval
        self.pause(at - time.monotonic())
        while (left := self._held - time.monotonic()) > 0:
            self.pause(left)

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + min(seconds, LONGEST_RETRY_AFTER_S))

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Halted when the asking ends."""
        if self._halt.wait(max(0.0, seconds)):
            raise Halted

    def halt(self) -> None:
        """End all waiting."""
        self._halt.set()


class Asker:
    """Puts questions to a server and keeps the answers."""

    def __init__(
        self,
        chat: Answering,
        order: Order,
        prompts: dict[str, Prompt],
        answers: Answers,
        album: Album | None = None,
        *,
        concurrency: int,
        per_minute: float,
    ):
        self.chat, self.order, self.prompts, self.answers, self.album = chat, order, prompts, answers, album
        self.concurrency, self.pace = concurrency, Pace(per_minute)
        self.again: Counter[str] = Counter()
        """Attempts that were made again, by reason."""
        self.failed: Counter[str] = Counter()
        """Questions whose answer is that there is none, by reason."""
        self.unanswered: Counter[str] = Counter()
        """Questions the server gave no answer to, by reason; the next call asks them."""
        self.said: dict[str, str] = {}
        """The last message behind each reason, of `again` and `unanswered`."""
        self.answered = 0
        self.tokens = [0, 0]
        self._silent = 0
        self._lock = threading.Lock()

    def ask_all(self, questions: Iterable[Question]) -> Iterator[Question]:
        """Each question when its answer is on the disk. When this ends early, what was under way is still kept.

        Raises UserError when the server is of no use.
        """
        source = iter(questions)
        pending: dict[Future[Answer], Question] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    for question in islice(source, 2 * self.concurrency - len(pending)):
                        pending[pool.submit(self._answer, question)] = question
                    if not pending:
                        return
                    done = wait(pending, return_when=FIRST_COMPLETED).done
                    yield from self._keep({future: pending.pop(future) for future in done})
            finally:
                if pending:
                    self.pace.halt()
                for future in pending:
                    future.cancel()
                under_way = {future: question for future, question in pending.items() if not future.cancelled()}
                wait(under_way)
                self._keep({future: question for future, question in under_way.items() if not future.exception()})

    def _keep(self, done: dict[Future[Answer], Question]) -> list[Question]:
        """Write what came; count what did not."""
        came = {future: question for future, question in done.items() if not future.exception()}
        if came:
            self.answers.add((self.order.fields(question), future.result()) for future, question in came.items())
        for future in came:
            answer = future.result()
            self.tokens = [total + more for total, more in zip(self.tokens, answer.tokens)]
            self.answered += not answer.failed
            if answer.failed:
                self.failed[answer.failed] += 1
            self._silent = 0
        for future in done.keys() - came.keys():
            self._miss(future.exception())
        return list(done.values())

    def _miss(self, error: BaseException | None) -> None:
        if not isinstance(error, (Transient, Rejected)):
            assert error is not None
            raise error
        reason = "rejected" if isinstance(error, Rejected) else "no answer"
        self.unanswered[reason] += 1
        self.said[reason] = str(error)
        self._silent += 1
        if self._silent >= PATIENCE:
            raise UserError(
                f"{shown(self.chat.url)}: {self._silent} questions in a row without an answer, at last: {error}; "
                f"answers so far are in {self.answers.path}: mend the server, or the request (--set), and call again"
            )

    def _answer(self, question: Question) -> Answer:
        """Ask until an answer holds. Raises Transient, Rejected or Halted where none came."""
        tokens, reason, max_tokens = (0, 0), "", 100 + 100 * self.order.count
        text = self.prompts[question.kind].text(question.caption, self.order.count, self.order.seed)
        try:
            picture = self.album.url(question.picture) if self.album else ""
        except Unreadable as error:
            return Answer((), str(error).partition(":")[0])
        for number in range(ANSWERS):
            try:
                reply = self._reached(text, question.kind, self.order.seed + number, max_tokens, picture)
                tokens = tokens[0] + reply.tokens[0], tokens[1] + reply.tokens[1]
                if reply.fault:
                    raise reply.fault
                texts = read_texts(reply.content, question.kind, self.order.count)
                return Answer(self._held(texts, question), "", tokens)
            except Fault as fault:
                reason = str(fault)
                if not fault.again:
                    break
                if number + 1 < ANSWERS:
                    self._count(reason)
                max_tokens *= 2 if fault.longer else 1
        return Answer((), reason, tokens)

    def _held(self, texts: tuple[str, ...], question: Question) -> tuple[str, ...]:
        """All texts, if any passes the filters. Raises Fault."""
        reasons = [reason_to_drop(Case(text, question.caption, question.kind)) for text in texts]
        if all(reasons):
            raise Fault(reasons[0])
        return texts

    def _reached(self, text: str, kind: str, seed: int, max_tokens: int, picture: str) -> Reply:
        """One reply, through whatever trouble may pass. Raises Transient after TRIES."""
        trouble = Transient("not asked")
        for number in range(TRIES):
            self.pace.take()
            try:
                return self.chat.ask(text, kind, seed=seed, max_tokens=max_tokens, picture=picture)
            except Transient as error:
                trouble = error
            if trouble.wait_s:
                self.pace.hold(trouble.wait_s)
            if number + 1 < TRIES:
                self._count(str(trouble).partition(":")[0], str(trouble))
                self.pace.pause(min(LONGEST_PAUSE_S, PAUSE_S * 2**number) * _CHANCE.uniform(0.5, 1.0))
        raise trouble

    def _count(self, reason: str, said: str = "") -> None:
        with self._lock:
            self.again[reason] += 1
            if said:
                self.said[reason] = said
