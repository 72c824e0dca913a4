"""What `tests/forked.py` imports once for all scripts; nothing here computes, so that no thread has begun."""
# ruff: noqa: F401

import sys
from pathlib import Path

import diffusers
import matplotlib.pyplot as plt
import torchvision

import callbacks.layout_score
import callbacks.pictures
import callbacks.progress
import datamodules.scene_datamodule
import evaluation.evaluate
import evaluation.report.sweep
import lightning_modules.scene_diffusion
import metrics.layout
import metrics.shapes_scorer
import models.backbones.tiny
import preparation.conversion
import preparation.prepare
import runtime.conversion
import runtime.launch.launch
import runtime.training
import sampling.split_sampling

OURS = {path.stem for path in Path(__file__).parents[1].iterdir() if path.suffix in ("", ".py")} - {"tests"}
for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
    del sys.modules[name]  # a script imports the project itself, in its own order
