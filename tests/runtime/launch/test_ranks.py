"""What launchers say of a process, and that the shares of all ranks are the whole."""

import pytest

from runtime.launch.ranks import Ranks, ranks_of


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(rank=3, count=8, local=1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks()),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS": "6"},
            Ranks(rank=5, count=6, local=2),
        ),
        (
            {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1"},
            Ranks(rank=1, count=2, local=1),
        ),
        # the batch script itself, which reserved six tasks and is one process
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, Ranks()),
        # torchrun under srun: torchrun's processes are the ones
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            Ranks(rank=1, count=2, local=1),
        ),
    ],
)
def test_the_place_is_what_the_launcher_said(environment, expected):
    assert ranks_of(environment) == expected


@pytest.mark.parametrize(
    "said", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "a", "WORLD_SIZE": "2"}]
)
def test_a_place_that_cannot_be_is_refused(said):
    with pytest.raises(ValueError, match=f"RANK={said['RANK']} WORLD_SIZE=2: .* unset RANK") as caught:
        ranks_of(said)
    assert "\n" not in str(caught.value)


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "8",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "4",
    "SLURM_ARRAY_TASK_STEP": "2",
}


def test_the_elements_of_a_job_array_share_the_work_where_they_are_to():
    assert ranks_of(ARRAY) == Ranks()
    assert ranks_of(ARRAY, arrays=True) == Ranks(rank=2, count=4)
    within = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "1"}
    assert ranks_of(ARRAY | within, arrays=True) == Ranks(rank=7, count=12, local=1)
    assert ranks_of(within, arrays=True) == Ranks(rank=1, count=3, local=1)


@pytest.mark.parametrize("change", [{"ID": "5"}, {"ID": "12"}, {"COUNT": "x"}, {"STEP": "0"}])
def test_a_job_array_with_gaps_is_refused(change):
    said = ARRAY | {f"SLURM_ARRAY_TASK_{name}": value for name, value in change.items()}
    with pytest.raises(ValueError, match="no place in a job array without gaps; give one such as --array=0-7"):
        ranks_of(said, arrays=True)


@pytest.mark.parametrize(("items", "count"), [(7, 3), (2, 4), (0, 2), (6, 1)])
def test_the_shares_tile_the_items(items, count):
    shares = [Ranks(rank=rank, count=count).share(range(items)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    blocks = [Ranks(rank=rank, count=count).block(range(items)) for rank in range(count)]
    assert [item for block in blocks for item in block] == list(range(items))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
