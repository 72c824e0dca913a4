"""Vision-language models behind an endpoint that speaks OpenAI's chat completions, whoever serves it.

The `openai` client sends requests and repeats them. Here are the form of a question, what each failure means, and the three
things that the client does not do: a rate limit holds for all requests of a process, a response that is no chat completion is
asked for again, and an exhausted quota ends the work at once. Questions and the cache of answers are in `vision_language.py`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from labelling.parts import PartMissing
from labelling.vision_language import Answer, NoAnswer, Price, Question, VisionLanguage

if TYPE_CHECKING:
    import httpx2
    import openai
    from openai.types.chat import ChatCompletion

# statuses that every question would meet
REFUSED = {401: "the API key", 402: "payment", 403: "access", 404: "base_url or model"}
LONGEST_WAIT = 120.0  # s that Retry-After may ask for: the client gives a question up that is to wait longer
BROKEN = "the response is no chat completion"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of an answer's sampling.

    Attributes:
        temperature: 0 for the most likely words; None leaves it to the endpoint.
        seed: Asks the endpoint to sample the same again; None asks nothing.
        max_tokens: Longest answer; one that is cut is a failure. None leaves it to the endpoint.
        more: Further keys of the request, as the endpoint has them.
    """

    temperature: float | None = 0.0
    seed: int | None = None
    max_tokens: int | None = 2048
    more: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Return the client's arguments, those that are left to the endpoint left out."""
        named = {"temperature": self.temperature, "seed": self.seed, "max_tokens": self.max_tokens}
        return {**{name: value for name, value in named.items() if value is not None}, "extra_body": dict(self.more)}


@dataclass(frozen=True, kw_only=True)
class ImageEncoding:
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
        """Check the settings."""
        if self.format not in ("jpeg", "png"):
            raise ValueError(f"sent.format={self.format}: must be jpeg or png")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"sent.quality={self.quality}: must be 1 to 95")
        if self.longest_side is not None and self.longest_side < 1:
            raise ValueError(f"sent.longest_side={self.longest_side}: must be at least 1 px, or null")

    def url(self, picture: np.ndarray) -> str:
        """Encode a picture (H, W, 3) uint8 RGB as a data URL."""
        image = Image.fromarray(picture)
        longest = max(image.size)
        if self.longest_side is not None and longest > self.longest_side:
            size = [max(1, round(side * self.longest_side / longest)) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, self.format, **({"quality": self.quality} if self.format == "jpeg" else {}))
        return f"data:image/{self.format};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Limits of waiting for an endpoint and of asking again; they change no answer.

    Between requests the client waits 0.5 s, then twice as long each time up to 8 s, less up to a quarter at random; or for as
    long as the endpoint asks by Retry-After, up to `LONGEST_WAIT`.

    Attributes:
        concurrent: Requests at the same time, from one process.
        timeout: For one response, s.
        attempts: Requests for one question, the first included.
    """

    concurrent: int = 4
    timeout: float = 120.0
    attempts: int = 6

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("concurrent", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"patience.{name}={getattr(self, name)}: must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"patience.timeout={self.timeout}: must be more than 0 seconds")


class Endpoint(VisionLanguage):
    """A model behind an endpoint.

    Args:
        model: The model's name there.
        base_url: What comes before `/chat/completions`; None where it is still to be given: asking is then refused.
        api_key_env: Environment variable that holds the API key; None for an endpoint without keys.
        sampling: How an answer is sampled.
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
        sent: ImageEncoding | None = None,
        patience: RetryPolicy | None = None,
        cache: str | None = None,
        max_failures: int | None = None,
        price: Price | None = None,
    ) -> None:
        super().__init__(cache=cache, max_failures=max_failures, price=price)
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url}: must begin with https:// or http://")
        self._model, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.sampling, self.sent = sampling or Sampling(), sent or ImageEncoding()
        self.patience = patience or RetryPolicy()
        self.concurrent = self.patience.concurrent
        self._opened: openai.OpenAI | None = None
        self._not_before = 0.0  # of every request, on the clock of `time.monotonic`: a rate limit holds for all of them
        self._thread = threading.local()

    @property
    def model(self) -> str:
        """The model's name."""
        return self._model

    def settings(self) -> dict[str, Any]:
        """Model, sampling and form of the pictures; the address is not among them, since a model may move."""
        sampling = {**asdict(self.sampling), "more": dict(self.sampling.more)}
        return {"kind": "endpoint", "model": self.model, "sampling": sampling, "sent": asdict(self.sent)}

    def to(self, device: Any) -> Self:
        """Return the same part: the model is elsewhere.

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
        """Ask the endpoint until it answers, declines, or the attempts are used up.

        Args:
            question: The question.
            stop: Set when no answer is wanted any more: nothing is asked again then.

        Returns:
            The answer.

        Raises:
            NoAnswer: The model declines, its answer is cut, or every request failed.
            PartMissing: The endpoint refuses the key, the model or the address.
        """
        client = self.to(None)._client()
        import openai

        content: list[Any] = [{"type": "text", "text": question.prompt}]
        if question.picture is not None:
            content.append({"type": "image_url", "image_url": {"url": self.sent.url(question.picture)}})
        messages: list[Any] = [{"role": "user", "content": content}]
        more: dict[str, Any] = self.sampling.request()
        if self.api_key_env is None:
            more["extra_headers"] = {"Authorization": openai.omit}
        self._thread.stop, times = stop, f"({self.patience.attempts} attempts)"
        try:
            answer = client.chat.completions.create(model=self.model, messages=messages, **more)
        except openai.APITimeoutError:
            told = f"{self.model}: no response in patience.timeout={self.patience.timeout:g} s {times}"
            raise NoAnswer(told, reason="timeout") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if str(cause) == BROKEN:
                raise NoAnswer(f"{self.model}: {BROKEN} {times}", reason="broken response") from None
            raise NoAnswer(f"{self.model}: {type(cause).__name__}: {cause} {times}", reason="connection") from None
        except openai.APIStatusError as error:
            raise self._failure(error.status_code, error.body, error.code) from None
        return self._read(answer)

    def _client(self) -> openai.OpenAI:
        """Open the client, once and late: its package takes seconds to import."""
        with self._lock:
            if self._opened is None:
                import httpx2
                import openai

                hooks: dict[str, Any] = {"request": [self._before], "response": [self._after]}
                # an answer takes seconds, so that a connection each costs nothing, and none is left open between batches
                limits = httpx2.Limits(max_keepalive_connections=0)
                try:
                    self._opened = openai.OpenAI(
                        api_key=self._key() or "none",
                        base_url=self.base_url,
                        timeout=self.patience.timeout,
                        max_retries=self.patience.attempts - 1,
                        http_client=openai.DefaultHttpxClient(event_hooks=hooks, limits=limits),
                    )
                except httpx2.InvalidURL as error:
                    raise PartMissing(
                        f"base_url={self.base_url}: is no address ({error}); give one such as https://HOST/v1"
                    ) from None
            return self._opened

    def _before(self, request: httpx2.Request) -> None:
        """Wait until the endpoint takes requests again; ask nothing that nobody wants to know any more."""
        stop: threading.Event = self._thread.stop
        stop.wait(max(0.0, self._not_before - time.monotonic()))
        if stop.is_set():
            raise NoAnswer(f"{self.model}: the work has ended", reason="given up", is_fault=False)

    def _after(self, response: httpx2.Response) -> None:
        """Look at a response before the client does."""
        import httpx2

        response.read()
        body: Any = None
        with contextlib.suppress(ValueError):
            body = response.json()
        if response.is_success:
            try:
                dict(body["choices"][0]["message"])
            except (LookupError, TypeError, ValueError):
                # to the client an error of the connection, so that it asks again
                raise httpx2.RemoteProtocolError(BROKEN, request=response.request) from None
            return
        error = body.get("error") if isinstance(body, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        if code == "insufficient_quota":  # no rate limit, though it has the status of one
            raise self._failure(402, error, code)
        with contextlib.suppress(ValueError):  # a date is left to the client, for the one request
            wait = float(response.headers.get("Retry-After", "none"))
            if 0 < wait <= LONGEST_WAIT:
                self._not_before = max(self._not_before, time.monotonic() + wait)

    def _failure(self, status: int, error: object, code: str | None) -> NoAnswer | PartMissing:
        """Return what a response with an error's status means."""
        message = error.get("message") if isinstance(error, dict) else None
        told = " ".join(str(message or "").split())[:200]
        if key := os.environ.get(self.api_key_env or "", "").strip():
            told = told.replace(key, "...")
        what = f"{self.model}: status {status}{f': {told}' if told else ''}"
        if status in REFUSED:
            variable = f" (environment variable {self.api_key_env})" if status == 401 and self.api_key_env else ""
            return PartMissing(f"{what}; the endpoint refuses every question: check {REFUSED[status]}{variable}")
        declined = "content" in (code or "") or "policy" in (code or "")
        return NoAnswer(what, reason="declined" if declined else f"status {status}", is_fault=not declined)

    def _read(self, completion: ChatCompletion) -> Answer:
        """Return the answer of a chat completion, or raise why there is none."""
        choice, usage = completion.choices[0], completion.usage
        count_in, count_out = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        refusal, content = choice.message.refusal, choice.message.content

        def no_answer(told: str, reason: str) -> NoAnswer:
            spent = {"tokens_in": count_in or 0, "tokens_out": count_out or 0}
            return NoAnswer(f"{self.model}: {told}", reason=reason, is_fault=False, **spent)

        if refusal or choice.finish_reason == "content_filter":
            raise no_answer(f"declines to answer: {str(refusal or '')[:200]}", "declined")
        if choice.finish_reason == "length":
            raise no_answer(
                f"the answer is cut at sampling.max_tokens={self.sampling.max_tokens}; allow more", "cut answer"
            )
        if isinstance(content, list):  # as some servers have it
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if not (content or "").strip():
            raise no_answer("the answer is empty", "empty answer")
        return Answer(text=content, tokens_in=count_in, tokens_out=count_out, model=completion.model or "")

    def _key(self) -> str | None:
        """Return the API key; None for an endpoint without keys."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise PartMissing(
                f"api_key_env={self.api_key_env}: that environment variable is empty; put the API key of {self.model} there, "
                "or give api_key_env=null for an endpoint without keys"
            )
        return key
