"""A user's machine at tiny size: commands that headers and documents give, run as they stand but for models, steps and sizes.

A header of `conf/experiment` and `conf/protocol` has its commands after the words `prepare` and `command`; what
`docs/data.md` prepares is found by the folder that it makes. What may be changed of a command is in this file and in the
table of recipes: backbones, the trainer, the optimizer, steps and sizes, and where the files of models lie.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.composition import CONF, compose
from tests.documents import blocks, lines_of, words_of
from tests.forked import REPO, Forked

TINY = {
    "sd14": "tiny_sd15",
    "sd15": "tiny_sd15",
    "sd21": "tiny_sd21",
    "sd21_base": "tiny_sd21_base",
    "sdxl": "tiny_sdxl",
    "sdxl_512": "tiny_sdxl",
}
STEPS, EVERY = 4, 2  # two validations, image grids and checkpoints
SIZE = 64  # px, of the tiny backbones
SMALL = {
    "train.py": (
        "trainer=cpu",
        "optimizer=adamw",
        f"trainer.max_steps={STEPS}",
        f"trainer.save_every={EVERY}",
        f"trainer.validate_every={EVERY}",
        "trainer.log_every=1",
        "sampler.steps=2",
        "data.workers=1",
    ),
    "evaluate.py": ("protocol.scenes=2", "protocol.seeds=[0,1]", "protocol.batch_size=2", "sampler.steps=1"),
    "prepare.py": (),
    "convert.py": (),
}
SHARED = os.environ.get("SCENOGRAPH_SHARED")
DETECTOR = f"{SHARED}/models/yolox_nano.onnx" if SHARED else REPO / "tests" / "samples" / "detector" / "colours.onnx"
SPLITS = {"coco": ("train2017", "val2017", "val2014"), "laion_sg": ("train", "test")}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a rehearsal changes of an experiment, and where it goes on to.

    Attributes:
        backbone: the tiny one.
        protocols: it is evaluated by these.
        sizes: settings of this recipe's sizes.
        given: what the header's DIR, FILE and RUN stand for, by setting: a folder that `docs/data.md` makes, a file, a run.
        exports: forms of `convert.py`.
    """

    backbone: str | None
    protocols: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    given: tuple[tuple[str, str], ...] = ()
    exports: tuple[str, ...] = ("adapter",)


def prepared_by() -> dict[str, list[str]]:
    """Folder -> the first command of `docs/data.md` that makes it, as words."""
    text = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
    commands = [words_of(line) for block in blocks(text, "bash") for line in lines_of(block)]
    made = [(word.removeprefix("out="), words) for words in commands for word in words if word.startswith("out=")]
    return {folder: words for folder, words in reversed(made) if words[1] == "prepare.py"}


class User:
    """A folder from which commands are run, with the data sets beside it.

    Args:
        place: both are made in it.
        samples: data sets in their published forms.
    """

    def __init__(self, place: Path, samples: Path) -> None:
        self.folder = place / "user"
        self.folder.mkdir()
        (self.folder / "examples").symlink_to(REPO / "examples")
        self._commands = prepared_by()
        for name in ("gligen_coco", "sa1b", "cc3m", "rc_coco"):
            (place / name).symlink_to(samples / name)
        _cut_latents(samples / "igligen", place / "igligen")
        (place / "coco" / "annotations").mkdir(parents=True)
        for split in SPLITS["coco"]:
            (place / "coco" / split).symlink_to(samples / "coco" / "train2017")
            for kind in ("instances", "captions", "stuff"):
                annotations = samples / "coco" / "annotations" / f"{kind}_train2017.json"
                (place / "coco" / "annotations" / f"{kind}_{split}.json").symlink_to(annotations)
        (place / "laion_sg").mkdir()
        (place / "laion_sg" / "data").symlink_to(samples / "laion_sg" / "data")
        for split in SPLITS["laion_sg"]:
            (place / "laion_sg" / f"{split}.json").symlink_to(samples / "laion_sg" / "train.json")

        _write_overlaps(place / "overlaybench", samples / "coco" / "train2017")

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self, script: str, *arguments: str) -> str:
        """What the script prints; its end with another status is a failure."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = Forked(script, *arguments, environment=environment, folder=self.folder)
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, f"python {script} {' '.join(arguments)}\n{out}\n{error}"
        return out

    def made(self, folder: str, *sizes: str) -> str:
        """A folder of shards as `docs/data.md` makes it, and before it those that it is made of."""
        if not (self / folder).exists():
            _, script, *arguments = self._commands[folder]
            sources = [word.removeprefix("shards=") for word in arguments if word.startswith("shards=")]
            for source in sources:
                self.made(source)
            self.run(script, *changed(arguments, *sizes))
        return folder


def _cut_latents(samples: Path, folder: Path) -> None:
    """IGLIGEN's published folders with the corner of each latent, so that they are of images of `SIZE` px."""
    for name in ("sdxl-512", "sdxl-1024"):
        (folder / name / "latents").mkdir(parents=True)
        (folder / name / "boxes").symlink_to(samples / name / "boxes")
        for file in (samples / name / "latents").iterdir():
            content = np.load(file, allow_pickle=True).item()
            content["latents"] = content["latents"][..., : SIZE // 8, : SIZE // 8]
            np.save(folder / name / "latents" / file.name, np.array(content, dtype=object), allow_pickle=True)
    (folder / "boxes").symlink_to(samples / "boxes_without_size")


def _write_overlaps(folder: Path, images: Path) -> None:
    """A folder of images with `scenes.jsonl`, whose boxes overlap."""
    folder.mkdir()
    scenes = []
    for number, image in enumerate(sorted(images.iterdir())[:3]):
        (folder / image.name).symlink_to(image)
        boxes = {"red circle": [0.1, 0.1, 0.6, 0.7], "blue square": [0.4, 0.3, 0.9, 0.8]}
        objects = [{"phrase": phrase, "box": box} for phrase, box in boxes.items()]
        scenes.append(
            {"id": f"scene{number}", "file": image.name, "caption": "a circle and a square", "objects": objects}
        )
    (folder / "scenes.jsonl").write_text("".join(f"{json.dumps(scene)}\n" for scene in scenes))


def changed(arguments: list[str], *settings: str) -> list[str]:
    """Arguments with tiny backbones, and settings in place of those that are there or beside them."""
    keys = {setting.partition("=")[0] for setting in settings}
    kept = [word for word in arguments if word.partition("=")[0] not in keys]
    return [tiny(word) for word in kept] + list(settings)


def tiny(word: str) -> str:
    key, _, value = word.partition("=")
    if key == "stage.transform.resolution":
        return f"{key}={SIZE}"
    return f"{key}={TINY[value]}" if key == "backbone" and value in TINY else word


def of_callbacks(experiment: str) -> tuple[str, ...]:
    """Sizes of what the callbacks of an experiment draw, and where the file of their detector lies."""
    callbacks = compose("train", [f"experiment={experiment}"]).callback
    sizes = [f"callback.{name}.scenes=2" for name in ("pictures", "layout_score") if name in callbacks]
    if "layout_score" in callbacks and "detector" in callbacks.layout_score.metric:
        sizes.append(f"callback.layout_score.metric.detector.file={DETECTOR}")
    return tuple(sizes)


def metrics_of(protocol: str) -> list[str]:
    """The metrics that a protocol's file names."""
    [line] = re.findall(
        r"override /metric@_global_.metric: \[(.*)\]", (CONF / "protocol" / f"{protocol}.yaml").read_text()
    )
    return [name.strip() for name in line.split(",")]
