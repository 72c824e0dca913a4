"""A small server on the loopback that speaks OpenAI's chat completions, with what real ones do wrong."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(kw_only=True)
class Reply:
    """What the server does with a request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0  # s
    closes: bool = False  # without a response


def says(text: str | None, *, finish: str = "stop", refusal: str | None = None, after: float = 0.0) -> Reply:
    """A chat completion, of 100 tokens in and a token for each word."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "judge-2024-08-06",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": len((text or "").split()), "total_tokens": 0},
    }
    return Reply(body=json.dumps(body).encode(), after=after)


def refuses(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI words it."""
    body = {"error": {"message": message, "type": "invalid_request_error", "code": code}}
    return Reply(
        status=status,
        body=json.dumps(body).encode(),
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


@dataclass(kw_only=True)
class ChatServer:
    """The server: `script` is used up first, then `otherwise` replies."""

    url: str = ""
    script: list[Reply] = field(default_factory=list)
    otherwise: Callable[[dict[str, Any]], Reply] = lambda body: says("a house")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        with self.lock:
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.headers.append(headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            reply = self.script.pop(0) if self.script else self.otherwise(body)
        time.sleep(reply.after)
        with self.lock:
            self.at_once -= 1
        return reply if path == "/v1/chat/completions" else refuses(404, f"no {path}")


@contextmanager
def chat_server(*script: Reply, **settings: Any) -> Iterator[ChatServer]:
    """Runs a server as long as the block."""
    state = ChatServer(script=list(script), **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.title(): value for name, value in self.headers.items()}
            reply = state.reply(self.path, headers, body)
            if reply.closes:
                self.close_connection = True
                return
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:
                pass  # whoever asked has gone

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
