"""Training of GLIGEN's boxes with phrases."""

from lightning_modules.scene_diffusion import SceneDiffusion


class Boxes(SceneDiffusion):
    """The shared step with the boxes adapter; what only this method knows lives on `BoxesAdapter`."""
