"""What is learnt at which noise level, and the random draws of a step."""

from models.objectives.diffusion import DiffusionObjective
from models.objectives.draws import Draws, draw

__all__ = ["DiffusionObjective", "Draws", "draw"]
