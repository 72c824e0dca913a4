"""Regional cross-attention: each image position attends to the words of the boxes that cover it."""

from models.conditioning.regions.adapter import RegionsAdapter

__all__ = ["RegionsAdapter"]
