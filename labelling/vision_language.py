"""Asking a vision-language model about pictures: the question, the answer, and what was spent and what failed.

Here live the interface with what all kinds share (the cache, the account, the limit of failures) and the kind that plays recorded
answers back. Models behind an endpoint are in `endpoint.py`, those on this machine in `local_model.py`, the files of answers in
`answer_files.py`, and the reading of answers in `json_answer.py`.

Legend: H, W a picture's rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from labelling.answer_files import AnswerFiles
from labelling.parts import Part, PartMissing


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, and the picture that it is about.

    Attributes:
        picture: (H, W, 3) uint8 RGB; None for a prompt alone.
        prompt: The text.
    """

    picture: np.ndarray | None
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of a model.

    Attributes:
        text: Its words.
        tokens_in: Tokens of the question; None where nobody counted.
        tokens_out: Tokens of the answer; None where nobody counted.
        model: The model as whoever answered names it; "" where nobody did.
        from_cache: Nothing was asked now.
    """

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    model: str = ""
    from_cache: bool = False


class NoAnswer(ValueError):
    """A question that has no answer; the message says why in one line.

    Args:
        message: What happened.
        reason: The same in a word or two, the same for every question, to be counted by.
        is_fault: The model could not be asked: such failures count towards the limit. False where it declines to answer.
        tokens_in: Tokens that were spent on the question all the same.
        tokens_out: Tokens that were spent on the answer.
    """

    def __init__(
        self, message: str, *, reason: str, is_fault: bool = True, tokens_in: int = 0, tokens_out: int = 0
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.reason, self.is_fault = reason, is_fault
        self.tokens_in, self.tokens_out = tokens_in, tokens_out


class TooManyFailures(ValueError):
    """The model could not be asked so often that going on is of no use."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """Price of tokens, in any currency.

    Attributes:
        tokens_in: Of a million tokens of questions; None where it is not known.
        tokens_out: Of a million tokens of answers; None where it is not known.
    """

    tokens_in: float | None = None
    tokens_out: float | None = None

    def of(self, tokens_in: int, tokens_out: int) -> float | None:
        """Return what so many tokens cost; None where a price is not known."""
        if self.tokens_in is None or self.tokens_out is None:
            return None
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


@dataclass(kw_only=True)
class Account:
    """Account of what a process asked so far, and what came of it.

    Attributes:
        answered: Questions that were asked and answered.
        cached: Questions whose answer was there already.
        tokens_in: Tokens spent on questions, those without an answer among them.
        tokens_out: Tokens spent on answers.
        failures: Questions without an answer, by reason.
        price: What tokens cost.
    """

    answered: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    price: Price = field(default_factory=Price)

    def add(self, outcome: Answer | NoAnswer) -> None:
        """Count what came of one question."""
        if isinstance(outcome, NoAnswer):
            self.failures[outcome.reason] += 1
        elif outcome.from_cache:
            self.cached += 1
            return
        else:
            self.answered += 1
        self.tokens_in += outcome.tokens_in or 0
        self.tokens_out += outcome.tokens_out or 0

    def __str__(self) -> str:
        """The account in one line."""
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.failures.items()))
        spent = self.price.of(self.tokens_in, self.tokens_out)
        cost = "" if spent is None else f", cost {spent:.4f}"
        return (
            f"{self.answered} answered, {self.cached} more from the cache, {self.failures.total()} failed"
            f"{f' ({reasons})' if reasons else ''}; {self.tokens_in} tokens in, {self.tokens_out} out{cost}"
        )


def picture_hash(picture: np.ndarray | None) -> str:
    """SHA-256 of a picture (H, W, 3) uint8 RGB: of the line "HxWx3" and its bytes row by row; "" without a picture.

    Args:
        picture: The picture.

    Returns:
        The hash in hexadecimal digits.

    Raises:
        ValueError: It is no such picture.
    """
    if picture is None:
        return ""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(
            f"picture: {picture.dtype} {picture.shape} cannot be shown; give (H, W, 3) uint8 RGB in 0..255"
        )
    head = "x".join(map(str, picture.shape)) + "\n"
    return hashlib.sha256(head.encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


class VisionLanguage(Part):
    """A model that answers questions about pictures.

    An answer is kept by picture, prompt and `settings()`, so that the same question is asked once, whichever process asks it. A
    failure is not kept: the next run asks again.

    Args:
        cache: Folder of answers, shared by processes and runs; None keeps none.
        max_failures: So often may the model fail to be asked in one process, refusals to answer not counted; None: no limit.
        price: What tokens cost, for the account.

    Attributes:
        account: What this process asked.
        concurrent: Questions that are asked at the same time.
    """

    concurrent: int = 1

    def __init__(
        self, *, cache: str | None = None, max_failures: int | None = None, price: Price | None = None
    ) -> None:
        if max_failures is not None and max_failures < 0:
            raise ValueError(f"max_failures={max_failures}: must be at least 0, or null for no limit")
        self.account = Account(price=price or Price())
        self.max_failures = max_failures
        self._files = None if cache is None else AnswerFiles(cache)
        self._faults = 0
        self._lock = threading.Lock()

    @property
    @abstractmethod
    def model(self) -> str:
        """The model's name, for provenance."""

    @abstractmethod
    def answer(self, question: Question, stop: threading.Event) -> Answer:
        """Ask the model itself, past cache and account.

        Args:
            question: The question.
            stop: Set when no answer is wanted any more.

        Returns:
            The answer.

        Raises:
            NoAnswer: There is none.
            PartMissing: The model cannot be asked anything here.
        """

    def ask(self, picture: np.ndarray | None, prompt: str) -> Answer:
        """Ask about one picture.

        Args:
            picture: (H, W, 3) uint8 RGB; None for a prompt alone.
            prompt: The text.

        Returns:
            The answer.

        Raises:
            NoAnswer: There is none.
            TooManyFailures: The model could not be asked too often.
            PartMissing: The model cannot be asked anything here.
        """
        (outcome,) = self.ask_all([Question(picture=picture, prompt=prompt)])
        if isinstance(outcome, NoAnswer):
            raise outcome
        return outcome

    def ask_all(self, questions: Sequence[Question]) -> list[Answer | NoAnswer]:
        """Ask several questions, as many at a time as the model takes; the same question only once.

        Args:
            questions: The questions.

        Returns:
            For each question, in their order, its answer or why there is none.

        Raises:
            TooManyFailures: The model could not be asked too often.
            PartMissing: The model cannot be asked anything here.
        """
        asked_with = text_hash(json.dumps(self.settings(), sort_keys=True))
        keys = [(picture_hash(item.picture), text_hash(item.prompt), asked_with) for item in questions]
        distinct: dict[tuple[str, str, str], Question] = {}
        for key, item in zip(keys, questions, strict=True):
            distinct.setdefault(key, item)
        stop = threading.Event()
        if self.concurrent == 1 or len(distinct) <= 1:
            outcomes = {key: self._outcome(key, item, stop) for key, item in distinct.items()}
        else:
            with ThreadPoolExecutor(max_workers=min(self.concurrent, len(distinct))) as pool:
                waiting = {key: pool.submit(self._outcome, key, item, stop) for key, item in distinct.items()}
                try:
                    outcomes = {key: future.result() for key, future in waiting.items()}
                except BaseException:
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return [outcomes[key] for key in keys]

    def _outcome(self, key: tuple[str, str, str], question: Question, stop: threading.Event) -> Answer | NoAnswer:
        """Return what came of a question, from the cache or from the model."""
        with self._lock:
            known = None if self._files is None else self._files.find(*key)
        try:
            outcome = self.answer(question, stop) if known is None else _answer_of(known)
        except NoAnswer as failure:
            outcome = failure
        with self._lock:
            self.account.add(outcome)
            if isinstance(outcome, NoAnswer):
                self._check_faults(outcome, stop)
            elif known is None and self._files is not None:
                self._files.add(*key, {"answer": outcome.text, **_about(outcome)})
        return outcome

    def _check_faults(self, failure: NoAnswer, stop: threading.Event) -> None:
        if stop.is_set():
            return  # of those asked at the same time the one that was too many says so, alone
        self._faults += failure.is_fault
        if self.max_failures is not None and self._faults > self.max_failures:
            stop.set()
            raise TooManyFailures(
                f"{self.model}: {self._faults} questions failed, more than max_failures={self.max_failures}, the last by: "
                f"{failure}; fix that or raise max_failures, and start again: answers in the cache are kept"
            ) from None


def _about(answer: Answer) -> dict[str, Any]:
    return {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out, "model": answer.model}


def _answer_of(record: dict[str, Any]) -> Answer:
    """The answer of a line of a file."""
    return Answer(
        text=record["answer"],
        tokens_in=record.get("tokens_in"),
        tokens_out=record.get("tokens_out"),
        model=record.get("model") or "",
        from_cache=True,
    )


class RecordedAnswers(VisionLanguage):
    """Answers that were recorded, played back: no model is asked.

    Args:
        path: A file of lines `{"picture": sha256, "prompt": sha256, "answer": text}`, see `picture_hash` and `text_hash`, or a
            folder of such files, such as another kind's cache.
        model: Of a file with the answers of several models, whose; None where there is one answer to each question.
        name: What the model is called in provenance.
    """

    def __init__(self, *, path: str | None = None, model: str | None = None, name: str = "recorded") -> None:
        super().__init__()
        self.path, self.of_model, self._name = path, model, name
        self._recorded: dict[tuple[str, str], dict[str, Any]] | None = None

    @property
    def model(self) -> str:
        """The model's name."""
        return self.of_model or self._name

    def settings(self) -> dict[str, Any]:
        """The model's name: where the file lies changes no answer."""
        return {"kind": "recorded", "model": self.model}

    def to(self, device: Any) -> Self:
        """The same, its file read.

        Args:
            device: Not needed.

        Returns:
            The part.

        Raises:
            PartMissing: The file is not there, or a line is no answer or contradicts another.
        """
        if self._recorded is None:
            if self.path is None:
                raise PartMissing("path: no recorded answers are named; give a file or a folder of them")
            self._recorded = _recorded_in(self.path, self.of_model)
        return self

    def answer(self, question: Question, stop: threading.Event) -> Answer:
        """The recorded answer.

        Args:
            question: The question.
            stop: Not needed.

        Returns:
            The answer.

        Raises:
            NoAnswer: None is recorded.
        """
        self.to(None)
        assert self._recorded is not None
        known = self._recorded.get((picture_hash(question.picture), text_hash(question.prompt)))
        if known is None:
            raise NoAnswer(
                f"{self.path}: has no answer to this picture and prompt", reason="not recorded", is_fault=False
            )
        return _answer_of(known)


def _recorded_in(path: str, model: str | None) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers of a file or folder, by hashes of picture and prompt."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for where, record in AnswerFiles.read(path):
        if not all(isinstance(record.get(name), str) for name in ("picture", "prompt", "answer")):
            raise PartMissing(f"{where}: no recorded answer; give the texts picture, prompt and answer in each line")
        if model is not None and record.get("model") != model:
            continue
        key = record["picture"], record["prompt"]
        if found.setdefault(key, record)["answer"] != record["answer"]:
            raise PartMissing(
                f"{where}: another answer to the same question; keep one, or choose one model with model=NAME"
            )
    return found
