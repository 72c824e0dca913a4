"""Training of regional cross-attention: boxes with phrases, or regions with sentences."""

from lightning_modules.scene_diffusion import SceneDiffusion


class Regions(SceneDiffusion):
    """The shared step with the regions adapter; what only this method knows lives on `RegionsAdapter`."""
