"""The whole chain on the published samples, from the download to statistics: killed twice, it makes what an unbroken one does."""

import json
import os
import shutil
import signal

import pytest
import torch

from datamodules.shards import ShardSet
from preparation.checking import check_folder
from preparation.prepare import prepare
from runtime.composition import compose


@pytest.fixture(autouse=True)
def one_thread():
    """A child of a process whose threads have worked may use none of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def labelling(tiny_model):
    """Labelling with tiny models: what they say means nothing, but it is said each time alike."""
    named = {"detector": "grounding_dino", "segmenter": "sam", "describer": "qwen_vl"}
    models = [word for part, name in named.items() for word in (f"{part}={name}", f"{part}.model={tiny_model(name)}")]
    settings = [
        "detector.box_threshold=0.05",
        "describer.dtype=float32",
        "describer.max_tokens=4",
        "stage.short_side=24",
    ]
    words = ["tagger=vocabulary", "tagger.words=[red circle,blue square,dog]"]
    return ["task=label", "accelerator=cpu", *words, *models, *settings]


@pytest.fixture
def few(samples, tmp_path):
    """The first nine images of CC3M's sample, with what lies beside them."""
    files = sorted((samples / "cc3m" / "cc3m-images" / "00000").iterdir())[:27]
    (tmp_path / "few").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "few")
    return tmp_path / "few"


SOURCES = {
    "sa1b": ["source=sa1b", "source.root={samples}/sa1b", "source.tars=sa_000000.tar"],
    "cc3m": ["source=img2dataset", "source.root={few}"],
}


@pytest.mark.parametrize("name", SOURCES)
def test_killed_twice_it_is_what_an_unbroken_run_makes(name, labelling, samples, few, tmp_path):
    latents = ["task=latents", "backbone=tiny_sd15", "accelerator=cpu"]
    latents += ["stage.output.pictures=true", "stage.output.flipped=true"]

    def chain(root):
        """Convert, latents, label, stats, each over what the one before made."""
        source = [argument.format(samples=samples, few=few) for argument in SOURCES[name]]
        source += ["source.short_side=64", "shard_size=3"]
        steps = [("shards", source), ("latents", latents), ("labelled", labelling), ("stats", ["task=stats"])]
        given = [root / step for step, _ in steps]
        return [
            [*arguments, f"out={out}", *([f"shards={before}"] if before else [])]
            for (_, arguments), out, before in zip(steps, given, [None, *given], strict=False)
        ]

    unbroken, broken = tmp_path / "unbroken" / "data", tmp_path / "broken" / "data"
    for arguments in chain(unbroken):
        prepare(compose("prepare", arguments))
    # the shards of a file are named by it
    second, third = ("000000-1", "000000-2") if name == "sa1b" else ("000001", "000002")
    for fatal in (f"latents/{second}.tar", f"labelled/{third}.tar"):
        assert killed(chain(broken), before=fatal) == signal.SIGKILL
        assert not (broken / fatal).exists()
        assert list((broken / fatal).parent.glob(".*.partial"))
    for arguments in chain(broken):
        prepare(compose("prepare", arguments))
    assert contents(broken) == contents(unbroken, called=broken)
    assert check_folder(str(broken / "labelled")).faults == []
    made = ShardSet(broken / "labelled")
    assert made.provides >= {"latents", "image", "boxes", "phrases", "masks", "descriptions", "scores"}
    assert [stage["name"] for stage in made.index["stages"]] == ["convert", "latents", "label"]
    scenes = [made[number].scene for number in range(len(made))]
    assert sum(len(scene.objects) for scene in scenes) > len(scenes) > 0
    assert all(made[number].latent is not None for number in range(len(made)))
    assert json.loads((broken / "stats" / "statistics.json").read_text())["scenes"] == len(made)


def killed(chain, *, before):
    """The signal that ended a process: it runs a chain and kills itself the moment before a shard takes its name."""
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    rename = os.replace

    def replace(source, target):
        if str(target).endswith(before):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    try:
        for arguments in chain:
            prepare(compose("prepare", arguments))
    finally:
        os._exit(1)  # never reached where it is killed


def contents(root, called=None):
    """Every file of a folder, as it would be if the folder were called otherwise."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: data.replace(str(root).encode(), str(called or root).encode()) for name, data in files.items()}
