"""One question to a server that speaks OpenAI's /chat/completions (vLLM, llama.cpp, hosted ones), and its answer."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clipkit.data import web
from clipkit.data.web import Transient, shown
from clipkit.errors import UserError

SAID = 300
"""Characters of a server's message that are passed on."""
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_REFUSAL = re.compile(
    r"\W*(i['’]m sorry|i am sorry|sorry|i apologi[sz]e|i can(no|['’])t|i won['’]t|i will not|as an ai"
    r"|(i['’]m|i am) (not able|unable))\b",
    re.IGNORECASE,
)


class Fault(Exception):
    """An answer without texts. `again`: another attempt may bring a better one; `longer`: if it may be longer."""

    def __init__(self, reason: str, again: bool = True, longer: bool = False):
        super().__init__(reason)
        self.again, self.longer = again, longer


class Rejected(Exception):
    """The server does not take this request, for a reason that may lie in the request or in the caption."""


class Reply(NamedTuple):
    """What a model said; `tokens`: (in, out), 0 where the server does not count. `fault`: why it is of no use."""

    content: str
    tokens: tuple[int, int]
    fault: Fault | None = None


@dataclass(frozen=True)
class Chat:
    """A server and a model. `settings` are further fields of the request; None leaves one of ours out."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 120.0
    connections: int = web.MAX_IDLE

    def ask(self, text: str, kind: str, *, seed: int, max_tokens: int, picture: str = "") -> Reply:
        """One attempt; `picture` is a URL. Raises Transient, Rejected, Fault, and UserError for what no further caption
        would change.
        """
        # The picture last: a server that keeps prefixes reads the rest once.
        seen = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": picture}}]
        ours = {
            "model": self.model,
            "messages": [{"role": "user", "content": seen if picture else text}],
            "temperature": 0.7,
            "max_tokens": max_tokens,
            "seed": seed,
            "response_format": _schema(kind),
        }
        asked = {name: value for name, value in (ours | self.settings).items() if value is not None}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        posted = web.post(
            endpoint(self.url), json.dumps(asked).encode(), headers, timeout_s=self.timeout_s, idle=self.connections
        )
        self._refuse(posted)
        return _reply(posted.data)

    def _refuse(self, posted: web.Posted) -> None:
        """Raises what the status says, if it is not success."""
        status = posted.status
        if status == 200:
            return
        said = f"{status} {posted.reason}: {self._message(posted.data)}".rstrip(": ")
        if status in (408, 409, 425, 429) or status >= 500:
            raise Transient(f"the server answered {said}", posted.wait_s)
        where = shown(endpoint(self.url))
        if status in (401, 403):
            raise UserError(f"{where}: not allowed ({said}); CLIPKIT_LLM_KEY holds the key")
        if status in (404, 405, 410) or status < 400:
            raise UserError(f"{where}: {said}; give the address up to /v1, and a model that the server has")
        if b"content_filter" in posted.data or b"content_policy" in posted.data:
            raise Fault("refused", again=False)
        raise Rejected(said)

    def _message(self, data: bytes) -> str:
        """The server's own words, without the key."""
        text = data.decode(errors="replace")
        with suppress(ValueError, KeyError, TypeError):  # in a form of its own: as it came
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        return " ".join((text.replace(self.key, "***") if self.key else text).split())[:SAID]


def endpoint(url: str) -> str:
    """Where to post: `url` is the server, its /v1 or the endpoint itself."""
    bare = url.rstrip("/")
    if bare.endswith("/chat/completions"):
        return bare
    return f"{bare}/chat/completions" if bare.count("/") > 2 else f"{bare}/v1/chat/completions"


def read_texts(content: str, kind: str, count: int) -> tuple[str, ...]:
    """The texts of an answer: `count` different ones, none empty, of this kind. Raises Fault."""
    said = _THOUGHT.sub("", content)
    start = said.find("{")
    try:
        entry = json.JSONDecoder().raw_decode(said[max(0, start) :])[0]
    except ValueError:
        if _REFUSAL.match(said.strip()):
            raise Fault("refused", again=False) from None
        raise Fault("broken JSON") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("texts"), list):
        raise Fault("other JSON")
    if entry.get("kind", kind) != kind:
        raise Fault("another kind")
    if not all(isinstance(text, str) for text in entry["texts"]):
        raise Fault("other JSON")
    texts = tuple(dict.fromkeys(" ".join(text.split()) for text in entry["texts"]))
    if "" in texts:
        raise Fault("empty text")
    if len(texts) < count:
        raise Fault("too few texts")
    return texts[:count]


def _reply(data: bytes) -> Reply:
    """The first choice of a completion. Raises Transient for what is no completion."""
    try:
        body = json.loads(data)
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content") or "", message.get("refusal")
        usage = body.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Transient(f"no completion came: {type(error).__name__}: {error}") from None
    if refusal or finish == "content_filter":
        return Reply("", tokens, Fault("refused", again=False))
    if finish == "length":
        return Reply("", tokens, Fault("truncated", longer=True))
    return Reply(str(content), tokens)


def _schema(kind: str) -> dict[str, Any]:
    # How many texts is not in the schema: not every server takes minItems. `read_texts` checks, as not every one obeys.
    properties = {"kind": {"type": "string", "enum": [kind]}, "texts": {"type": "array", "items": {"type": "string"}}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "rewrites", "strict": True, "schema": schema}}
