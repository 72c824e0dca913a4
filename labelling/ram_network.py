"""The Recognize Anything Model as a network: Swin sees the image, and every tag asks what was seen whether it is there.

Both halves are made of transformers' own layers. Reading the published weights is in ``ram_weights.py``; images, lists of tags
and thresholds are in ``ram.py``.

Legend: B images, S side of an image in px, L tokens of an image, C width of Swin's last stage, K tags, E width of what tags and
image are compared in, D width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, SwinConfig, SwinModel
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput

DECODER_HEADS = 4  # of the published decoder; no shape in its weights tells them


@dataclass(frozen=True, kw_only=True)
class RamSizes:
    """Sizes of a model; the published one has those in brackets.

    Attributes:
        tags: K [4585].
        embed_width: E [512].
        patch_size: Side of Swin's patches, px [4].
        swin_width: Width of Swin's first stage [192].
        depths: Blocks of each of its stages [2, 2, 18, 2].
        heads: Attention heads of each of its stages [6, 12, 24, 48].
        window_size: Side of its windows in tokens [12].
        mlp_ratio: Width of its feed-forward layers in that of their stage [4].
        decoder_width: D [768].
        decoder_hidden: Width of the decoder's feed-forward layers [3072].
        decoder_layers: Layers of the decoder [2].
    """

    tags: int
    embed_width: int
    patch_size: int
    swin_width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window_size: int
    mlp_ratio: float
    decoder_width: int
    decoder_hidden: int
    decoder_layers: int

    @property
    def image_size(self) -> int:
        """S [384]: the side at which the last stage is one window, the only one that the published code takes the weights at."""
        return self.patch_size * self.window_size * 2 ** (len(self.depths) - 1)


class RamNetwork(nn.Module):
    """Logits of tags for images.

    Args:
        sizes: Sizes of the model.

    Source:
        Zhang et al. 2023, Recognize Anything: A Strong Image Tagging Model; its decoder is Liu et al. 2021, Query2Label.
    """

    def __init__(self, sizes: RamSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = SwinModel(
            SwinConfig(
                image_size=sizes.image_size,
                patch_size=sizes.patch_size,
                embed_dim=sizes.swin_width,
                depths=sizes.depths,
                num_heads=sizes.heads,
                window_size=sizes.window_size,
                mlp_ratio=sizes.mlp_ratio,
            ),
            add_pooling_layer=False,
        )
        self.image_proj = nn.Linear(self.encoder.num_features, sizes.embed_width)
        self.label_embed = nn.Parameter(torch.zeros(sizes.tags, sizes.embed_width))
        self.wordvec_proj = nn.Linear(sizes.embed_width, sizes.decoder_width)
        config = BertConfig(
            hidden_size=sizes.decoder_width,
            intermediate_size=sizes.decoder_hidden,
            num_attention_heads=DECODER_HEADS,
            attn_implementation="sdpa",
        )
        self.decoder = nn.ModuleList(_TagLayer(config, sizes.embed_width) for _ in range(sizes.decoder_layers))
        self.fc = nn.Linear(sizes.decoder_width, 1)

    def image_tokens(self, images: Tensor) -> Tensor:
        """Encode images by Swin: the mean of its tokens, then the tokens.

        Args:
            images: (B, 3, S, S), normalised.

        Returns:
            (B, 1 + L, C).
        """
        tokens = self.encoder(images).last_hidden_state
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the tags for images (B, 3, S, S), normalised; no tag's depends on another's."""
        tokens = self.image_proj(self.image_tokens(images))
        queries = self.wordvec_proj(self.label_embed).relu().expand(len(images), -1, -1)
        for layer in self.decoder:
            queries = layer(queries, tokens)
        return self.fc(queries)[..., 0]


class _TagLayer(nn.Module):
    """A decoder layer without self-attention: cross-attention and feed-forward of BERT.

    Args:
        config: Of BERT.
        token_width: E, the width of what keys and values are made of, which BERT's own config has no word for.
    """

    def __init__(self, config: BertConfig, token_width: int) -> None:
        super().__init__()
        self.crossattention = BertAttention(config, is_cross_attention=True)
        self.crossattention.self.key = nn.Linear(token_width, config.hidden_size)
        self.crossattention.self.value = nn.Linear(token_width, config.hidden_size)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries (B, K, D) that have looked at tokens (B, 1 + L, E)."""
        attended, _ = self.crossattention(queries, encoder_hidden_states=tokens)
        return self.output(self.intermediate(attended), attended)
