"""Shipping the base model: the hash of the recipe covers every stage, and a chain that is not whole is refused."""

import shutil

import pytest
from omegaconf import OmegaConf
from safetensors import safe_open

from runtime.build import build_backbone
from runtime.run_directory import RunError, load_run_config
from scripts.ship_shapes_base import main, recipe


@pytest.fixture(scope="module")
def stages(short, fit, tmp_path_factory):
    """Two runs of one step each: from random weights, and from the file that the first one shipped."""
    folder = tmp_path_factory.mktemp("stages")
    common = ("conditioning=none", "callback=[checkpoint]", "logger=[]", "trainer.max_steps=1")
    without = ["conditioning", "callback"]
    fit(short(folder / "first", *common, without=without))
    main(str(folder / "first"), out=folder / "first.safetensors")
    fit(
        short(folder / "second", *common, "seed=1", f"backbone.weights={folder / 'first.safetensors'}", without=without)
    )
    return folder


def altered(stages, tmp_path, key, value):
    """A copy of the first run whose configuration has another value."""
    folder = tmp_path / "altered"
    shutil.copytree(stages / "first", folder)
    cfg = load_run_config(folder)
    OmegaConf.update(cfg, key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    return folder


def test_the_last_stage_is_written_with_the_recipe_of_all(stages, tmp_path):
    out = tmp_path / "out.safetensors"
    digest = main(str(stages / "first"), str(stages / "second"), out=out)
    with safe_open(str(out), framework="pt") as file:
        assert file.metadata()["recipe"] == digest
    with safe_open(str(stages / "first.safetensors"), framework="pt") as file:
        assert file.metadata()["recipe"] != digest
    cfg = load_run_config(stages / "second")
    cfg.backbone.weights = str(out)
    build_backbone(cfg)


def test_the_recipe_changes_with_the_first_stage_and_not_with_where_the_files_lie(stages, tmp_path):
    second = load_run_config(stages / "second")
    whole = recipe([load_run_config(stages / "first"), second])
    moved = tmp_path / "moved"
    shutil.copytree(stages / "first", moved)
    elsewhere = OmegaConf.merge(second, {"backbone": {"weights": str(tmp_path / "other.safetensors")}})
    assert recipe([load_run_config(moved), elsewhere]) == whole
    other = altered(stages, tmp_path, "optimizer.weight_decay", 0.5)
    changed = recipe([load_run_config(other), second])
    assert (changed[0] != whole[0], changed[1]) == (True, whole[1])


def test_a_chain_that_is_not_whole_is_refused(stages, tmp_path):
    first, second = (load_run_config(stages / name) for name in ("first", "second"))
    with pytest.raises(RunError, match=r"second: is given as stage 1 but began from .*first\.safetensors; give every"):
        recipe([second])
    with pytest.raises(RunError, match="first: is given as stage 2 but began from random weights"):
        recipe([first, first])
    shutil.copytree(stages / "first", tmp_path / "first")
    (tmp_path / "first" / "finished.json").unlink()
    with pytest.raises(RunError, match="first: not finished"):
        recipe([load_run_config(tmp_path / "first")])
    with pytest.raises(RunError, match="RUN: give the run directories"):
        main()
