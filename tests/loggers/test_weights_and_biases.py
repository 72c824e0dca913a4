"""W&B offline on a real short run: it works, a resumed run keeps its identity, another run has another."""

import pytest


@pytest.fixture
def offline(monkeypatch, short, fit):
    """offline(folder, steps): train to a step with W&B as the only logger."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    settings = ("logger=wandb", "callback=[pictures,checkpoint]", "callback.pictures.scenes=1")
    without = ["callback", "trainer.max_steps"]
    return lambda folder, steps: fit(short(folder, *settings, f"trainer.max_steps={steps}", without=without))


def attempts(folder):
    """The files that W&B would send, by the id of the W&B run."""
    found = {}
    for file in (folder / "wandb").glob("offline-run-*/run-*.wandb"):
        found.setdefault(file.stem.removeprefix("run-"), []).append(file.read_bytes())
    return found


def test_a_resumed_run_is_one_run_of_wandb_and_another_folder_another(offline, tmp_path):
    offline(tmp_path / "one", 1)
    [(first, _)] = attempts(tmp_path / "one").items()
    offline(tmp_path / "one", 2)
    [(again, contents)] = attempts(tmp_path / "one").items()
    assert again == first
    content = b"".join(contents)
    assert all(name in content for name in (b"train/loss", b"validation/loss", b"pictures"))
    offline(tmp_path / "two", 1)
    [other] = attempts(tmp_path / "two")
    assert other != first
