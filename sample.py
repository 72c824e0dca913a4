"""Draw with trained weights: a scene as a sheet, grid or picture that can be made again from itself; or each scene of a split."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Draws the scene, or the split, that the configuration names."""
    from runtime.run_config import restored_config
    from sampling.reproduce import again

    made_again = None if cfg.again is None else again(cfg)
    asked = cfg if made_again is None else made_again.cfg
    run_cfg = restored_config(asked)

    if asked.split is not None:
        from sampling.split_sampling import draw_split

        print(draw_split(asked, run_cfg))
        return
    from sampling.image_record import compared
    from sampling.sample import draw

    out = draw(asked, run_cfg, made_again)
    print(f"{out}: {compared(cfg.again, out)}" if made_again is not None and made_again.is_same else out)


if __name__ == "__main__":
    command("sample", main)
