"""Writes the averaged weights of the shapes base model to the file that `backbone=shapes` opens.

    python -m scripts.ship_shapes_base RUN [RUN ...]

The runs are the stages of the model in their order, the first from random weights; the last one's weights are written. The
file's metadata holds the hash of the recipe: of every stage the run's resolved configuration, the step that it ended at and the
checksums of its shards.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runtime.restoring import load_module
from runtime.run_directory import RunDirectory, RunError, load_run_config

OUT = Path("models/backbones/weights/shapes.safetensors")
NOT_LEARNT_FROM = ("run", "paths", "callback", "logger", "plan")


def main(*runs: str, out: Path = OUT) -> str:
    """Writes the file and prints its hash and the recipe's.

    Args:
        *runs: the run directories of every stage, the first stage first.
        out: the file to write.

    Returns:
        The hash of the recipe.

    Raises:
        RunError: the runs are not a whole chain of stages, or one of them is not finished.
    """
    configs = [load_run_config(run) for run in runs]
    digest = hashlib.sha256(json.dumps(recipe(configs), sort_keys=True).encode()).hexdigest()
    module, checkpoint = load_module(configs[-1], None)
    with module.averaged():
        module.backbone.save_weights(out, recipe=digest)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB from {checkpoint}, recipe {digest} of {len(runs)} stages")
    print(f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}")
    return digest


def recipe(configs: list[DictConfig]) -> list[dict[str, Any]]:
    """What the weights follow from, stage by stage, as JSON values; where the files lie is left out.

    Args:
        configs: the configurations of the runs, the first stage first.

    Returns:
        One entry a stage: `config`, `step` and `shards`.

    Raises:
        RunError: the first run did not start from random weights, a later one did, or one is not finished.
    """
    if not configs:
        raise RunError("RUN: give the run directories of every stage, the first stage first")
    stages = []
    for number, cfg in enumerate(configs, start=1):
        start, step = cfg.backbone.weights or cfg.get("start_from"), RunDirectory(cfg.run).finished_step()
        if (start is None) != (number == 1):
            began = "random weights" if start is None else str(start)
            raise RunError(
                f"run={cfg.run}: is given as stage {number} but began from {began}; give every stage in order"
            )
        if step is None:
            raise RunError(f"run={cfg.run}: not finished; train it to its end: python train.py run={cfg.run}")
        plain = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(plain, dict)
        plain["backbone"], plain["start_from"] = (
            {**plain["backbone"], "weights": None},
            None,
        )  # the stages before say which
        plain["data"] = {key: value for key, value in plain["data"].items() if not key.startswith(("shards", "make"))}
        learnt = {str(key): value for key, value in plain.items() if key not in NOT_LEARNT_FROM}
        index = json.loads((Path(cfg.data.shards) / "index.json").read_text(encoding="utf-8"))
        stages.append({"config": learnt, "step": step, "shards": index["shards"]})
    return stages


if __name__ == "__main__":
    main(*sys.argv[1:])
