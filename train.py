"""Train adapters over a frozen diffusion model: compose, check, build, fit. The same command again resumes."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Trains the run that the configuration describes, from where it stands."""
    from runtime.run_directory import RunDirectory
    from runtime.training import train

    directory = RunDirectory(cfg.run)
    attempt = directory.inspect(cfg)
    print(attempt.message)
    if attempt.state == "finished":
        return
    train(cfg, directory, attempt)


if __name__ == "__main__":
    command("train", main)
