"""Writes the samples of the published forms that the tests read: `python -m scripts.make_samples [DIR]`.

DIR is `tests/samples` if not given. Every image is drawn (`scripts.samples.drawing`), latents and embeddings are random, and the
same files come out each time. What the published forms are is said where they are read, in `datamodules/sources`. Among them
are on purpose: crowds; images without objects, with many, with a tiny one, with four persons; in grey, in CMYK, with
transparency, of many sizes; captions in other scripts; detections that are not sure and that leave their square; ids without
boxes or without a caption; an entry whose image is missing; relations given twice, none at all, and objects without any.
Beside them is a small detector of their colours in YOLOX's form.
"""

import sys
from pathlib import Path

from scripts.samples.cc3m import write_cc3m
from scripts.samples.coco import coco_images, write_coco, write_gligen_coco, write_rc_coco
from scripts.samples.detector import write_detector
from scripts.samples.laion_sg import write_laion_sg
from scripts.samples.sa1b import write_igligen, write_sa1b

FOLDER = Path("tests/samples")


def main(folder: str = str(FOLDER)) -> None:
    """Write all samples into a folder."""
    root = Path(folder)
    images = coco_images()
    write_coco(images, root / "coco")
    write_gligen_coco(images, root / "gligen_coco")
    write_rc_coco(images, root / "rc_coco")
    write_sa1b(root / "sa1b")
    write_igligen(root / "igligen")
    write_laion_sg(root / "laion_sg")
    write_cc3m(root / "cc3m")
    write_detector(root / "detector")


if __name__ == "__main__":
    main(*sys.argv[1:])
