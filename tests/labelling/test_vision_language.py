"""Answers that are kept, by one process or several, and played back; descriptions that are asked for."""

import json
import multiprocessing

import numpy as np
import pytest

from labelling.answer_files import AnswerFiles
from labelling.asking_describer import AskingDescriber
from labelling.endpoint import Endpoint, RetryPolicy, Sampling
from labelling.json_answer import json_of
from labelling.parts import PartMissing
from labelling.vision_language import NoAnswer, Question, RecordedAnswers, picture_hash, text_hash
from tests.chat_server import chat_server, refuses, says

PICTURES = np.random.default_rng(0).integers(0, 255, (4, 6, 9, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


def endpoint(server, folder=None, **settings):
    given = {"model": "judge", "patience": RetryPolicy(attempts=1, timeout=5.0, concurrent=2), **settings}
    return Endpoint(base_url=server.url, cache=folder and str(folder), **given)


def asked(*prompts):
    return [Question(picture=picture, prompt=prompt) for picture in PICTURES for prompt in prompts]


def lines(folder):
    return [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_kept_answer_needs_no_request(tmp_path):
    with chat_server(says("ein Häuschen\n🏠")) as server:
        first = endpoint(server, tmp_path).ask(PICTURES[0], "What?")
        model = endpoint(server, tmp_path)
        second = model.ask(PICTURES[0].copy(), "What?")
        assert len(server.bodies) == 1
    assert (first.from_cache, second.from_cache) == (False, True)
    assert (first.text, first.tokens_in, first.model) == (second.text, second.tokens_in, second.model)
    account = model.account
    assert (account.answered, account.cached, account.failures, account.tokens_in, account.tokens_out) == (
        0,
        1,
        {},
        0,
        0,
    )
    (record,) = map(json.loads, lines(tmp_path))
    assert (record["picture"], record["prompt"]) == (picture_hash(PICTURES[0]), text_hash("What?"))
    assert record["answer"] == "ein Häuschen\n🏠"


OTHER_QUESTIONS = [
    ({}, PICTURES[1], "What?"),
    ({}, PICTURES[0].transpose(1, 0, 2), "What?"),
    ({}, None, "What?"),
    ({}, PICTURES[0], "What? "),
    ({"model": "other"}, PICTURES[0], "What?"),
    ({"sampling": Sampling(seed=1)}, PICTURES[0], "What?"),
]


def test_another_picture_prompt_model_or_sampling_is_another_question(tmp_path):
    with chat_server() as server:
        endpoint(server, tmp_path).ask(PICTURES[0], "What?")
        for settings, picture, prompt in OTHER_QUESTIONS:
            assert not endpoint(server, tmp_path, **settings).ask(picture, prompt).from_cache
        assert len(server.bodies) == 7


def test_pictures_of_one_content_and_two_shapes_differ():
    assert picture_hash(PICTURES[0]) != picture_hash(PICTURES[0].reshape(9, 6, 3))
    with pytest.raises(ValueError, match="picture: float32"):
        picture_hash(PICTURES[0].astype(np.float32))


def test_the_same_question_is_asked_once_in_a_batch_and_again_where_nothing_is_kept(tmp_path):
    with chat_server() as server:
        answers = endpoint(server, tmp_path).ask_all([*asked("a"), *asked("a")])
        assert (len(server.bodies), len(answers)) == (4, 8)
        model = endpoint(server)
        assert not any(model.ask(None, "?").from_cache for _ in range(2))
        assert len(server.bodies) == 6


def test_a_failure_is_asked_again_by_the_next_run(tmp_path):
    with chat_server(says(None, refusal="no"), says("yes")) as server:
        with pytest.raises(NoAnswer):
            endpoint(server, tmp_path).ask(None, "What?")
        assert endpoint(server, tmp_path).ask(None, "What?").text == "yes"
    assert len(lines(tmp_path)) == 1


def test_what_a_kill_left_half_written_is_asked_again(tmp_path):
    with chat_server() as server:
        endpoint(server, tmp_path).ask_all(asked("a"))
        (file,) = tmp_path.glob("*.jsonl")
        whole = file.read_bytes()
        file.write_bytes(whole[: whole.rindex(b'"answer"') + 4])
        model = endpoint(server, tmp_path)
        assert sum(not answer.from_cache for answer in model.ask_all(asked("a"))) == 1
        assert len(list(tmp_path.glob("*.jsonl"))) == 2  # no file is added to behind half a line
        assert all(answer.from_cache for answer in endpoint(server, tmp_path).ask_all(asked("a")))


def test_lines_that_are_no_answers_are_counted(tmp_path):
    files = AnswerFiles(tmp_path)
    files.add("p", "q", "r", {"answer": "yes"})
    (tmp_path / "answers-zzz.jsonl").write_text('\0\0\0\n[1]\n{"picture": "p"}\n')
    again = AnswerFiles(tmp_path)
    assert again.find("p", "q", "r")["answer"] == "yes"
    assert again.find("p", "q", "s") is None
    assert again.unreadable == 3


def test_what_another_process_adds_is_seen_at_once(tmp_path):
    one, other = AnswerFiles(tmp_path), AnswerFiles(tmp_path)
    assert other.find("p", "q", "r") is None
    for number in range(3):
        one.add("p", str(number), "r", {"answer": f"yes {number}"})
        assert other.find("p", str(number), "r")["answer"] == f"yes {number}"
        other.add("p", f"other {number}", "r", {"answer": "no"})
    assert one.find("p", "other 2", "r")["answer"] == "no"
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_two_processes_share_a_folder(tmp_path):
    folder, fork = tmp_path / "answers", multiprocessing.get_context("fork")
    begin, counts = fork.Barrier(2), fork.Queue()

    def numbered(numbers):
        return [Question(picture=None, prompt=f"What is {number}?") for number in numbers]

    def ask(server, first):
        model = endpoint(server, folder, patience=RetryPolicy(concurrent=3))
        begin.wait(60)
        for start in range(first, first + 30, 6):
            questions = numbered(range(start, start + 6))
            assert [answer.text for answer in model.ask_all(questions)] == [item.prompt * 50 for item in questions]
        counts.put((model.account.answered, model.account.cached))

    with chat_server(otherwise=lambda body: says(body["messages"][0]["content"][0]["text"] * 50)) as server:
        processes = [fork.Process(target=ask, args=(server, first)) for first in (0, 20)]  # they share ten questions
        for process in processes:
            process.start()
        told = [counts.get(timeout=120) for _ in processes]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        before = len(server.bodies)
        assert sum(map(sum, told)) == 60
        assert sum(answered for answered, _ in told) == before == len(lines(folder))
        assert 50 <= before <= 60
        answers = endpoint(server, folder).ask_all(numbered(range(50)))
        assert len(server.bodies) == before
    assert [answer.text for answer in answers] == [item.prompt * 50 for item in numbered(range(50))]
    assert len(list(folder.glob("*.jsonl"))) == 2


def write_recorded(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_recorded_answers_are_played_back(tmp_path):
    record = {"picture": picture_hash(PICTURES[0]), "prompt": text_hash("What?"), "answer": "a house"}
    model = RecordedAnswers(path=write_recorded(tmp_path / "answers.jsonl", record)).to("cpu")
    answer = model.ask(PICTURES[0], "What?")
    assert (answer.text, answer.from_cache) == ("a house", True)
    for picture, prompt in ((PICTURES[1], "What?"), (PICTURES[0], "Why?")):
        with pytest.raises(NoAnswer, match="answers.jsonl"):
            model.ask(picture, prompt)
    assert model.account.failures == {"not recorded": 2}


def test_what_an_endpoint_kept_can_be_played_back(tmp_path):
    with chat_server(says("one"), says("two")) as server:
        endpoint(server, tmp_path).ask(None, "What?")
        endpoint(server, tmp_path, model="other").ask(None, "Why?")
    assert RecordedAnswers(path=str(tmp_path)).ask(None, "Why?").text == "two"


def test_contradictions_and_broken_lines_are_refused(tmp_path):
    one = {"picture": "", "prompt": text_hash("What?"), "answer": "yes", "model": "a"}
    two = {**one, "answer": "no", "model": "b"}
    path = write_recorded(tmp_path / "both.jsonl", one, two)
    assert RecordedAnswers(path=path, model="b").ask(None, "What?").text == "no"
    other = write_recorded(tmp_path / "other.jsonl", {"answer": "yes"})
    (tmp_path / "broken.jsonl").write_text("yes\n")
    for wrong, named in {
        path: "both.jsonl: line 2",
        other: "other.jsonl: line 1",
        str(tmp_path / "broken.jsonl"): "broken.jsonl: line 1",
        str(tmp_path / "none.jsonl"): "none.jsonl",
        None: "path: ",
    }.items():
        with pytest.raises(PartMissing, match=named):
            RecordedAnswers(path=wrong).to("cpu")


@pytest.mark.parametrize(
    "text",
    ['{"a": [1]}', ' {"a": [1]}\n', '```json\n{"a": [1]}\n```', 'Here it is:\n```\n{"a": [1]}\n```\nBest wishes'],
)
def test_json_is_read_as_it_stands_or_cut_out_once(text):
    assert json_of(text) == {"a": [1]}


@pytest.mark.parametrize(
    "text", ["", "I see a house.", '{"a": [1}', "[1]", '{"a": NaN}', '{"a": 1} and {"a": 2}', "}{"]
)
def test_what_is_no_json_mapping_is_no_answer(text):
    with pytest.raises(NoAnswer) as caught:
        json_of(text)
    assert (caught.value.reason, caught.value.is_fault) == ("unparsable answer", False)


def test_a_describer_asks_with_the_tag_and_goes_on_without_an_answer():
    with chat_server(says("A red\n house."), refuses(400, "no"), says("A dog.")) as server:
        model = endpoint(server, patience=RetryPolicy(concurrent=1))
        describer = AskingDescriber(model=model, prompt="What is this{tag}?").to("cpu")
        assert describer(PICTURES[:3], ["house", "", "dog"]) == ["A red house.", "", "A dog."]
        prompts = [body["messages"][0]["content"][0]["text"] for body in server.bodies]
    assert prompts == ["What is this, a house,?", "What is this?", "What is this, a dog,?"]
    assert model.account.failures == {"status 400": 1}
    assert describer.settings()["asked"] == model.settings()
