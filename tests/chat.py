"""A local server that speaks OpenAI's /v1/chat/completions, writes rewrites by rote, counts, and misbehaves as told."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.server import running

Question = tuple[str, str]
Fault = Callable[["ChatHandler", Question, int], bool]
"""(request, (caption, kind), how often it was asked) → whether it has been answered, somehow."""


class ChatHandler(BaseHTTPRequestHandler):
    """POST of a chat; every other address is not there."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 20
    server: ChatServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            self.say(404, {"error": {"message": "nothing here"}})
            return
        self.asked = json.loads(body)
        content = self.asked["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        caption = json.loads(text.rpartition("Caption: ")[2])
        kind = re.findall(r'"kind": "(\w+)"', text)[0]
        question = self.question = caption, kind
        with self.server.lock:
            self.server.requests.append(self.asked)
            self.server.keys.append(self.headers.get("Authorization", ""))
            self.server.asked[question] += 1
            number = self.server.asked[question]
        if not (self.server.fault and self.server.fault(self, question, number)):
            count = int(re.findall(r"exactly (\d+) in texts", text)[0])
            self.complete({"kind": kind, "texts": [rewritten(caption, kind, n) for n in range(count)]})
            with self.server.lock:
                self.server.answered[question] += 1

    def complete(self, content: Any, finish: str = "stop", **message: Any) -> None:
        """A completion; `content` that is no text is sent as JSON."""
        text = content if isinstance(content, str) else json.dumps(content)
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | message}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        self.say(200, {"object": "chat.completion", "choices": [choice], "usage": usage})

    def say(self, status: int, body: Any, **headers: str) -> None:
        """Any answer, as JSON."""
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def rewritten(caption: str, kind: str, number: int) -> str:
    """A rewrite that passes the filters of its kind, for captions of different words."""
    words = caption.split()
    if kind.startswith(("replace", "paraphrase")):
        return " ".join([*words[:-1], f"{words[-1]}{'xyz'[number]}"])
    turn = number + 1
    return " ".join(words[turn:] + words[:turn])


class ChatServer(ThreadingHTTPServer):
    """What was asked and what was answered, and who makes trouble."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.lock = threading.Lock()
        self.asked: Counter[Question] = Counter()
        self.answered: Counter[Question] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.fault: Fault | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        pass


def chatting() -> AbstractContextManager[ChatServer]:
    """A server while the context lasts."""
    return running(ChatServer())
