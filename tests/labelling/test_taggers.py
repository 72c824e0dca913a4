"""Taggers: lists, captions, models of transformers' own classes with random weights."""

import pytest

from labelling.noun_phrases import noun_phrases
from labelling.taggers import CaptionTagger, ClassifierTagger, VocabularyTagger, ZeroShotTagger


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a red striped circle and a blue plain square", ["red striped circle", "blue plain square"]),
        ("A man with a red helmet on a small moped on a dirt road.", ["man", "red helmet", "small moped", "dirt road"]),
        ("A child holding a flowered umbrella and petting a yak.", ["child", "flowered umbrella", "yak"]),
        ("A young boy standing in front of a computer keyboard.", ["young boy", "computer keyboard"]),
        ("The image features a large, brown dog sitting on a bench.", ["large brown dog", "bench"]),
        ("Two men wearing aprons and a group of people near the dog, the dog", ["men", "aprons", "people", "dog"]),
        ("a smiling woman in a parked car", ["smiling woman", "parked car"]),
        ("A building with a painting; the ceiling is red.", ["building", "painting", "ceiling"]),
        ("a man dressed in black", ["man"]),
        ("They are quickly running!", []),
        ("", []),
    ],
)
def test_noun_phrases_of_captions(caption, phrases):
    assert noun_phrases(caption) == phrases


def test_captions_as_phrases_or_whole(pictures):
    captions = ["A dog on a bench.", "", "They are here."]
    assert CaptionTagger()(pictures[:3], captions) == [["dog", "bench"], [], []]
    assert CaptionTagger(form="whole")(pictures[:3], captions) == [["A dog on a bench."], [], ["They are here."]]


def test_a_vocabulary_is_a_list_or_a_file(tmp_path, pictures):
    file = tmp_path / "words.txt"
    file.write_text("dog\n\nhot dog \ndog\n")
    for part in (VocabularyTagger(words=["dog", "hot dog"]), VocabularyTagger(file=str(file))):
        assert part(pictures[:2], ["", ""]) == [["dog", "hot dog"]] * 2
        assert part.settings()["words"] == ["dog", "hot dog"]
    for settings, told in (
        ({}, "neither"),
        ({"words": ["a"], "file": str(file)}, "both"),
        ({"file": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=told):
            VocabularyTagger(**settings)


@pytest.mark.parametrize("several", [False, True])
def test_a_classifier_names_its_likely_classes(tiny_model, pictures, several):
    part = ClassifierTagger(
        model=tiny_model("classifier_several" if several else "classifier"), threshold=0.0, most=None, batch_size=3
    )
    everything = part(pictures, [""] * 4)
    assert all(set(tags) == {"dog", "cat", "blue square"} for tags in everything)
    assert everything == [part([picture], [""])[0] for picture in pictures]
    first = ClassifierTagger(
        model=tiny_model("classifier_several" if several else "classifier"), threshold=0.0, most=1
    )(pictures, [""] * 4)
    assert first == [tags[:1] for tags in everything]
    few = ClassifierTagger(model=tiny_model("classifier_several" if several else "classifier"), threshold=0.5)(
        pictures, [""] * 4
    )
    assert sum(map(len, few)) < sum(map(len, everything))
    if not several:
        assert all(len(tags) <= 1 for tags in few)


def test_zero_shot_names_likely_words(tiny_model, pictures):
    words = ["dog", "red circle", "cat", "blue square"]
    part = ZeroShotTagger(model=tiny_model("clip"), words=words, threshold=0.0, most=None, batch_size=3)
    everything = part(pictures, [""] * 4)
    assert all(sorted(tags) == sorted(words) for tags in everything)
    assert everything == [part([picture], [""])[0] for picture in pictures]
    assert ZeroShotTagger(model=tiny_model("clip"), words=words, threshold=0.0, most=2)(pictures, [""] * 4) == [
        tags[:2] for tags in everything
    ]
    assert part.settings()["words"] == words
