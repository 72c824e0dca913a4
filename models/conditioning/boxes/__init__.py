"""GLIGEN's boxes with phrases: grounding tokens, and gated self-attention over them in the blocks."""

from models.conditioning.boxes.adapter import BoxesAdapter

__all__ = ["BoxesAdapter"]
