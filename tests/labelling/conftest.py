"""Tiny models with random weights, of transformers' own classes, saved as they are published."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from models.text import word_tokenizer

GOLDEN_RAM = Path(__file__).parents[1] / "golden" / "ram"
WORDS = "a an the red green blue circle square dog hot cat striped plain on sits ##s".split()
PHOTO_WORDS = [*WORDS[:-1], "photo", "of"]
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = {**TINY, "image_size": 32, "patch_size": 8}
CODER = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
SPREAD = {"initializer_range": 0.5}  # weights as large as this make outputs differ from input to input


@pytest.fixture
def pictures():
    """Four pictures of two sizes."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 3), np.uint8) for size in ((48, 64), (40, 56), (48, 64), (40, 56))]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(name): a folder with the model that the function of that name below builds, and its processor."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for part in BUILDERS[name]():
                part.save_pretrained(folder)
        return str(folder)

    return make


def square(side):
    return {"height": side, "width": side}


def words_tokenizer(words, *, named=None, unknown="[UNK]", **special):
    """A tokenizer with a token for each word, of transformers' general class; `special` names some of them."""
    vocabulary = {word: place for place, word in enumerate([*special.values(), unknown, *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    more = {} if named is None else {"extra_special_tokens": named}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=unknown, **special, **more)


def grounding_dino():
    """Texts of 16 tokens, 12 boxes, pictures of 32 px."""
    vocabulary = [f"[unused{number}]" for number in range(1030)]
    # its model knows BERT's ids of [CLS], [SEP], the full stop and the question mark
    for place, word in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1010: ",",
        1012: ".",
    }.items():
        vocabulary[place] = word
    vocabulary = [*vocabulary[:1029], "?", *WORDS]
    tokenizer = hf.BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})
    images = hf.GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    swin = {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4}
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 12, "max_text_len": 16, "num_feature_levels": 3}
    config = hf.GroundingDinoConfig(
        backbone_config=hf.SwinConfig(**swin, out_indices=[1, 2, 3]),
        text_config=hf.BertConfig(**TINY, vocab_size=len(vocabulary)),
        d_model=32,
        **sizes,
        **CODER,
    )
    return hf.GroundingDinoForObjectDetection(config), hf.GroundingDinoProcessor(images, tokenizer)


def owlv2():
    """Queries of 8 tokens, 16 boxes."""
    tokenizer = word_tokenizer(PHOTO_WORDS, max_length=8)
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 8}
    model = hf.Owlv2ForObjectDetection(hf.Owlv2Config(text_config=text, vision_config=VIT, projection_dim=16))
    with torch.no_grad():  # as they are drawn, its boxes have no area
        for parameter in model.box_head.parameters():
            parameter.mul_(0.05)
    return model, hf.Owlv2Processor(hf.Owlv2ImageProcessor(size=square(32)), tokenizer)


def detr():
    names = ["N/A", "person", "cat", "dog"]
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
    sizes = {**CODER, "encoder_layers": 1, "decoder_layers": 1}
    config = hf.DetrConfig(
        backbone_config=hf.ResNetConfig(**resnet),
        d_model=16,
        num_queries=12,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **sizes,
    )
    return hf.DetrForObjectDetection(config), hf.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})


def rtdetr():
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    sizes = {"encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [16, 16, 16]}
    sizes |= CODER
    backbone = hf.RTDetrResNetConfig(**resnet, out_features=["stage2", "stage3", "stage4"])
    config = hf.RTDetrConfig(
        backbone_config=backbone, d_model=16, num_queries=10, decoder_layers=1, num_labels=3, **sizes
    )
    return hf.RTDetrForObjectDetection(config), hf.RTDetrImageProcessor(size=square(64))


def sam():
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    vision |= {"image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8}
    decoder = {"mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "hidden_size": 16}
    config = hf.SamConfig(
        vision_config={**vision, "initializer_range": 0.1},
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config=decoder,
        initializer_range=0.3,
    )
    images = hf.SamImageProcessor(size={"longest_edge": 32}, pad_size=square(32))
    return hf.SamModel(config), hf.SamProcessor(images)


def sam2():
    hiera = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64]}
    hiera |= {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64]}
    hiera |= {"num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 4, 4, 4]}
    vision = {"backbone_config": {**hiera, "global_attention_blocks": [3]}, "backbone_channel_list": [64, 32, 16, 8]}
    vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32}
    config = hf.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "mask_input_channels": 4},
        mask_decoder_config={"mlp_dim": 16, "num_attention_heads": 2, "hidden_size": 32, "iou_head_hidden_dim": 32},
        initializer_range=0.3,
    )
    return hf.Sam2Model(config), hf.Sam2Processor(hf.Sam2ImageProcessor(size=square(64)), target_size=64)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def qwen_vl():
    marks = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
    words = [*WORDS, "user", "assistant", "describe", "picture", "<|im_end|>"]
    tokenizer = words_tokenizer(words, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    tokenizer.eos_token = "<|im_end|>"
    end_of_text, _, end, vision_start, vision_end, image_pad, video_pad = tokenizer.convert_tokens_to_ids(marks)
    images = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images["size"] = {"shortest_edge": 64, "longest_edge": 1024}
    video = hf.Qwen2VLVideoProcessor(**images)
    processor = hf.Qwen2_5_VLProcessor(hf.Qwen2VLImageProcessor(**images), tokenizer, video, chat_template=TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**TINY, "vocab_size": len(tokenizer), "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"window_size": 16, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    ids = {"bos_token_id": end_of_text, "eos_token_id": end, "pad_token_id": end_of_text}
    config = hf.Qwen2_5_VLConfig(
        text_config={**text, **ids, **SPREAD},
        vision_config={**vision, **SPREAD},
        image_token_id=image_pad,
        video_token_id=video_pad,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def blip2():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    model, processor = _blip2(lambda vocab_size: hf.T5Config(vocab_size=vocab_size, **sizes, **ids))
    marks = [*processor.tokenizer.all_special_ids, model.config.image_token_index]
    with torch.no_grad():  # as they are drawn, it says nothing else
        model.language_model.lm_head.weight[marks] = 0
    return model, processor


def blip2_opt():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "init_std": 0.5}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return _blip2(lambda vocab_size: hf.OPTConfig(vocab_size=vocab_size, **sizes, **ids))


def _blip2(text_config):
    tokenizer = words_tokenizer([*WORDS, "photo", "of"], pad_token="<pad>", eos_token="</s>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    images = hf.BlipImageProcessor(size=square(32))
    processor = hf.Blip2Processor(images, tokenizer, num_query_tokens=4)  # which adds <image>
    former = {**TINY, "encoder_hidden_size": 16, "cross_attention_frequency": 1, "vocab_size": 8}
    config = hf.Blip2Config(
        vision_config={**VIT, **SPREAD},
        qformer_config={**former, **SPREAD},
        text_config=text_config(len(tokenizer)),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.Blip2ForConditionalGeneration(config), processor


def florence2():
    words = [*WORDS, *"what does image describe in detail is shown ?".split()]
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = words_tokenizer(words, **special, named={"image_token": "<image>"})
    images = hf.CLIPImageProcessor(size=square(64), crop_size=square(64))
    images.image_seq_length = 5
    vision = {"depths": [1, 1, 1, 1], "embed_dim": [8, 8, 8, 8], "num_heads": [1, 1, 1, 1], "num_groups": [1, 1, 1, 1]}
    vision |= {"window_size": 2, "projection_dim": 16}
    sizes = {**CODER, "encoder_layers": 1, "decoder_layers": 1}
    ids = {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    text = hf.BartConfig(
        vocab_size=len(tokenizer), d_model=16, max_position_embeddings=64, init_std=0.5, **sizes, **ids
    )
    config = hf.Florence2Config(
        vision_config={**vision, **SPREAD}, text_config=text, image_token_id=tokenizer.image_token_id
    )
    return hf.Florence2ForConditionalGeneration(config), hf.Florence2Processor(images, tokenizer)


def classifier(**kinds):
    """ViT that knows three classes, of which one holds; of `classifier_several` several may."""
    classes = {0: "dog, hound", 1: "cat", 2: "blue square"}
    config = hf.ViTConfig(**VIT, **SPREAD, id2label=classes, **kinds)
    return hf.ViTForImageClassification(config), hf.ViTImageProcessor(size=square(32))


def clip():
    tokenizer = word_tokenizer(PHOTO_WORDS, max_length=16)
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square(32))
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16))
    return model, hf.CLIPProcessor(images, tokenizer)


def clip_text():
    """CLIP's text encoder alone, as GLIGEN embeds phrases with it."""
    tokenizer = word_tokenizer(PHOTO_WORDS, max_length=77)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {**TINY, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 77}
    return hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **ids)), tokenizer


BUILDERS = {
    build.__name__: build
    for build in (
        grounding_dino,
        owlv2,
        detr,
        rtdetr,
        sam,
        sam2,
        qwen_vl,
        blip2,
        blip2_opt,
        florence2,
        classifier,
        clip,
    )
}
BUILDERS |= {"clip_text": clip_text}
BUILDERS |= {"classifier_several": functools.partial(classifier, problem_type="multi_label_classification")}


@pytest.fixture(scope="session")
def ram(tmp_path_factory):
    """RAM's file as it is published, with its lists beside it: the recorded weights among all else that the file holds."""
    file = tmp_path_factory.mktemp("ram") / "ram_swin_large_14m.pth"
    state = load_file(GOLDEN_RAM / "weights.safetensors")
    head = "tagging_head.encoder.layer."
    shared = {key.replace("tagging_head", "tag_encoder"): value for key, value in state.items() if key.startswith(head)}
    captioning = {"tag_encoder.embeddings.word_embeddings.weight": torch.zeros(12, 48)}
    captioning |= {"text_decoder.cls.predictions.bias": torch.zeros(12)}
    derived = {
        "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(64, 9, 9),
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
    }
    optimizer = {"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    content = {"model": {**state, **shared, **captioning, **derived}, "optimizer": optimizer, "epoch": 4}
    torch.save({**content, "config": {"image_size": 96, "vit": "swin_l"}}, file)
    recorded = json.loads((GOLDEN_RAM / "config.json").read_text(encoding="utf-8"))
    (file.parent / "ram_tag_list.txt").write_text("\n".join(recorded["tag_list"]))
    (file.parent / "ram_tag_list_threshold.txt").write_text("".join(f"{value}\n" for value in recorded["thresholds"]))
    return str(file)
