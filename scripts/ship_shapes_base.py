"""Writes the averaged weights of a `shapes_base` run to the file that `backbone=shapes` opens.

    python -m scripts.ship_shapes_base RUN

The file's metadata holds the hash of the recipe: the run's resolved configuration and the checksums of its shards.
"""

import hashlib
import json
import sys
from pathlib import Path

from runtime.evaluation import load_module
from runtime.run_directory import load_run_config

OUT = Path("models/backbones/weights/shapes.safetensors")


def main(run: str) -> None:
    """Writes the file and prints its hash and the recipe's."""
    cfg = load_run_config(run)
    module, checkpoint = load_module(cfg, None)
    index = json.loads((Path(cfg.data.shards) / "index.json").read_text())
    learnt = {key: value for key, value in cfg.items() if key not in ("run", "paths", "callback", "logger", "plan")}
    recipe = {"config": json.loads(json.dumps(learnt, default=_plain)), "shards": index["shards"]}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    with module.averaged():
        module.backbone.save_weights(OUT, recipe=digest)
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.1f} MB from {checkpoint}, recipe {digest}")
    print(f"sha256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


def _plain(node: object) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
