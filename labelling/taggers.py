"""Taggers: what is named in pictures, by a list, by their captions or by a model of transformers.

How noun phrases are read off a caption is in ``noun_phrases.py``; RAM is in ``ram.py``. Detectors, which find what is named, are
beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from labelling.noun_phrases import noun_phrases
from labelling.opening import Pretrained, as_pillow, batches
from labelling.parts import Tagger

CAPTION_FORMS = ("phrases", "whole")


class VocabularyTagger(Tagger):
    """The same tags for every picture: what a detector is to look for.

    Args:
        words: The tags.
        file: A text file with a tag on each line, in place of `words`.

    Raises:
        ValueError: Neither or both are given, the file is not there, or there is no tag.
    """

    def __init__(self, *, words: Sequence[str] = (), file: str | None = None) -> None:
        if bool(words) == (file is not None):
            given = "both" if words else "neither"
            raise ValueError(f"tagger.words, tagger.file: {given} given; give the tags as a list or as a file of lines")
        if file is not None:
            try:
                words = Path(file).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise ValueError(
                    f"tagger.file={file}: {error.strerror}; give a text file with a tag on each line"
                ) from error
        self.words = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
        if not self.words:
            raise ValueError(f"tagger.file={file}: holds no tag; write one on each line")

    def settings(self) -> dict[str, Any]:
        """The tags."""
        return {"part": type(self).__name__, "words": list(self.words)}

    def to(self, device: Any) -> Self:
        """The same: there is no model."""
        return self

    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[str]]:
        """The tags, for each picture."""
        return [list(self.words) for _ in pictures]


class CaptionTagger(Tagger):
    """Noun phrases of a picture's caption, or the caption as a whole.

    Args:
        form: "phrases", the caption's noun phrases; "whole", the caption itself as the one thing to look for, of which a
            detector with `labels=tokens` reads off the words that it found, as IGLIGEN's boxes were made.

    Raises:
        ValueError: The form is unknown.
    """

    def __init__(self, *, form: str = "phrases") -> None:
        if form not in CAPTION_FORMS:
            raise ValueError(f"tagger.form={form}: must be one of {', '.join(CAPTION_FORMS)}")
        self.form = form

    def settings(self) -> dict[str, Any]:
        """The form."""
        return {"part": type(self).__name__, "form": self.form}

    def to(self, device: Any) -> Self:
        """The same: there is no model."""
        return self

    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[str]]:
        """The tags of each caption; none for one that names nothing."""
        if self.form == "phrases":
            return [noun_phrases(caption) for caption in captions]
        return [[caption.strip()] if caption.strip() else [] for caption in captions]


class _ScoringTagger(Pretrained, Tagger):
    """A tagger that scores its own words and gives the likely ones.

    Args:
        model: As in `Pretrained`.
        revision: As in `Pretrained`.
        threshold: Least probability of a tag.
        most: Most tags of a picture, the likeliest; null for any number.
        dtype: As in `Pretrained`.
        batch_size: Pictures at once.

    Raises:
        ValueError: A number is out of its range.
    """

    kind = "tagger"

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        threshold: float = 0.1,
        most: int | None = 10,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(model=model, revision=revision, dtype=dtype, batch_size=batch_size)
        if not 0 <= threshold < 1:
            raise ValueError(f"tagger.threshold={threshold}: give a probability from 0 to below 1")
        if most is not None and most < 1:
            raise ValueError(f"tagger.most={most}: must be at least 1, or null for any number")
        self.threshold, self.most = threshold, most
        self._processor: Any = None

    def settings(self) -> dict[str, Any]:
        """Model, threshold and how many."""
        return {**super().settings(), "threshold": self.threshold, "most": self.most}

    def likely(self, probabilities: torch.Tensor, words: Sequence[str]) -> list[str]:
        """The words of a picture with probabilities (K,), the likeliest first, without repetition."""
        order: list[int] = probabilities.float().argsort(descending=True, stable=True).tolist()
        sure = [words[place] for place in order if probabilities[place] > self.threshold]
        return list(dict.fromkeys(sure))[: self.most]


class ClassifierTagger(_ScoringTagger):
    """An image classifier of transformers: its own classes that are likely.

    Args:
        **settings: As in `_ScoringTagger`.
    """

    def _open(self) -> torch.nn.Module:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._processor = self.opened(AutoImageProcessor)
        return self.opened_model(AutoModelForImageClassification)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[str]]:
        """The likely classes; of a class with synonyms, the first."""
        model: Any = self.model
        words = [model.config.id2label[place].split(",")[0].strip() for place in range(model.config.num_labels)]
        several = model.config.problem_type == "multi_label_classification"
        tags = []
        for batch in batches(pictures, self.batch_size):
            inputs = self.inputs(self._processor(images=[as_pillow(each) for each in batch], return_tensors="pt"))
            logits = model(**inputs).logits.float().cpu()
            chances = logits.sigmoid() if several else logits.softmax(-1)
            tags += [self.likely(row, words) for row in chances]
        return tags


class ZeroShotTagger(_ScoringTagger):
    """CLIP, SigLIP or another model of transformers that compares pictures with texts: the likely ones of given words.

    Args:
        words: The words.
        file: A text file with a word on each line, in place of `words`.
        template: The text for a word, with {} in its place.
        **settings: As in `_ScoringTagger`.

    Raises:
        ValueError: There is no word, the template has no place for it, or a number is out of its range.
    """

    def __init__(
        self, *, words: Sequence[str] = (), file: str | None = None, template: str = "a photo of a {}.", **settings: Any
    ) -> None:
        super().__init__(**settings)
        if "{}" not in template:
            raise ValueError(
                f"tagger.template={template!r}: has no {{}} where the word goes; give one such as 'a {{}}'"
            )
        self.words, self.template = VocabularyTagger(words=words, file=file).words, template

    def settings(self) -> dict[str, Any]:
        """Model, words, template and threshold."""
        return {**super().settings(), "words": list(self.words), "template": self.template}

    def _open(self) -> torch.nn.Module:
        from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

        self._processor = self.opened(AutoProcessor)
        return self.opened_model(AutoModelForZeroShotImageClassification)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[str]]:
        """The likely words."""
        model: Any = self.model
        # SigLIP was trained on texts padded to its length and says so nowhere; CLIP does not mind either way.
        siglip = model.config.model_type.startswith("siglip")
        texts = self._processor(
            text=[self.template.format(word) for word in self.words],
            padding="max_length" if siglip else True,
            truncation=True,
            return_tensors="pt",
        )
        tags = []
        for batch in batches(pictures, self.batch_size):
            seen = self._processor(images=[as_pillow(each) for each in batch], return_tensors="pt")
            logits = model(**self.inputs({**texts, **seen})).logits_per_image.float().cpu()
            chances = logits.sigmoid() if siglip else logits.softmax(-1)
            tags += [self.likely(row, self.words) for row in chances]
        return tags
