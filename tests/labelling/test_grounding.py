"""Open detectors of transformers' own classes with random weights: what is asked comes back, thresholds hold."""

from functools import partial

import numpy as np
import pytest
import torch

from labelling.grounding import GroundingDino, Owlv2, _Found, _owners

ASKED = [["red circle", "Dogs"], ["cat"], ["hot dog", "dog", "blue square"], ["a cat sits on the dog."]]
ALL = {"box_threshold": 0.0, "nms": None}


@pytest.fixture(params=["grounding_dino", "owlv2"])
def detector(request, tiny_model):
    """detector(**settings): each open detector."""
    kind = {"grounding_dino": partial(GroundingDino, text_threshold=0.0), "owlv2": Owlv2}[request.param]
    return partial(kind, model=tiny_model(request.param))


@pytest.fixture
def grounding(tiny_model):
    """grounding(**settings): GroundingDINO that finds everything, unless settings say more."""
    return partial(GroundingDino, model=tiny_model("grounding_dino"), text_threshold=0.0, **ALL)


def same(one, other):
    assert one.labels == other.labels
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-4)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_every_box_stands_for_what_was_asked(detector, pictures):
    found = detector(**ALL)(pictures, ASKED)
    assert len(found) == 4
    for each, asked in zip(found, ASKED, strict=True):
        assert len(each.labels) == len(each.boxes) == len(each.scores) > 0
        assert set(each.labels) <= set(asked)
        assert each.boxes.dtype == each.scores.dtype == np.float32
        assert ((each.boxes >= 0) & (each.boxes <= 1)).all()
        assert (each.boxes[:, 2:] > each.boxes[:, :2]).all()
        assert ((each.scores >= 0) & (each.scores <= 1)).all()
        assert (np.diff(each.scores) <= 0).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_together_is_as_one_by_one(detector, pictures, batch_size):
    part = detector(box_threshold=0.1, batch_size=batch_size)
    together = part(pictures, ASKED)
    for each, picture, asked in zip(together, pictures, ASKED, strict=True):
        same(each, part([picture], [asked])[0])


def test_boxes_of_the_threshold_or_less_go(detector, pictures):
    everything = detector(**ALL)(pictures, ASKED)
    limit = float(np.median(np.concatenate([each.scores for each in everything])))
    for few, each in zip(detector(box_threshold=limit, nms=None)(pictures, ASKED), everything, strict=True):
        np.testing.assert_allclose(few.scores, each.scores[each.scores > limit], atol=1e-6)
    assert all(not each.labels for each in detector(box_threshold=1.0)(pictures, ASKED))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"nms": None}, ["dog 0.9", "cat 0.8", "dog 0.7", "dog 0.6"]),
        ({"nms": 0.5}, ["dog 0.9", "cat 0.8", "dog 0.6"]),
        ({"nms": 0.95}, ["dog 0.9", "cat 0.8", "dog 0.7", "dog 0.6"]),
        ({"nms": 0.5, "nms_across": True}, ["dog 0.9", "dog 0.6"]),
    ],
)
def test_repetitions_go_by_tag_or_across_tags(settings, kept):
    """The second and third box overlap the first by 0.8; what lies outside the picture goes, whatever is set."""
    boxes = torch.tensor([[0, 0, 0.8, 0.5], [0.6, 0.6, 1.2, 0.9], [0, 0, 1, 0.5], [0, 0, 0.8, 0.5], [1, 0, 1.5, 0.5]])
    scores = torch.tensor([0.7, 0.6, 0.9, 0.8, 1.0])
    found = _Found(boxes=boxes, scores=scores, labels=["dog", "dog", "dog", "cat", "dog"])
    made = GroundingDino(model="x", **settings)._kept([found])
    assert [f"{label} {score:.1f}" for label, score in zip(made.labels, made.scores, strict=True)] == kept
    assert made.boxes.max() == 1


def test_a_token_of_the_text_must_be_sure(grounding, pictures):
    everything = grounding()(pictures, ASKED)
    limit = float(np.median(everything[2].scores))
    (few,) = grounding(text_threshold=limit)(pictures[2:3], ASKED[2:3])
    assert len(few.labels) == (everything[2].scores > limit).sum()


def test_words_of_a_whole_caption_are_read_off(grounding, pictures):
    caption = "A red dog sits on the blue square. The cat sits."
    sentences = "a red dog sits on the blue square", "the cat sits"
    (found,) = grounding(labels="tokens")(pictures[:1], [[caption]])
    assert set(found.labels) <= set(sentences)
    limit = float(np.median(found.scores))
    (found,) = grounding(labels="tokens", text_threshold=limit)(pictures[:1], [[caption]])
    assert found.labels
    assert not set(found.labels) <= set(sentences)
    for label in found.labels:
        assert any(set(label.split()) <= set(words.split()) for words in sentences)


def test_more_than_the_text_holds_is_asked_in_several_calls(grounding, pictures):
    part = grounding()
    tags = ["red circle", "blue square", "striped cat", "plain green dog", "hot dog", "red striped circle"]
    questions = part.questions(0, tags)
    assert [asked for each in questions for asked in each.asked] == list(range(6))
    assert len(questions) > 1
    for each in questions:
        text = " ".join(f"{text}." for text in each.texts)
        assert len(part._processor.tokenizer(text)["input_ids"]) <= 16
    (found,) = part(pictures[:1], [tags])
    assert len(found.labels) == 12 * len(questions)
    assert set(found.labels) <= set(tags)
    long = " ".join(["red", "dog"] * 12)
    assert len(part.questions(0, [long])) == 2
    (found,) = part(pictures[:1], [[long]])
    assert set(found.labels) == {long}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "red circle. dog. hot dog."),
        ({"final_stop": False}, "red circle. dog. hot dog"),
        ({"separator": ","}, "red circle, dog, hot dog."),
    ],
)
def test_tags_are_asked_as_each_chain_does(settings, text, grounding, pictures):
    part = grounding(**settings)
    tags = ["red circle", "Dog.", "hot dog"]
    asked = []
    tokenizer = part.model and part._processor.tokenizer
    part._processor.tokenizer = lambda texts, **more: asked.append(texts) or tokenizer(texts, **more)
    for name in ("convert_tokens_to_ids", "cls_token_id", "sep_token_id", "pad_token_id", "decode"):
        setattr(part._processor.tokenizer, name, getattr(tokenizer, name))
    (found,) = part(pictures[:1], [tags])
    assert asked[-1] == [text]
    assert set(found.labels) <= set(tags)


def test_words_of_several_tags_are_joined_where_the_chain_does(grounding, pictures):
    (found,) = grounding(labels="all_tokens", separator=",")(pictures[:1], [["red circle", "dog"]])
    assert set(found.labels) == {"red circle dog"}
    (found,) = grounding(labels="tokens", separator=",")(pictures[:1], [["red circle", "dog"]])
    assert set(found.labels) <= {"red circle", "dog"}


def test_tokens_belong_to_the_text_they_stand_in():
    ends = frozenset({0, 101, 102, 1012})
    assert _owners([101, 7, 8, 1012, 9, 1012, 102, 0, 0], ends, 2) == [-1, 0, 0, -1, 1, -1, -1, -1, -1]


def test_padding_queries_are_never_found_and_phrases_that_are_cut_are_counted(tiny_model, pictures):
    part = Owlv2(model=tiny_model("owlv2"), **ALL)
    found = part([pictures[0], pictures[2]], [["cat"], ["red circle", "dog", "blue square"]])
    assert set(found[0].labels) == {"cat"}
    assert part.counts.total() == 0
    part(pictures[:1], [["cat", "a red striped circle on the blue plain square"]])
    assert part.counts["phrases cut to the detector's text"] == 1


@pytest.mark.parametrize("asked", [None, [["cat"]], [["cat"], [], ["cat"], ["cat"]], [["cat"], ["?"], ["x"], ["x"]]])
def test_being_asked_for_nothing_is_refused(detector, pictures, asked):
    with pytest.raises(ValueError, match="asked for") as caught:
        detector()(pictures, asked)
    assert "\n" not in str(caught.value)


def test_the_short_side_is_what_is_asked_for(grounding, pictures):
    own, larger = (grounding(short_side=side, text_threshold=0.2)(pictures[:1], [["cat"]])[0] for side in (32, 64))
    (default,) = grounding(text_threshold=0.2)(pictures[:1], [["cat"]])
    same(own, default)
    assert not np.allclose(own.scores, larger.scores, atol=1e-5)


def test_half_precision_is_taken(tiny_model, pictures):
    part = Owlv2(model=tiny_model("owlv2"), dtype="bfloat16", box_threshold=0.0)
    assert next(part.model.parameters()).dtype == torch.bfloat16
    assert part(pictures[:1], [["cat"]])[0].boxes.dtype == np.float32
