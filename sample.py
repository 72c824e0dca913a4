"""Draw a scene file with a trained run: the layout beside one picture for each seed."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Draws the scene that the configuration names."""
    from runtime.run_directory import load_run_config

    run_cfg = load_run_config(cfg.run, cfg)

    from runtime.drawing import draw

    draw(cfg, run_cfg)
    print(cfg.out)


if __name__ == "__main__":
    command("sample", main)
