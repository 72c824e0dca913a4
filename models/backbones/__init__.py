"""Backbones: the frozen diffusion models that adapters attach to.

`base.Backbone` is what the rest of the project sees; the other files build one from published weights (`stable_diffusion`),
from the repository's own small weights (`shapes`), or at random for tests (`tiny`).
"""
