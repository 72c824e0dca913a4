"""The study of methods: what it runs is what its experiment allows, and what it writes is what was measured."""

import json
from xml.etree import ElementTree

import pytest

from runtime.composition import compose
from runtime.run_directory import load_run_config
from scripts.study import ARMS, METHODS, SEEDS, VALUES, evaluate_command, picture, run_of, summary, table, train_command


@pytest.mark.parametrize("arm", ARMS, ids="+".join)
def test_every_run_differs_from_the_others_in_its_methods_alone(arm, tmp_path):
    script, *arguments = train_command(arm, 1, run_of(tmp_path, arm, 1))
    cfg = compose(script.removesuffix(".py"), arguments)
    assert (sorted(cfg.conditioning), cfg.seed) == (sorted(arm), 1)
    other = compose("train", train_command(METHODS, 1, run_of(tmp_path, arm, 1))[1:])
    for key in cfg:
        if key != "conditioning":
            assert cfg[key] == other[key], key
    for method in arm:
        assert cfg.conditioning[method] == other.conditioning[method]


def test_every_run_has_a_folder_and_is_measured_on_the_same_scenes(a_trained_folder, tmp_path):
    folders = {run_of(tmp_path, arm, seed) for arm in ARMS for seed in SEEDS}
    assert len(folders) == len(ARMS) * len(SEEDS) == 21
    script, *arguments = evaluate_command(a_trained_folder)
    cfg = compose(script.removesuffix(".py"), arguments)
    load_run_config(cfg.run, cfg)
    assert (cfg.protocol.name, cfg.protocol.scenes) == ("shapes", 64)


@pytest.fixture
def a_trained_folder(tmp_path):
    from omegaconf import OmegaConf

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(compose("train"), resolve=True))
    return folder


def test_the_table_and_the_picture_say_what_was_measured(tmp_path):
    measured = {(("boxes",), 0): 0.2, (("boxes",), 1): 0.4, (("regions", "boxes"), 0): 0.5}
    for (arm, seed), value in measured.items():
        folder = run_of(tmp_path, arm, seed) / "evaluation" / "shapes"
        folder.mkdir(parents=True)
        of_arm = {name: {"mean": value + place / 100} for place, name in enumerate(VALUES)}
        bare = {name: {"mean": 0.1} for name in VALUES}
        (folder / "metrics.json").write_text(json.dumps({"values": {"with_scene": of_arm, "without_scene": bare}}))
    found = summary(tmp_path)
    assert list(found["arms"]) == ["boxes", "regions+boxes"]
    assert found["arms"]["boxes"]["with_scene"]["layout_iou"] == [0.2, 0.4]
    assert found["arms"]["regions+boxes"]["trained"] > found["arms"]["boxes"]["trained"]
    _, _, boxes, both = table(found).splitlines()
    assert boxes.startswith("| boxes | 0.300 [0.200, 0.400] | 0.310 [0.210, 0.410] |")
    assert boxes.endswith("| 0.100, 0.100 | 1.03 M | 1.00 × | 2 |")
    assert both.startswith("| regions + boxes | 0.500 |")
    drawn = ElementTree.fromstring(picture(found))
    assert len(drawn.findall("{*}circle")) == 3 * len(VALUES)
    assert [text.text for text in drawn.findall("{*}text")][-2:] == ["boxes", "regions + boxes"]
