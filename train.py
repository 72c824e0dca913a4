"""Train adapters over a frozen diffusion model: compose, check, build, fit. The same command again resumes."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Trains the run that the configuration describes, from where it stands, in as many processes as it asks for."""
    from runtime.launch.launch import relaunch

    relaunch(cfg)  # before what takes long to import: each of the processes imports it for itself

    from runtime.training import run

    run(cfg)


if __name__ == "__main__":
    command("train", main)
