"""Prepare data: a source becomes Scene shards, and shards are checked."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Runs the task that the configuration names."""
    from runtime.preparation import TASKS

    TASKS[cfg.task](cfg)


if __name__ == "__main__":
    command("prepare", main)
