"""Convert weights: published ones and those of a run become adapter files, and adapters become what others read."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Converts what the configuration names."""
    from runtime.conversion import convert

    print(convert(cfg))


if __name__ == "__main__":
    command("convert", main)
