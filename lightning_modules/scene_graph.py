"""Training of scene graphs on the prompt."""

from lightning_modules.scene_diffusion import SceneDiffusion


class SceneGraph(SceneDiffusion):
    """The shared step with the scene-graph adapter; what only this method knows lives on `SceneGraphAdapter`."""
