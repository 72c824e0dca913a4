"""Scenes: what data, conditions, metrics and drawings talk about.

Pure records and geometry over numpy, torch and Pillow; imports nothing else of the project. Boxes, regions,
graphs and drawings are modules of their own: ``from scenes import boxes, draw, graph, regions``.
"""

from scenes.scene import Frame, Relation, Scene, SceneBatch, SceneError, SceneObject, load_scene, save_scene

__all__ = [
    "Frame",
    "Relation",
    "Scene",
    "SceneBatch",
    "SceneError",
    "SceneObject",
    "load_scene",
    "save_scene",
]
