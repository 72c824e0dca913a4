"""Every experiment that trains, with what its rehearsal needs beside its header; `test_coverage.py` misses none."""

from tests.forked import REPO
from tests.rehearsals.rehearsal import SIZE, Recipe

AT_64 = (f"backbone.resolution={SIZE}", f"data.resolution={SIZE}")
SHIPPED = str(REPO / "models" / "backbones" / "weights" / "shapes.safetensors")
DRAWN = ("data.make.source.count=48", "data.make_validation.source.count=8", "batch_size=4", "optimizer.warmup_steps=1")
PHOTOGRAPHS = (*AT_64, "batch_size=2", "optimizer.warmup_steps=1")

BOXES = {
    "gligen_coco_sd14": Recipe(
        backbone="tiny_sd15",
        protocols=("gligen_coco2014", "gligen_coco2017"),
        sizes=PHOTOGRAPHS,
        given=(("data.shards", "data/coco/train"),),
        exports=("adapter", "diffusers"),
    ),
    "igligen_sa1b_sd21": Recipe(
        backbone="tiny_sd21_base",
        protocols=("overlaybench",),
        sizes=PHOTOGRAPHS,
        given=(("data.shards", "data/sa1b/latents_sd21"),),
        exports=("adapter", "diffusers"),
    ),
    "igligen_sa1b_sdxl_512": Recipe(
        backbone="tiny_sdxl",
        protocols=("gligen_coco2017",),
        sizes=PHOTOGRAPHS,
        given=(("data.shards", "data/igligen/train"),),
        exports=("adapter", "diffusers"),
    ),
    "igligen_sa1b_sdxl_1024": Recipe(
        backbone="tiny_sdxl",
        protocols=("gligen_coco2017",),
        sizes=(*PHOTOGRAPHS, "trainer.accumulate=2"),
        given=(("data.shards", "data/igligen/train_1024"), ("start_from", "igligen_sa1b_sdxl_512")),
        exports=("adapter", "diffusers"),
    ),
}
REGIONS = {
    "rich_context_sdxl_512": Recipe(
        backbone="tiny_sdxl",
        protocols=("rich_context_coco", "rich_context_cc3m"),
        sizes=(*AT_64, "trainer.micro_batch=1", "batch_size=2", "optimizer.warmup_steps=1"),
        given=(("data.shards", "[data/coco/rich_context,data/rich_context/train]"),),
    ),
    "rich_context_sd15": Recipe(
        backbone="tiny_sd15",
        protocols=("rich_context_coco",),
        sizes=(*AT_64, "trainer.micro_batch=1", "batch_size=2", "optimizer.warmup_steps=1"),
        given=(("data.shards", "[data/coco/rich_context,data/rich_context/train]"),),
    ),
}
SCENE_GRAPHS = {
    "sdxl_sg_laion_sg": Recipe(
        backbone="tiny_sdxl",
        protocols=("compsg_bench", "laion_sg_test"),
        sizes=PHOTOGRAPHS,
        given=(("data.shards", "data/laion_sg/train"),),
    ),
    "sd15_sg_laion_sg": Recipe(
        backbone="tiny_sd15",
        protocols=("compsg_bench",),
        sizes=PHOTOGRAPHS,
        given=(("data.shards", "data/laion_sg/train"),),
    ),
}
SHAPES = {
    **{
        name: Recipe(backbone=None, protocols=("shapes",), sizes=DRAWN)
        for name in ("shapes_regions", "shapes_boxes", "shapes_scene_graph", "shapes_boxes_and_graph", "study")
    },
    **{
        name: Recipe(
            backbone=None, protocols=("shapes",), sizes=DRAWN, given=(("backbone.weights", SHIPPED),), exports=()
        )
        for name in ("shapes_base_high_noise", "shapes_base_all_noise", "shapes_base_places")
    },
    "shapes_base": Recipe(backbone=None, protocols=("shapes",), sizes=DRAWN, exports=()),
}
