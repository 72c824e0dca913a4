"""Learning-rate schedules by their formulas; what an optimizer ends up with is in test_ranks.py."""

import math

import pytest

from lightning_modules.schedules import learning_rate_factor

all_schedules = pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
that_fall = pytest.mark.parametrize("schedule", ["cosine", "linear"])


def factors(schedule, *, steps=20, **settings):
    return list(map(learning_rate_factor(schedule, steps=steps, **settings), range(steps)))


@all_schedules
def test_the_warm_up_is_a_line_that_begins_above_zero(schedule):
    found = factors(schedule, warmup_steps=4)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(found) == 1.0


def test_constant_stays_linear_is_a_line_and_cosine_half_a_wave_to_the_final_fraction():
    assert factors("constant") == [1.0] * 20
    line = factors("linear", steps=11, final_fraction=0.2)
    assert line == pytest.approx([1 - 0.08 * step for step in range(11)])
    wave = factors("cosine", steps=13, warmup_steps=2, final_fraction=0.1)
    assert wave[2:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * done / 10)) / 2 for done in range(11)])
    assert wave[7] == pytest.approx(0.55)


@that_fall
def test_the_last_step_has_the_final_fraction_and_so_has_what_follows(schedule):
    factor = learning_rate_factor(schedule, steps=20, warmup_steps=3, final_fraction=0.05)
    assert factor(3) == 1.0
    assert [factor(step) for step in (19, 20, 1000)] == pytest.approx([0.05] * 3)
    falling = [factor(step) for step in range(3, 20)]
    assert all(after < before for before, after in zip(falling, falling[1:], strict=False))


@all_schedules
def test_a_run_of_one_step_has_a_factor(schedule):
    assert 0 <= learning_rate_factor(schedule, steps=1)(0) <= 1


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="optimizer.schedule=cosin: .*constant, cosine or linear"):
        factors("cosin")


@that_fall
def test_a_short_trial_of_a_recipe_only_warms_up_and_says_so_where_it_decays(schedule):
    with pytest.warns(UserWarning, match="optimizer.warmup_steps=9: .*trainer.max_steps=3"):
        assert factors(schedule, steps=3, warmup_steps=9) == pytest.approx([0.1, 0.2, 0.3])
    assert factors("constant", steps=3, warmup_steps=9) == pytest.approx([0.1, 0.2, 0.3])  # warnings are errors
