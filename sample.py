"""Draw with a trained run: a scene file, the layout beside one picture for each seed; or a picture of each scene of a split."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Draws the scene, or the split, that the configuration names."""
    from runtime.run_directory import load_run_config

    run_cfg = load_run_config(cfg.run, cfg)

    if cfg.split is not None:
        from runtime.split import draw_split

        print(draw_split(cfg, run_cfg))
        return
    from runtime.drawing import draw

    print(draw(cfg, run_cfg))


if __name__ == "__main__":
    command("sample", main)
