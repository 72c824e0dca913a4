"""Vision-language models behind an endpoint that speaks OpenAI's chat completions, whoever serves it.

Here are the request, its repetition and the reading of the response. What is asked, and the cache of answers, are in
`vision_language.py`.
"""

from __future__ import annotations

import base64
import io
import os
import random
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

from labelling.parts import PartMissing
from labelling.vision_language import Answer, NoAnswer, Price, Question, VisionLanguage

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # what may go away by itself
NEVER = {401: "the API key", 402: "payment", 403: "access", 404: "base_url or model"}  # what every question would meet


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0 for the most likely words; None leaves it to the endpoint.
        seed: Asks the endpoint to draw the same again; None asks nothing.
        max_tokens: Longest answer; one that is cut is a failure. None leaves it to the endpoint.
        more: Further keys of the request, as the endpoint has them.
    """

    temperature: float | None = 0.0
    seed: int | None = None
    max_tokens: int | None = 2048
    more: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """The keys of a request."""
        said = {"temperature": self.temperature, "seed": self.seed, "max_tokens": self.max_tokens}
        return {**{name: value for name, value in said.items() if value is not None}, **self.more}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The form in which a picture is sent.

    Attributes:
        format: "jpeg" or "png".
        quality: Of a JPEG, 1 to 95.
        longest_side: Larger pictures are scaled down to it, px; None sends them as they are.
    """

    format: str = "jpeg"
    quality: int = 90
    longest_side: int | None = None

    def __post_init__(self) -> None:
        """Refuses a form that no picture can have."""
        if self.format not in ("jpeg", "png"):
            raise ValueError(f"sent.format={self.format}: no such form; choose jpeg or png")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"sent.quality={self.quality}: give 1 to 95")
        if self.longest_side is not None and self.longest_side < 1:
            raise ValueError(f"sent.longest_side={self.longest_side}: give 1 pixel or more, or null")

    def url(self, picture: np.ndarray) -> str:
        """A picture (H, W, 3) uint8 RGB as a data URL."""
        image = Image.fromarray(picture)
        longest = max(image.size)
        if self.longest_side is not None and longest > self.longest_side:
            size = [max(1, round(side * self.longest_side / longest)) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, self.format, **({"quality": self.quality} if self.format == "jpeg" else {}))
        return f"data:image/{self.format};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for an endpoint, and how often to ask again; it changes no answer.

    Attributes:
        concurrent: Requests at the same time, from one process.
        timeout: For one response, s.
        attempts: Requests for one question, the first included.
        backoff: Before the second request, s; twice as long before each further one, less up to a half by chance.
        longest_wait: Longest wait between requests, s, whatever the endpoint asks for: a question that it wants to wait longer
            fails.
    """

    concurrent: int = 4
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 120.0

    def __post_init__(self) -> None:
        """Refuses patience that asks nothing."""
        for name, least in (("concurrent", 1), ("attempts", 1), ("backoff", 0), ("longest_wait", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"patience.{name}={getattr(self, name)}: give {least} or more")
        if not self.timeout > 0:
            raise ValueError(f"patience.timeout={self.timeout}: give more than 0 seconds")

    def pause(self, attempt: int) -> float:
        """How long to wait after so many requests without an answer, s."""
        return min(self.longest_wait, self.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1))


class _Again(Exception):
    """A request that may be repeated; `wait` is what the endpoint asks for, s."""

    def __init__(self, failure: NoAnswer, wait: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure, self.wait = failure, wait


class Endpoint(VisionLanguage):
    """A model behind an endpoint.

    Args:
        model: The model's name there.
        base_url: What comes before `/chat/completions`; None where it is still to be given: asking is then refused.
        api_key_env: Environment variable that holds the API key; None for an endpoint without keys.
        sampling: How an answer is drawn.
        sent: The form of the pictures.
        patience: How long to wait and how often to ask again.
        cache: As in `VisionLanguage`.
        max_failures: As in `VisionLanguage`.
        price: As in `VisionLanguage`.
    """

    def __init__(
        self,
        *,
        model: str,
        base_url: str | None = None,
        api_key_env: str | None = None,
        sampling: Sampling | None = None,
        sent: Sent | None = None,
        patience: Patience | None = None,
        cache: str | None = None,
        max_failures: int | None = None,
        price: Price | None = None,
    ) -> None:
        super().__init__(cache=cache, max_failures=max_failures, price=price)
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url}: is no address; give one that begins with https://")
        self._model, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.sampling, self.sent, self.patience = sampling or Sampling(), sent or Sent(), patience or Patience()
        self.concurrent = self.patience.concurrent
        self._http: httpx.Client | None = None
        self._not_before = (
            0.0  # of every request, on the clock of `time.monotonic`: a limit of rate holds for all of them
        )

    @property
    def model(self) -> str:
        """The model's name."""
        return self._model

    def settings(self) -> dict[str, Any]:
        """Model, sampling and form of the pictures; the address is not among them, since a model may move."""
        sampling = {**asdict(self.sampling), "more": dict(self.sampling.more)}
        return {"kind": "endpoint", "model": self.model, "sampling": sampling, "sent": asdict(self.sent)}

    def to(self, device: Any) -> Self:
        """The same: the model is elsewhere.

        Args:
            device: Not needed.

        Returns:
            The part.

        Raises:
            PartMissing: The address or the API key is not given.
        """
        if self.base_url is None:
            raise PartMissing(f"base_url: where is {self.model}? Give the endpoint's address with base_url=URL")
        self._key()
        return self

    def answer(self, question: Question, stop: threading.Event) -> Answer:
        """Asks the endpoint until it answers, declines, or patience ends.

        Args:
            question: The question.
            stop: Ends a wait between requests.

        Returns:
            The answer.

        Raises:
            NoAnswer: The model declines, its answer is cut, or every request failed.
            PartMissing: The endpoint refuses the key, the model or the address.
        """
        self.to(None)
        content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
        if question.picture is not None:
            content.append({"type": "image_url", "image_url": {"url": self.sent.url(question.picture)}})
        body = {"model": self.model, **self.sampling.request(), "messages": [{"role": "user", "content": content}]}
        attempt = 1
        while True:
            stop.wait(max(0.0, self._not_before - time.monotonic()))
            try:
                return self._request(body)
            except _Again as error:
                wait = self.patience.pause(attempt) if error.wait is None else error.wait
                if attempt >= self.patience.attempts or stop.is_set():
                    raise NoAnswer(f"{error.failure} ({attempt} attempts)", reason=error.failure.reason) from None
                if wait > self.patience.longest_wait:
                    raise NoAnswer(
                        f"{error.failure}: asks to wait {wait:g} s, longer than longest_wait={self.patience.longest_wait:g}",
                        reason=error.failure.reason,
                    ) from None
                if error.wait is not None:
                    self._not_before = max(self._not_before, time.monotonic() + wait)
                else:
                    stop.wait(wait)
                attempt += 1

    def _request(self, body: dict[str, Any]) -> Answer:
        """One request."""
        key = self._key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            address = f"{(self.base_url or '').rstrip('/')}/chat/completions"
            response = self._client().post(address, json=body, headers=headers)
        except httpx.TimeoutException:
            failure = NoAnswer(f"{self.model}: no response in {self.patience.timeout:g} s", reason="timeout")
            raise _Again(failure) from None
        except httpx.InvalidURL as error:
            raise PartMissing(
                f"base_url={self.base_url}: is no address ({error}); give one such as https://HOST/v1"
            ) from None
        except httpx.TransportError as error:
            failure = NoAnswer(f"{self.model}: {type(error).__name__}: {error}", reason="connection")
            raise _Again(failure) from None
        if not response.is_success:
            raise self._failure(response, key)
        try:
            return _read(self.model, response.json(), self.sampling.max_tokens)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            if isinstance(error, NoAnswer):
                raise
            failure = NoAnswer(f"{self.model}: the response is no chat completion", reason="broken response")
            raise _Again(failure) from None

    def _failure(self, response: httpx.Response, key: str | None) -> Exception:
        """What a response with an error's status means."""
        status, said = response.status_code, _error_of(response)
        told = " ".join(said.get("message", "").split())[:200]
        told = told if not key else told.replace(key, "...")
        what = f"{self.model}: status {status}{f': {told}' if told else ''}"
        if status in NEVER or said.get("code") == "insufficient_quota":
            subject = NEVER.get(status, "payment")
            variable = f" (environment variable {self.api_key_env})" if status == 401 and self.api_key_env else ""
            return PartMissing(f"{what}; the endpoint refuses every question: check {subject}{variable}")
        if status in AGAIN:
            return _Again(NoAnswer(what, reason=f"status {status}"), _seconds(response.headers.get("Retry-After")))
        declined = "content" in said.get("code", "") or "policy" in said.get("code", "")
        return NoAnswer(what, reason="declined" if declined else f"status {status}", is_fault=not declined)

    def _client(self) -> httpx.Client:
        """Who asks. Every request has a connection of its own: an answer takes seconds, and none is left open between batches."""
        with self._lock:
            if self._http is None:
                limits = httpx.Limits(max_keepalive_connections=0)
                self._http = httpx.Client(timeout=self.patience.timeout, limits=limits, verify=_certificates())
            return self._http

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise PartMissing(
                f"api_key_env={self.api_key_env}: that environment variable is empty; put the API key of {self.model} there, "
                "or give api_key_env=null for an endpoint without keys"
            )
        return key


@cache
def _certificates() -> ssl.SSLContext:
    """Whom to trust; read once, since that takes longer than a request."""
    return httpx.create_ssl_context()


def _read(model: str, body: Any, max_tokens: int | None) -> Answer:
    """The answer of a chat completion; raises what a wrong form raises."""
    (choice, *_) = body["choices"]
    message, usage = choice["message"], body.get("usage") or {}
    spent = {name: _count(usage.get(key)) for name, key in (("in", "prompt_tokens"), ("out", "completion_tokens"))}
    tokens = {"tokens_in": spent["in"] or 0, "tokens_out": spent["out"] or 0}
    finish, refusal = choice.get("finish_reason"), message.get("refusal")
    if refusal or finish == "content_filter":
        told = f": {str(refusal)[:200]}" if refusal else ""
        raise NoAnswer(f"{model}: declines to answer{told}", reason="declined", is_fault=False, **tokens)
    if finish == "length":
        told = f"the answer is cut at sampling.max_tokens={max_tokens}; allow more"
        raise NoAnswer(f"{model}: {told}", reason="cut answer", is_fault=False, **tokens)
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")
    if not text.strip():
        raise NoAnswer(f"{model}: the answer is empty", reason="empty answer", is_fault=False, **tokens)
    said = body.get("model")
    named = said if isinstance(said, str) else ""
    return Answer(text=text, tokens_in=spent["in"], tokens_out=spent["out"], model=named)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _error_of(response: httpx.Response) -> dict[str, str]:
    """Message and code of an error's body, as far as it has them."""
    try:
        error = response.json()["error"]
        if isinstance(error, str):
            return {"message": error}
        return {name: str(error[name]) for name in ("message", "code") if error.get(name) is not None}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _seconds(retry_after: str | None) -> float | None:
    """How long Retry-After asks to wait, s: it is a number of seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
