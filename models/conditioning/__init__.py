"""How a scene reaches the denoiser: slots in the UNet's blocks, and the adapters that own what is put there."""
