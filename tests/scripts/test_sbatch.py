"""The batch script for SLURM: the one that is shipped is what the command gives."""

import re
import subprocess

import pytest

from runtime.composition import CONF, compose
from scripts.sbatch import main, render

SHIPPED = CONF.parent / "scripts" / "train.sbatch"
EIGHT_A100 = (
    "--nodes 4 --gpus 8 --time 24:00:00 --constraint a100 --name gligen_coco -- "
    "experiment=gligen_coco_sd14 run=runs/gligen_coco"
)


def test_the_shipped_script_is_what_the_command_gives_for_four_nodes_of_eight_gpus(capsys):
    main(EIGHT_A100.split())
    assert capsys.readouterr().out == SHIPPED.read_text()
    assert re.search(r"--nodes=4\n.*--ntasks-per-node=8\n.*--gpus-per-node=8\n", SHIPPED.read_text())


def test_it_is_a_shell_script_whose_training_composes():
    subprocess.run(["bash", "-n", SHIPPED], check=True)
    [overrides] = re.findall(r"python train\.py (.*) \"\$@\"$", SHIPPED.read_text(), re.MULTILINE)
    cfg = compose("train", overrides.split())
    assert (cfg.trainer.launcher, cfg.trainer.requeue, cfg.trainer.strategy) == ("slurm", True, "ddp")


def test_what_is_asked_for_is_in_it(tmp_path):
    out = tmp_path / "job.sbatch"
    asked = [
        "--nodes",
        "1",
        "--gpus",
        "0",
        "--time",
        "1-12",
        "--partition",
        "short",
        "--account",
        "me",
        "--out",
        str(out),
    ]
    main([*asked, "--within", "apptainer exec --nv 'my image.sif'", "--", "name=a b"])
    text = out.read_text()
    for line in (
        "partition=short",
        "account=me",
        "nodes=1",
        "ntasks-per-node=1",
        "time=1-12",
        "signal=USR1@120",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "gpus" not in text
    command = "apptainer exec --nv 'my image.sif' python train.py trainer=slurm 'name=a b' \"$@\"\n"
    assert text.endswith(f"exec srun --kill-on-bad-exit=1 {command}")


@pytest.mark.parametrize(
    ("wrong", "said"), [({"time": "a day"}, "--time a day: not of"), ({"nodes": 0}, "--nodes 0: must be")]
)
def test_what_slurm_would_not_take_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        render([], **({"nodes": 1, "gpus": 1, "time": "1"} | wrong))
