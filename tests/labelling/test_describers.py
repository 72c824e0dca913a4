"""Describers of transformers' own classes with random weights: one line for each picture, whatever the batches."""

import re
from functools import partial

import numpy as np
import pytest

from labelling.describers import Blip2, Florence2, QwenVL

KINDS = {
    "qwen_vl": partial(QwenVL, prompt="describe {tag}", max_tokens=5),
    "blip2": partial(Blip2, max_tokens=5),
    "blip2_opt": partial(Blip2, prompt="a photo of {tag}", max_tokens=5),
    "florence2": partial(Florence2, prompt="<CAPTION>", max_tokens=5),
}
TAGS = ["red circle", "dog", "a hot blue square", "cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_together_is_as_one_by_one(tiny_model, pictures, kind):
    part = KINDS[kind](model=tiny_model(kind), batch_size=3)
    sentences = part(pictures, TAGS)
    assert len(sentences) == 4
    assert sentences == [part([picture], [tag])[0] for picture, tag in zip(pictures, TAGS, strict=True)]
    for sentence in sentences:
        assert sentence == " ".join(sentence.split())
        assert 0 < len(sentence.split()) <= 5
        assert not re.search(r"<\W?\w+\W?>", sentence)


def test_a_model_without_words_gives_the_tag_and_is_counted(tiny_model, pictures):
    part = KINDS["blip2"](model=tiny_model("blip2"))
    vocabulary = part.model.config.text_config.vocab_size
    part.model.language_model.generation_config.suppress_tokens = [place for place in range(vocabulary) if place != 1]
    assert part(pictures, TAGS) == TAGS
    assert part.counts == {"descriptions without a word": 4}


def test_what_a_picture_shows_matters(tiny_model):
    part = QwenVL(model=tiny_model("qwen_vl"), prompt="describe", max_tokens=5)
    pictures = [np.full((40, 40, 3), value, np.uint8) for value in (0, 80, 160, 255)]
    assert len(set(part(pictures, [""] * 4))) > 1
