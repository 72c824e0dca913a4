"""From a scene to an image file: a run or an adapter is restored, images are generated, recorded and can be made again.

Nothing here computes a score; `evaluation` does, with the images that this package leaves.
"""
