"""What the typed nodes refuse about their own values."""

import re

import pytest

from conf.schema import (
    ROOTS,
    TRAINING_ALONE,
    App,
    DataCommon,
    Drops,
    Ema,
    Evaluate,
    Optimizer,
    Prepare,
    Sample,
    Sampler,
    Train,
    Trainer,
    as_run_keys,
)


def test_defaults_are_right() -> None:
    for record in (Trainer, Optimizer, Drops, Ema, Sampler, Train):
        record()


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (Drops, {"keep": 0.9}, "the rates must sum to 1, got keep 0.9 + scene_only 0.1"),
        (Drops, {"keep": 1.3, "none": -0.45}, "drops.keep=1.3: must lie between 0 and 1"),
        (Drops, {"dropped_caption": "zero"}, "did you mean zeros? (have: empty, zeros)"),
        (Trainer, {"precision": "bf16"}, "trainer.precision=bf16: no such choice"),
        (Trainer, {"max_steps": 0}, "trainer.max_steps=0: must be at least 1"),
        (Trainer, {"gradient_clip": -1.0}, "trainer.gradient_clip=-1.0: must be at least 0"),
        (Trainer, {"devices": 0}, "trainer.devices=0: must be"),
        (Trainer, {"devices": -1}, "trainer.devices=-1: must be"),
        (Trainer, {"devices": []}, "trainer.devices=[]: must be"),
        (Trainer, {"devices": [0, -1]}, "trainer.devices=[0, -1]: must be"),
        (Trainer, {"devices": "all"}, "trainer.devices=all: must be"),
        (Trainer, {"micro_batch": 0}, "trainer.micro_batch=0: must be at least 1"),
        (Trainer, {"micro_batch": 2, "accumulate": 4}, "trainer.accumulate=4: follows from trainer.micro_batch=2"),
        (Optimizer, {"schedule": "cosin"}, "did you mean cosine?"),
        (Optimizer, {"betas": [0.9]}, "optimizer.betas=[0.9]: must be two numbers"),
        (Ema, {"decay": 1.5}, "ema.decay=1.5"),
        (Sampler, {"steps": 0}, "sampler.steps=0: must be at least 1"),
        (Train, {"batch_size": 0}, "batch_size=0: must be at least 1"),
        (Sample, {"seeds": []}, "seeds=[]"),
        (Sample, {"guidances": [-1.0]}, "guidances=[-1.0]: must be one or more numbers from 0 up"),
        (Sample, {}, "scene, phrases, split, again: none given; name what to draw with scene=FILE, phrases=[...]"),
        (Sample, {"scene": "a", "split": "b"}, "scene, split: only one can be drawn"),
        (Sample, {"split": "b", "again": "c"}, "split, again: only one can be drawn"),
        (Sample, {"phrases": ["a"]}, "phrases, boxes: 1 phrases for 0 boxes; give one box for each"),
        (Sample, {"scene": "a", "boxes": [[0, 0, 1, 1]]}, "phrases, boxes: 0 phrases for 1 boxes"),
        (Sample, {"scene": "a"}, "run, weights: neither given; name what draws with run=DIR or weights=FILE backbone="),
        (Sample, {"again": "a", "run": "r", "weights": "w"}, "run, weights: both given"),
        (Sample, {"scene": "a", "weights": "w", "checkpoint": "c"}, "checkpoint=c: only a run has one"),
        (Sample, {"run": "r", "scene": "a", "npz": True}, "npz=True: means nothing with scene="),
        (Sample, {"run": "r", "split": "b", "out": "c", "inpaint": "d"}, "inpaint=d: means nothing with split="),
        (Sample, {"run": "r", "split": "b"}, "out: split=b needs a folder and one seed"),
        (
            Sample,
            {"run": "r", "split": "b", "out": "c", "seeds": [0, 1]},
            "seeds=[0, 1]: split=b needs a folder and one seed",
        ),
        (Sample, {"scene": "a", "picture_format": "webp"}, "picture_format=webp: no such choice"),
        (Sample, {"split": "b", "out": "c", "limit": 0}, "limit=0: must be at least 1"),
        (Sample, {"run": "r", "scene": "a", "form": "sheets"}, "form=sheets: no such choice; did you mean sheet?"),
        (
            Sample,
            {"run": "r", "scene": "a", "form": "picture", "seeds": [0, 1]},
            "seeds=[0, 1]: form=picture is of one",
        ),
        (Sample, {"run": "r", "scene": "a", "form": "sheet", "guidances": [1]}, "guidances=[1]: form=sheet has one"),
        (
            Sample,
            {"run": "r", "scene": "a", "inpaint": "p", "guidances": [1]},
            "inpaint=p: a grid paints whole pictures",
        ),
        (Sample, {"run": "r", "scene": "a", "out": "a.jpg"}, "out=a.jpg: a picture keeps its scene and settings in it"),
        (App, {"run": "r", "weights": "w"}, "run, weights: both given; name what draws with run=DIR"),
        (App, {"backbone": {"_target_": "x"}}, "backbone: a run has its own; leave it out"),
        (App, {"port": 70000}, "port=70000: must be at most 65535"),
        (Prepare, {}, "name one with source=NAME"),
        (Prepare, {"max_bad_fraction": 1.5}, "max_bad_fraction=1.5: must lie between 0 and 1"),
        (DataCommon, {"min_area": -0.1}, "data.min_area=-0.1"),
        (DataCommon, {"shards": ["a", 1]}, "data.shards=['a', 1]: must be a folder, or a list of folders"),
        (DataCommon, {"shards": 1}, "data.shards=1: must be a folder"),
        (DataCommon, {"caption": "all"}, "data.caption=all: no such choice"),
        (DataCommon, {"resize": "squish"}, "did you mean squash?"),
        (DataCommon, {"posterior": "modes"}, "did you mean mode?"),
        (DataCommon, {"relations": "box"}, "did you mean boxes?"),
        (DataCommon, {"relations_per_object": -1}, "data.relations_per_object=-1"),
        (Prepare, {"task": "check"}, "shards: task=check reads shards"),
        (Prepare, {"source": {"_target_": "x"}}, "name it with out=DIR"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(record: type, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        record(**values)
    assert "\n" not in str(caught.value)


def test_no_gradient_clipping_is_a_choice() -> None:
    assert Trainer(gradient_clip=None).gradient_clip is None


def test_the_keys_that_a_run_owns() -> None:
    assert {"backbone", "conditioning", "sampler", "trainer"} <= set(as_run_keys(Evaluate))
    assert not set(TRAINING_ALONE) & set(Evaluate.__dataclass_fields__)
    assert set(TRAINING_ALONE) <= set(Train.__dataclass_fields__)
    assert "run" not in as_run_keys(Evaluate)
    assert as_run_keys(Train) == as_run_keys(dict) == as_run_keys(None) == ()
    for root in ROOTS.values():
        assert set(as_run_keys(root)) <= set(Train.__dataclass_fields__)
