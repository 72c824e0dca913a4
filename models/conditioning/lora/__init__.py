"""Low-rank changes to the UNet's own attention, beside any other method."""

from models.conditioning.lora.adapter import LoraAdapter

__all__ = ["LoraAdapter"]
