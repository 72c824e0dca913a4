"""Tiny models with random weights, of transformers' own classes, saved as they are published."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BertConfig,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    OPTConfig,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    SwinConfig,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from models.text import word_tokenizer

GOLDEN_RAM = Path(__file__).parents[1] / "golden" / "ram"
WORDS = "a an the red green blue circle square dog hot cat striped plain on sits ##s".split()


@pytest.fixture
def pictures():
    """Four pictures of two sizes."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 3), np.uint8) for size in ((48, 64), (40, 56), (48, 64), (40, 56))]


@pytest.fixture(scope="session")
def grounding_dino(tmp_path_factory):
    """A folder with GroundingDINO: texts of 16 tokens, 12 boxes, pictures of 32 px."""
    folder = tmp_path_factory.mktemp("grounding_dino")
    # its model knows BERT's ids of [CLS], [SEP], the full stop and the question mark
    vocabulary = [f"[unused{number}]" for number in range(1030)]
    vocabulary[0], vocabulary[100], vocabulary[101], vocabulary[102], vocabulary[103] = (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    )
    vocabulary[1010], vocabulary[1012], vocabulary[1029] = ",", ".", "?"
    vocabulary += WORDS
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GroundingDinoConfig(
            backbone_config=SwinConfig(
                image_size=32, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4, out_indices=[1, 2, 3]
            ),
            text_config=BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            ),
            d_model=32,
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_layers=2,
            decoder_ffn_dim=16,
            decoder_attention_heads=2,
            num_queries=12,
            max_text_len=16,
            num_feature_levels=3,
        )
        model = GroundingDinoForObjectDetection(config)
    model.save_pretrained(folder)
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def seeded(build, *arguments):
    """A model with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*arguments)


def words_tokenizer(words, *, named=None, **special):
    """A tokenizer with a token for each word, of transformers' general class; `special` names some of them."""
    vocabulary = {word: place for place, word in enumerate([*special.values(), "[UNK]", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    more = {} if named is None else {"extra_special_tokens": named}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special, **more)


@pytest.fixture(scope="session")
def owlv2(tmp_path_factory):
    """A folder with OWLv2: queries of 8 tokens, 16 boxes."""
    folder = tmp_path_factory.mktemp("owlv2")
    tokenizer = word_tokenizer([*WORDS[:-1], "photo", "of"], max_length=8)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**shared, "vocab_size": len(tokenizer), "max_position_embeddings": 8},
        vision_config={**shared, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = seeded(Owlv2ForObjectDetection, config)
    with torch.no_grad():  # as they are drawn, its boxes have no area
        for parameter in model.box_head.parameters():
            parameter.mul_(0.05)
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def segmenter_of(tmp_path_factory):
    """segmenter_of(name): a folder with SAM or SAM 2."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        decoder = {"mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
        if name == "sam":
            config = SamConfig(
                vision_config={
                    "hidden_size": 16,
                    "output_channels": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 32,
                    "patch_size": 8,
                    "window_size": 2,
                    "global_attn_indexes": [0],
                    "num_pos_feats": 8,
                    "mlp_dim": 16,
                    "initializer_range": 0.1,
                },
                prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
                mask_decoder_config={**decoder, "hidden_size": 16},
                initializer_range=0.3,
            )
            side = {"height": 32, "width": 32}
            processor = SamProcessor(SamImageProcessor(size={"longest_edge": 32}, pad_size=side))
            model = seeded(SamModel, config)
        else:
            config = Sam2Config(
                vision_config={
                    "backbone_config": {
                        "model_type": "sam2_hiera_det_model",
                        "hidden_size": 8,
                        "image_size": [64, 64],
                        "blocks_per_stage": [1, 1, 2, 1],
                        "embed_dim_per_stage": [8, 16, 32, 64],
                        "num_attention_heads_per_stage": [1, 1, 2, 2],
                        "window_size_per_stage": [4, 4, 4, 4],
                        "global_attention_blocks": [3],
                    },
                    "backbone_channel_list": [64, 32, 16, 8],
                    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                    "fpn_hidden_size": 32,
                },
                prompt_encoder_config={"hidden_size": 32, "image_size": 64, "mask_input_channels": 4},
                mask_decoder_config={**decoder, "hidden_size": 32, "iou_head_hidden_dim": 32},
                initializer_range=0.3,
            )
            processor = Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64}), target_size=64)
            model = seeded(Sam2Model, config)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def describer_of(tmp_path_factory):
    """describer_of(name): a folder with qwen_vl, blip2 (with T5 or with opt) or florence2."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        build = {"qwen_vl": qwen_vl, "blip2": blip2_t5, "blip2_opt": blip2_opt, "florence2": florence2}[name]
        model, processor = build()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return make


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def qwen_vl():
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    marks += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = words_tokenizer(
        [*WORDS, "user", "assistant", "describe", "picture", "<|im_end|>"], pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    tokenizer.eos_token = "<|im_end|>"
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    images = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 64, "longest_edge": 1024}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size, **images),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, **images),
        chat_template=TEMPLATE,
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "initializer_range": 0.5,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
            "initializer_range": 0.5,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return seeded(Qwen2_5_VLForConditionalGeneration, config), processor


def blip2_t5():
    model, processor = _blip2(
        lambda size: T5Config(
            vocab_size=size,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )
    marks = [*processor.tokenizer.all_special_ids, model.config.image_token_index]
    with torch.no_grad():  # as they are drawn, it says nothing else
        model.language_model.lm_head.weight[marks] = 0
    return model, processor


def blip2_opt():
    return _blip2(
        lambda size: OPTConfig(
            vocab_size=size,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            init_std=0.5,
        )
    )


def _blip2(text_config):
    tokenizer = words_tokenizer([*WORDS, "photo", "of"], pad_token="<pad>", eos_token="</s>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4
    )  # which adds <image>
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**shared, "image_size": 32, "patch_size": 8, "initializer_range": 0.5},
        qformer_config={
            **shared,
            "encoder_hidden_size": 16,
            "cross_attention_frequency": 1,
            "vocab_size": 8,
            "initializer_range": 0.5,
        },
        text_config=text_config(len(tokenizer)),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return seeded(Blip2ForConditionalGeneration, config), processor


def florence2():
    tokenizer = words_tokenizer(
        [*WORDS, "what", "does", "image", "describe", "in", "detail", "is", "shown", "?"],
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        named={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64})
    images.image_seq_length = 5
    config = Florence2Config(
        vision_config={
            "depths": [1, 1, 1, 1],
            "embed_dim": [8, 8, 8, 8],
            "num_heads": [1, 1, 1, 1],
            "num_groups": [1, 1, 1, 1],
            "window_size": 2,
            "projection_dim": 16,
            "initializer_range": 0.5,
        },
        text_config=BartConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=64,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
            init_std=0.5,
        ),
        image_token_id=tokenizer.image_token_id,
    )
    return seeded(Florence2ForConditionalGeneration, config), Florence2Processor(images, tokenizer)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """classifier(several): a folder with ViT that knows three classes, of which one or several hold."""

    @functools.cache
    def make(several):
        folder = tmp_path_factory.mktemp("classifier")
        kinds = {"problem_type": "multi_label_classification"} if several else {}
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=8,
            initializer_range=0.5,
            id2label={0: "dog, hound", 1: "cat", 2: "blue square"},
            **kinds,
        )
        seeded(ViTForImageClassification, config).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder with CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = word_tokenizer([*WORDS[:-1], "photo", "of"], max_length=16)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**shared, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    seeded(CLIPModel, config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


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
