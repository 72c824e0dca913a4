"""What happens beside training, on a real short run: pictures, layout score, rates and gates."""

import numpy as np
import pytest
from PIL import Image

from callbacks.layout_score import LayoutScore
from callbacks.progress import Progress
from models.sampling import to_uint8
from tests.ranks import Brightness
from tests.run_files import folder_of, logged, names, steps_of


class TestPictures:
    def test_there_is_one_sheet_for_each_step_that_is_due_in_tensorboard_too(self, short_run, accumulated):
        assert names(short_run[0], "pictures") == ["step=0000002.png", "step=0000004.png"]
        assert names(accumulated[0], "pictures") == ["step=0000003.png"]
        [events] = folder_of(short_run[0]).glob("tensorboard/events.*")
        assert events.read_bytes().count(b"pictures") == 2

    def test_a_sheet_has_a_row_for_each_scene_and_three_columns(self, short_run):
        with Image.open(folder_of(short_run[0]) / "pictures" / "step=0000004.png") as sheet:
            width, height = sheet.size
            pixels = np.asarray(sheet.convert("RGB"))
        assert width >= 3 * 256
        assert height >= 2 * 256
        assert width > height
        assert all(third.std() > 10 for third in np.array_split(pixels, 3, axis=1))


class TestLayoutScore:
    def test_it_is_what_the_metric_says_of_the_averaged_weights(self, accumulated):
        cfg, module = accumulated
        trainer, held_out = module.trainer, module.trainer.datamodule.held_out(2)
        callback = LayoutScore(metric=Brightness(), every=4, scenes=2, seed=3)
        callback.on_train_epoch_end(trainer, module)
        with module.averaged():
            drawn = to_uint8(module.sample(held_out.scenes, seed=3))
        assert drawn.std() > 1
        value = float(trainer.callback_metrics["layout/brightness"])
        assert value == pytest.approx(drawn.mean(), rel=1e-6)
        assert logged(cfg, "layout/brightness") == [(4, pytest.approx(value))]

    def test_it_is_logged_once_on_the_steps_that_are_due(self, short_run, accumulated):
        assert steps_of(short_run[0], "layout/layout_iou") == [2, 4]
        assert steps_of(accumulated[0], "layout/layout_iou") == [3]


class TestProgress:
    def test_rates_are_logged(self, short_run, accumulated):
        for (cfg, _), steps in ((short_run, [1, 2, 3, 4]), (accumulated, [2, 4])):
            assert steps_of(cfg, "speed/samples_per_second") == steps
            assert all(value > 0 for _, value in logged(cfg, "speed/samples_per_second"))
            assert all(0 <= value <= 1 for _, value in logged(cfg, "speed/data_wait"))

    def test_samples_are_counted_through_accumulated_steps(self, accumulated):
        trainer, module = accumulated[1].trainer, accumulated[1]
        [progress] = [callback for callback in trainer.callbacks if isinstance(callback, Progress)]
        shown = progress.get_metrics(trainer, module)
        assert set(shown) == {"loss", "samples/s", "data wait"}
        assert float(shown["loss"]) > 0


class TestGates:
    def test_every_gate_is_logged_and_opens_after_the_first_step(self, short_run):
        cfg, module = short_run
        gates = module.adapters["regions"].gates()
        assert gates
        for gate in gates:
            assert steps_of(cfg, f"gates/regions/{gate}") == [0, 1, 2, 3]
            first, *further = [value for _, value in logged(cfg, f"gates/regions/{gate}")]
            assert first == 0
            assert all(value > 0 for value in further)

    def test_the_norm_is_that_of_the_whole_gradient(self, short_run, accumulated):
        whole, halves = (logged(cfg, "gradient_norm") for cfg, _ in (short_run, accumulated))
        assert all(value > 0 for _, value in whole)
        assert [step for step, _ in halves] == [0, 2]
        # the same first batch, at once and as two micro-batches
        assert halves[0][1] == pytest.approx(whole[0][1], rel=1e-3)
