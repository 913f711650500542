"""A language model of transformers, run here, that answers as a server does: many prompts at once, each by its seed.

Every request is drawn with random numbers of its own (Gumbel noise added to the logits and the largest taken is a draw
from the softmax), so an answer depends on prompt, seed and temperature, not on what else is in the batch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch

from clipkit.errors import UserError
from clipkit.negatives.chat import Fault, Reply

TEMPERATURE = 0.7
"""As servers are asked for, unless `--set temperature` says otherwise; 0 takes the likeliest token."""
SETTINGS = ("temperature", "max_tokens")
"""What `--set` may change here."""


@dataclass
class _Request:
    text: str
    seed: int
    max_tokens: int
    reply: Reply | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class LocalChat:
    """Asked from many threads; one of them at a time answers what is waiting, `batch` prompts at once."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: dict[str, Any] | None = None, *, name: str, batch: int = 16
    ):
        unknown = sorted(set(settings or {}) - set(SETTINGS))
        if unknown:
            raise UserError(f"--set {unknown[0]}: a model that is run here takes {' and '.join(SETTINGS)} only")
        self.model, self.tokenizer, self.url, self.batch = model.eval(), tokenizer, name, batch
        self.temperature = float((settings or {}).get("temperature", TEMPERATURE))
        self._limit = (settings or {}).get("max_tokens")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._waiting: list[_Request] = []
        self._lock, self._turn = threading.Lock(), threading.Lock()

    @staticmethod
    def load(name: str, settings: dict[str, Any] | None = None, batch: int = 16) -> LocalChat:
        """A transformers folder or hub name, on a GPU if there is one. Raises UserError where it is no such model."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{name}: no causal language model that transformers can load: {reason}") from None
        return LocalChat(
            model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, settings, name=name, batch=batch
        )

    def ask(self, text: str, kind: str, *, seed: int, max_tokens: int, picture: str = "") -> Reply:
        """One answer; `kind` stands in the text. Raises what generating raised."""
        assert not picture, "llm.ask refuses pictures for a model that is run here"
        request = _Request(text, seed, int(self._limit or max_tokens))
        with self._lock:
            self._waiting.append(request)
        while not request.done.is_set():
            with self._turn:
                if not request.done.is_set():
                    with self._lock:
                        some, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
                    self._answer(some)
        if request.error:
            raise request.error
        assert request.reply is not None
        return request.reply

    def _answer(self, some: list[_Request]) -> None:
        try:
            for request, reply in zip(some, self._replies(some)):
                request.reply = reply
        except BaseException as error:
            for request in some:
                request.error = error
        for request in some:
            request.done.set()

    @torch.no_grad()
    def _replies(self, some: list[_Request]) -> list[Reply]:
        device = next(self.model.parameters()).device
        asked = self.tokenizer([self._prompt(r.text) for r in some], return_tensors="pt", padding=True).to(device)
        length, most = asked["input_ids"].shape[1], max(r.max_tokens for r in some)
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and length + most > room:
            most = room - length
            if most < 1:
                raise UserError(f"{self.url}: reads {room} tokens, a prompt has {length}; take a model that reads more")
        dice = _Dice([_seed(r.text, r.seed) for r in some], self.temperature)
        out = self.model.generate(
            input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=most, do_sample=False,
            num_beams=1, logits_processor=[dice], pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return [
            self._reply(row[length:], int(mask.sum()), min(request.max_tokens, most))
            for row, mask, request in zip(out, asked["attention_mask"], some)
        ]

    def _prompt(self, text: str) -> str:
        if self.tokenizer.chat_template is None:
            return f"{text}\n"
        message = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def _reply(self, row: torch.Tensor, sent: int, most: int) -> Reply:
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        said = row.tolist()
        stop = next((at for at, token in enumerate(said) if token in ends), None)
        tokens = said[: most if stop is None else min(stop, most)]
        fault = Fault("truncated", longer=True) if stop is None or stop > most else None
        return Reply(self.tokenizer.decode(tokens, skip_special_tokens=True), (sent, len(tokens)), fault)


def _seed(text: str, seed: int) -> int:
    """Other numbers for every prompt, and for every seed."""
    return int.from_bytes(blake2b(f"{seed}:{text}".encode(errors="replace"), digest_size=8).digest(), "big") >> 1


class _Dice:
    """Logits and Gumbel noise of each row's own: their largest is a draw from softmax(logits / temperature)."""

    def __init__(self, seeds: list[int], temperature: float):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.temperature:
            return scores
        draws = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        noise = -(-draws.clamp(1e-20, 1 - 1e-7).log()).log()
        return scores + self.temperature * noise.to(scores.device, scores.dtype)
