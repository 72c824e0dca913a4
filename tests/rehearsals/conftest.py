"""The user's folder, the networks that metrics ask for at tiny size, and the rehearsal itself."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor

from loggers.metrics_csv import read_metrics
from runtime.composition import CONF
from runtime.run_directory import RunDirectory
from tests.chat_server import chat_server, says
from tests.documents import header
from tests.labelling.conftest import tiny_model  # noqa: F401 - a fixture
from tests.metrics.conftest import state_dict, torchscript  # noqa: F401
from tests.metrics.test_diversity import weights as alexnet  # noqa: F401
from tests.rehearsals.rehearsal import EVERY, SIZE, SMALL, STEPS, User, changed, metrics_of, of_callbacks

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture(scope="session")
def user(tmp_path_factory):
    return User(tmp_path_factory.mktemp("home"), SAMPLES)


@pytest.fixture(scope="module")
def judge():
    """The address of a vision-language judge that always sees the same."""
    answer = {"scene_graph": [["circle", "left of", "square"]], "object_list": ["circle"], "predicate_list": []}
    with chat_server(otherwise=lambda body: says(json.dumps(answer))) as server:
        yield server.url


@pytest.fixture(scope="module")
def rtdetr_coco(tiny_model, tmp_path_factory):  # noqa: F811
    """A detector of COCO's 80 classes."""
    folder = tmp_path_factory.mktemp("rtdetr_coco")
    RTDetrForObjectDetection(RTDetrConfig.from_pretrained(tiny_model("rtdetr"), num_labels=80)).save_pretrained(folder)
    RTDetrImageProcessor.from_pretrained(tiny_model("rtdetr")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def networks(torchscript, state_dict, tiny_model, rtdetr_coco, alexnet, judge):  # noqa: F811
    """Metric -> where the files of its models lie."""
    return {
        "fid": (f"metric.fid.weights={torchscript}",),
        "fid_laion_sg": (f"metric.fid_laion_sg.weights={state_dict}",),
        "inception_score": (f"metric.inception_score.weights={torchscript}", "metric.inception_score.splits=1"),
        "clip_score": (f"metric.clip_score.model={tiny_model('clip')}",),
        "clip_image": (f"metric.clip_image.model={tiny_model('clip')}",),
        "crop_clip": (f"metric.crop_clip.model={tiny_model('clip')}",),
        "crop_pick_score": (
            f"metric.crop_pick_score.model={tiny_model('clip')}",
            "metric.crop_pick_score.processor=null",
        ),
        "sam_iou": (f"metric.sam_iou.segmenter.model={tiny_model('sam')}",),
        "detection": (f"metric.detection.detector.model={rtdetr_coco}",),
        "overlaybench": (f"metric.overlaybench.detector.model={tiny_model('grounding_dino')}",),
        "diversity": (f"metric.diversity.weights={alexnet}",),
        "sg_iou": (
            f"metric.sg_iou.model.base_url={judge}",
            "metric.sg_iou.model.api_key_env=null",
        ),
        "shapes": (),
    }


@pytest.fixture
def rehearse(user, networks):
    """rehearse(name, recipe): trains, crashes, resumes, evaluates, exports, by the commands of the headers."""

    def whole(name, recipe):
        run = f"runs/{name}"
        command = _training(user, name, recipe, run)
        user.run("train.py", *command)
        _check_training(user / run)
        _crash(user, run)
        user.run("train.py", *command)
        _check_training(user / run)
        _check_resumed(user, run)
        for protocol in recipe.protocols:
            _evaluate(user, run, protocol, networks)
        for form, method in itertools.product(recipe.exports, _config(user / run)["conditioning"]):
            out = f"exports/{name}_{method}" + (".safetensors" if form == "adapter" else "")
            user.run("convert.py", f"run={run}", f"adapter={method}", f"form={form}", f"out={out}")
            assert (user / out).exists()

    return whole


def _training(user, name, recipe, run):
    """The arguments of the header's command, at tiny size."""
    [[_, script, *arguments]] = header(CONF / "experiment" / f"{name}.yaml")["command"]
    assert script == "train.py"
    given = dict(recipe.given)
    for folder in given.get("data.shards", "").strip("[]").split(","):
        if folder:
            user.made(folder)
    if "start_from" in given:
        assert (user / "runs" / given["start_from"] / "finished.json").is_file()
        given["start_from"] = f"runs/{given['start_from']}"
    backbone = () if recipe.backbone is None else (f"backbone={recipe.backbone}",)
    named = [f"{key}={value}" for key, value in given.items()]
    missing = [
        word
        for word in arguments
        if word.split("=")[1] in ("DIR", "FILE") and word.split("=")[0] not in (*given, "run")
    ]
    assert not missing, f"{name}: what its command leaves open is not in the rehearsal: {missing}"
    return changed(arguments, f"run={run}", *named, *backbone, *SMALL["train.py"], *of_callbacks(name), *recipe.sizes)


def _config(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def _logged(run):
    found = {}
    for step, name, value in read_metrics(run / "metrics.csv"):
        found.setdefault(name, {})[step] = value
    return found


def _check_training(run):
    """All that a run leaves behind it: figures, validations, image grids, checkpoints."""
    assert json.loads((run / "finished.json").read_text())["step"] == STEPS
    logged = _logged(run)
    assert sorted(logged["train/loss"]) == list(range(STEPS))
    assert len(logged["validation/loss"]) == STEPS // EVERY
    callbacks = _config(run)["callback"]
    for step in range(EVERY, STEPS + 1, EVERY):
        assert (run / "checkpoints" / f"step={step}.ckpt").is_file()
        assert (run / "pictures" / f"step={step:07d}.png").is_file() == ("pictures" in callbacks)
        assert any(name.startswith("layout/") and step in steps for name, steps in logged.items()) == (
            "layout_score" in callbacks
        )


def _crash(user, run):
    """Leaves the run as a process that died before its last checkpoint would have."""
    shutil.copytree(user / run, user / f"{run}_whole")
    (user / run / "finished.json").unlink()
    (user / run / "checkpoints" / f"step={STEPS}.ckpt").unlink()


def _check_resumed(user, run):
    """The end of the resumed run is that of the whole one, bit for bit."""
    whole, resumed = (
        torch.load(RunDirectory(str(user / folder)).newest_checkpoint(), weights_only=True)["state_dict"]
        for folder in (f"{run}_whole", run)
    )
    assert whole.keys() == resumed.keys() != set()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())
    one, other = _logged(user / f"{run}_whole"), _logged(user / run)
    assert one["train/loss"] == other["train/loss"]


def _evaluate(user, run, protocol, networks):
    """Prepares a protocol's scenes and evaluates the run by it, as its header says."""
    commands = header(CONF / "protocol" / f"{protocol}.yaml")
    for [_, script, *arguments] in commands.get("prepare", []):
        [out] = [word.removeprefix("out=") for word in arguments if word.startswith("out=")]
        if not (user / out).exists():
            user.run(script, *changed(arguments))
    [[_, script, *arguments]] = commands["command"]
    size = yaml.safe_load((CONF / "protocol" / f"{protocol}.yaml").read_text())["size"]
    sizes = [] if size is None else [f"protocol.size={SIZE}"]
    models = [setting for metric in metrics_of(protocol) for setting in networks[metric]]
    user.run(script, *changed(arguments, f"run={run}", *models, *sizes, *SMALL["evaluate.py"]))
    [report] = (user / run / "evaluation").glob(f"{protocol}*/metrics.json")
    report = json.loads(report.read_text())
    assert report["values"]
