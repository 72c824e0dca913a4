"""Stages for the tests, and a program that runs one of them: it can be killed, and be one of several ranks."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from datamodules.sources.shapes import Shapes
from preparation.conversion import convert_source
from preparation.runner import run_stage
from preparation.stage import Stage
from runtime.launch.ranks import ranks_of


class Shout(Stage):
    """Captions in capitals; without pictures that cannot be read, and without scenes of `drop` objects."""

    name = "shout"
    requires = frozenset({"image", "caption"})

    def __init__(self, *, word="", drop=None, pause=0.0):
        super().__init__()
        self.word, self.drop, self.pause = word, drop, pause

    def settings(self):
        return {"word": self.word, "drop": self.drop}

    def __call__(self, samples):
        for sample, _picture in self.pictured(samples):
            time.sleep(self.pause)
            if self.drop is not None and len(sample.scene.objects) >= self.drop:
                self.left_out.counts["scenes too full"] += 1
                continue
            yield sample.with_scene(replace(sample.scene, caption=sample.scene.caption.upper() + self.word))


class SlowShapes(Shapes):
    """Shapes that take their time, and are described as the quick ones."""

    def span(self, start, stop):
        for sample in super().span(start, stop):
            time.sleep(float(os.environ.get("PAUSE", "0")))
            yield sample


if __name__ == "__main__":
    task, *places = sys.argv[1:]
    ranks = ranks_of(os.environ, arrays=True)
    if task == "stage":
        shards, out = map(Path, places)
        report = run_stage(Shout(pause=float(os.environ.get("PAUSE", "0"))), shards, out, ranks=ranks)
    else:
        report = convert_source(SlowShapes(count=30), Path(places[0]), shard_size=4, ranks=ranks)
    print(report)
