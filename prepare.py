"""Prepare data: a source becomes Scene shards, shards become other shards, and shards are counted and checked."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Runs the task that the configuration names."""
    from preparation.prepare import prepare

    prepare(cfg)


if __name__ == "__main__":
    command("prepare", main)
