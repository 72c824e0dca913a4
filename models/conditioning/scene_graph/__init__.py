"""Scene graphs: objects with their relations, added to the prompt tokens of a frozen denoiser (SDXL-SG)."""

from models.conditioning.scene_graph.adapter import SceneGraphAdapter

__all__ = ["SceneGraphAdapter"]
