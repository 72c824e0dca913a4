"""Models: frozen diffusion backbones, conditioning adapters, objectives and sampling.

Everything here is plain PyTorch, so that a notebook can use an adapter with bare diffusers. Training loops and
configuration composition live elsewhere.
"""
