"""Models behind an endpoint, against a server that is slow, broken, refusing or overrun."""

import base64
import io
import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from labelling.endpoint import Endpoint, ImageEncoding, RetryPolicy, Sampling
from labelling.parts import PartMissing
from labelling.vision_language import NoAnswer, Price, Question, TooManyFailures
from tests.chat_server import Reply, chat_server, refuses, says

PICTURE = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)  # of the client's 0.5 s


def endpoint(server, **settings):
    patience = RetryPolicy(**{"attempts": 3, "timeout": 5.0, **settings.pop("patience", {})})
    return Endpoint(model="judge", base_url=server.url, patience=patience, **settings)


def questions(count):
    return [Question(picture=None, prompt=f"What is {number}?") for number in range(count)]


def test_a_question_is_sent_as_the_protocol_has_it(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with chat_server(says("A house.\n")) as server:
        sampling = Sampling(temperature=0.7, seed=1234, max_tokens=50, more={"top_p": 0.5})
        model = endpoint(server, api_key_env="JUDGE_KEY", sampling=sampling, sent=ImageEncoding(format="png"))
        answer = model.ask(PICTURE, "What is this?")
    (body,), (headers,) = server.bodies, server.headers
    (message,) = body.pop("messages")
    assert body == {"model": "judge", "temperature": 0.7, "seed": 1234, "max_tokens": 50, "top_p": 0.5}
    text, picture = message["content"]
    assert (message["role"], text) == ("user", {"type": "text", "text": "What is this?"})
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), PICTURE)
    assert headers["Authorization"] == "Bearer sk-secret"
    assert (answer.text, answer.tokens_in, answer.tokens_out) == ("A house.\n", 100, 2)
    assert (answer.model, answer.from_cache) == ("judge-2024-08-06", False)


def test_a_prompt_alone_is_asked_without_picture_and_without_key():
    with chat_server() as server:
        endpoint(server).ask(None, "Hello?")
    assert server.bodies[0]["messages"][0]["content"] == [{"type": "text", "text": "Hello?"}]
    assert "Authorization" not in server.headers[0]


def test_pictures_are_scaled_down_but_never_up():
    def size(**settings):
        data = ImageEncoding(**settings).url(PICTURE).partition(",")[2]
        return Image.open(io.BytesIO(base64.b64decode(data))).size

    assert size(longest_side=10) == (10, 6)
    assert size(longest_side=100) == size() == (20, 12)


@pytest.mark.parametrize(
    "fault",
    [
        refuses(500),
        refuses(503),
        Reply(body=b"<html>bad gateway</html>"),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices": [{"message": null}]}'),
        Reply(body=b"[1]"),
        Reply(closes=True),
        Reply(body=b'{"half', headers={"Content-Length": "100"}),
    ],
)
def test_what_may_go_away_is_asked_again(fault):
    with chat_server(fault, fault, says("at last")) as server:
        model = endpoint(server, patience={"timeout": 0.5})
        assert model.ask(None, "?").text == "at last"
        assert len(server.bodies) == 3
    assert not model.account.failures


def test_a_slow_endpoint_is_given_up_after_so_many_attempts():
    with chat_server(otherwise=lambda body: says("late", after=0.3)) as server:
        model = endpoint(server, patience={"timeout": 0.05, "attempts": 2})
        with pytest.raises(NoAnswer, match=r"judge: .*patience.timeout=0.05 .*2 attempts"):
            model.ask(None, "?")
        assert len(server.bodies) == 2
    assert model.account.failures == {"timeout": 1}


def test_nobody_there_is_a_failure_of_the_connection():
    with chat_server() as server:
        pass
    model = endpoint(server)
    with pytest.raises(NoAnswer, match="ConnectError"):
        model.ask(None, "?")
    assert model.account.failures == {"connection": 1}


def test_pauses_grow():
    with chat_server(otherwise=lambda body: refuses(503)) as server:
        with pytest.raises(NoAnswer, match="503"):
            endpoint(server, patience={"attempts": 5}).ask(None, "?")
        pauses = [after - before for before, after in pairwise(server.times)]
    assert all(pause >= 0.75 * 0.01 * 2**number for number, pause in enumerate(pauses))
    assert len(pauses) == 4


def test_retry_after_holds_for_every_request():
    with chat_server(refuses(429, "slow down", Retry_After="0.4")) as server:
        model = endpoint(server, patience={"concurrent": 2})
        model.ask_all(questions(4))
        begun = [moment - server.times[0] for moment in server.times]
        assert sum(0.1 < moment < 0.39 for moment in begun) <= 1  # at most the one that was under way
        assert max(begun) >= 0.39
    assert not model.account.failures


def test_retry_after_as_a_date_and_one_that_means_nothing():
    def first_refused(body):
        until = datetime.now(UTC) + timedelta(seconds=1.2)  # a date has whole seconds: 0.2 to 1.2 are left
        return says("now") if len(server.bodies) > 1 else refuses(429, Retry_After=format_datetime(until, usegmt=True))

    with chat_server(otherwise=first_refused) as server:
        assert endpoint(server).ask(None, "?").text == "now"
        assert server.times[1] - server.times[0] > 0.15
    with chat_server(refuses(429, Retry_After="tomorrow")) as server:
        assert endpoint(server).ask(None, "?").text == "a house"


def test_nobody_waits_longer_than_allowed():
    with chat_server(refuses(429, "come back later", Retry_After="3600")) as server:
        model = endpoint(server)
        begin = time.monotonic()
        with pytest.raises(NoAnswer, match="judge: status 429: come back later"):
            model.ask(None, "?")
        assert time.monotonic() - begin < 1
        assert len(server.bodies) == 1
    assert model.account.failures == {"status 429": 1}


@pytest.mark.parametrize(
    ("reply", "way_out"),
    [
        (refuses(401, "Incorrect API key provided: sk-secret."), "the API key (environment variable JUDGE_KEY)"),
        (refuses(404, "The model `judge` does not exist"), "base_url or model"),
        (refuses(403), "access"),
        (refuses(429, "You exceeded your quota", "insufficient_quota", Retry_After="0"), "payment"),
    ],
)
def test_what_every_question_would_meet_ends_at_once(monkeypatch, reply, way_out):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with chat_server(otherwise=lambda body: reply) as server:
        model = endpoint(server, api_key_env="JUDGE_KEY", patience={"concurrent": 2})
        with pytest.raises(PartMissing) as caught:
            model.ask_all(questions(20))
        assert len(server.bodies) < 20  # those that were on their way when the first answer came
    assert way_out in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "reason", "told"),
    [
        (says(None, refusal="I cannot help with that."), "declined", "I cannot help with that."),
        (says("", finish="content_filter"), "declined", "judge: "),
        (refuses(400, "flagged", "content_policy_violation"), "declined", "status 400: flagged"),
        (refuses(400, "too large"), "status 400", "status 400: too large"),
        (says("half an ans", finish="length"), "cut answer", "sampling.max_tokens=2048"),
        (says("  "), "empty answer", "judge: .*empty"),
    ],
)
def test_what_would_be_the_same_again_is_asked_once_and_counted(reply, reason, told):
    with chat_server(reply) as server:
        model = endpoint(server)
        with pytest.raises(NoAnswer, match=told):
            model.ask(PICTURE, "?")
        assert len(server.bodies) == 1
    assert model.account.failures == {reason: 1}


def test_only_so_many_requests_at_the_same_time():
    def echo(body):
        return says(body["messages"][0]["content"][0]["text"], after=0.08)

    with chat_server(otherwise=echo) as server:
        answers = endpoint(server, patience={"concurrent": 3}).ask_all(questions(12))
        assert 2 <= server.most_at_once <= 3  # 2: on a machine that is slow to start a thread
    assert [answer.text for answer in answers] == [item.prompt for item in questions(12)]


def test_too_many_failures_end_it_but_refusals_do_not_count():
    with chat_server(otherwise=lambda body: refuses(500)) as server:
        model = endpoint(server, max_failures=2, patience={"attempts": 1, "concurrent": 2})
        with pytest.raises(TooManyFailures, match="3 .*max_failures=2.*judge: status 500"):
            model.ask_all(questions(50))
        assert len(server.bodies) < 10
    with chat_server(otherwise=lambda body: says(None, refusal="no")) as server:
        model = endpoint(server, max_failures=2)
        assert all(isinstance(outcome, NoAnswer) for outcome in model.ask_all(questions(5)))


def test_a_failure_leaves_the_other_answers_and_the_account_says_what_was_spent():
    replies = says("two words"), says(None, refusal="no"), refuses(400), says("three more words")
    with chat_server(*replies) as server:
        model = endpoint(server, price=Price(tokens_in=2.5, tokens_out=10.0), patience={"concurrent": 1})
        outcomes = model.ask_all(questions(4))
    assert [getattr(outcome, "text", None) for outcome in outcomes] == ["two words", None, None, "three more words"]
    assert all(isinstance(outcome, NoAnswer) for outcome in outcomes[1:3])
    account = model.account
    assert (account.answered, account.tokens_in, account.tokens_out) == (2, 300, 5)
    assert account.price.of(account.tokens_in, account.tokens_out) == pytest.approx((300 * 2.5 + 5 * 10) / 1e6)
    assert re.findall(r"[\d.]+", str(account)) == "2 0 2 1 400 1 300 5 0.0008".split()
    assert "declined: 1, status 400: 1" in str(account)


def test_what_is_not_given_is_asked_for_before_any_request(monkeypatch):
    with pytest.raises(PartMissing, match="base_url: .*judge"):
        Endpoint(model="judge").to("cpu")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with chat_server() as server:
        model = endpoint(server, api_key_env="JUDGE_KEY")
        for ask in (lambda: model.to("cpu"), lambda: model.ask(None, "?")):
            with pytest.raises(PartMissing, match="api_key_env=JUDGE_KEY"):
                ask()
        assert not server.bodies


@pytest.mark.parametrize(
    ("kind", "group", "setting", "value"),
    [
        (Endpoint, "", "base_url", "localhost:8000/v1"),
        (Endpoint, "", "max_failures", -1),
        (RetryPolicy, "patience.", "concurrent", 0),
        (RetryPolicy, "patience.", "attempts", 0),
        (RetryPolicy, "patience.", "timeout", 0),
        (ImageEncoding, "sent.", "format", "webp"),
        (ImageEncoding, "sent.", "quality", 0),
        (ImageEncoding, "sent.", "longest_side", 0),
    ],
)
def test_wrong_settings_are_refused_by_name(kind, group, setting, value):
    with pytest.raises(ValueError, match=f"{group}{setting}={value}"):
        kind(**({"model": "m"} if kind is Endpoint else {}), **{setting: value})


def test_settings_say_what_answers_depend_on_and_nothing_else():
    one = Endpoint(model="m", base_url="http://a/v1", patience=RetryPolicy(concurrent=9), cache="x")
    assert one.settings() == Endpoint(model="m", base_url="https://b/v1").settings()
    assert one.settings() != Endpoint(model="m", sampling=Sampling(temperature=0.5)).settings()
    assert one.settings() != Endpoint(model="m", sent=ImageEncoding(longest_side=512)).settings()
