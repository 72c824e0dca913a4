"""Tiny detectors and segmenters with random weights, of transformers' own classes, saved as they are published."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SwinConfig,
)

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
    vocabulary[1012], vocabulary[1029] = ".", "?"
    vocabulary += WORDS
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GroundingDinoConfig(
            backbone_config=SwinConfig(
                image_size=32,
                embed_dim=8,
                depths=[1, 1, 1],
                num_heads=[1, 2, 2],
                window_size=4,
                out_indices=[1, 2, 3],
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
