"""Open a page on this machine to draw scenes in: boxes by mouse, relations, and the picture that a trained run makes of them."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Serves the page until it is interrupted."""
    from web.serving import serve

    serve(cfg)


if __name__ == "__main__":
    command("app", main)
