"""Text-to-image with boxes: a GLIGEN pipeline for Stable Diffusion and SDXL, with one layout for each picture of a batch.

This file is self-contained (torch and diffusers alone): it lies beside `model_index.json` in a folder of weights, and
`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` finds it there. The UNet is diffusers' own with
`attention_type="gated"`. One class serves both families: with a second text encoder the model is an SDXL.

Legend: B pictures, T prompt tokens, C their width, P width of the pooled prompt, S slots for boxes, (h, w) latent cells.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)


class BoxesPipeline(DiffusionPipeline):
    """Pictures of a prompt whose phrases are drawn in their boxes.

    Args:
        vae: the autoencoder.
        text_encoder: CLIP text encoder.
        tokenizer: its tokenizer.
        unet: the denoiser, with `attention_type="gated"`.
        scheduler: any diffusers scheduler.
        text_encoder_2: SDXL's second text encoder, with a projection; None for SD.
        tokenizer_2: its tokenizer.
        gligen_slots: tokens that a layout is padded to. The empty ones take part in the attention, so that the number
            belongs to the weights.
        force_zeros_for_empty_prompt: SDXL: without a negative prompt the unguided half gets zeros, as SDXL was published.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2"]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        gligen_slots: int = 30,
        force_zeros_for_empty_prompt: bool = True,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(gligen_slots=gligen_slots, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        gligen_phrases: Sequence[str] | Sequence[Sequence[str]] | None = None,
        gligen_boxes: Sequence[Any] | None = None,
        gligen_scheduled_sampling_beta: float = 0.3,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draws B pictures.

        Args:
            prompt: a string, or B of them.
            gligen_phrases: what is in each box: a list of strings for all pictures, or B such lists.
            gligen_boxes: for each phrase (x0, y0, x1, y1) in [0, 1] from the top left corner, nested as the phrases are.
            gligen_scheduled_sampling_beta: share of the steps, from the noisy end, that see the boxes.
            negative_prompt: prompt of the unguided half: a string, or B of them.
            guidance_scale: classifier-free guidance, none up to 1; by default 7.5 (SD) or 5 (SDXL).
            num_inference_steps: denoising steps.
            height: px; by default what the UNet was made for.
            width: px, likewise.
            generator: draws the start latents: one generator, or B of them.
            latents: (B, 4, h, w) standard normal start latents in place of drawn ones.
            output_type: "pil", "np", "pt", or "latent".
            return_dict: give the pictures in a record, not in a tuple.

        Returns:
            The pictures as `images`.

        Raises:
            ValueError: arguments that do not fit together; the argument is named.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        layouts = self._layouts(gligen_phrases, gligen_boxes, len(prompts))
        if not 0 <= gligen_scheduled_sampling_beta <= 1:
            raise ValueError(
                f"gligen_scheduled_sampling_beta: {gligen_scheduled_sampling_beta} is outside [0, 1]; give a share of the steps"
            )
        if guidance_scale is None:
            guidance_scale = 7.5 if self.text_encoder_2 is None else 5.0
        guided, device = guidance_scale > 1, self._execution_device
        side = int(self.unet.config.sample_size) * self.vae_scale_factor
        height, width = int(height or side), int(width or side)
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(
                f"height, width: {height} x {width} are no multiples of {self.vae_scale_factor}; round them"
            )

        conditions = self._conditions(prompts, negative_prompt, guided, (height, width))
        grounding = {"cross_attention_kwargs": {"gligen": self._grounding(layouts, guided)}}
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        grounded = int(gligen_scheduled_sampling_beta * len(timesteps))
        state = self._start(latents, len(prompts), height, width, generator)
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepted else {}
        steps: Any = cast(Any, self).progress_bar(timesteps)
        for place, time in enumerate(steps):
            twice = torch.cat([state] * 2) if guided else state
            prediction = self.unet(
                self.scheduler.scale_model_input(twice, time),
                time,
                return_dict=False,
                **conditions,
                **(grounding if place < grounded else {}),  # without the argument the UNet is the bare one
            )[0]
            if guided:
                without, within = prediction.chunk(2)
                prediction = without + guidance_scale * (within - without)
            state = self.scheduler.step(prediction, time, state, return_dict=False, **extra)[0]

        images: Any = state if output_type == "latent" else self._decode(state, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _layouts(self, phrases: Any, boxes: Any, count: int) -> list[tuple[Any, Any]]:
        """B pairs of phrases and boxes."""
        phrases, boxes = list(phrases or []), list(boxes or [])
        if not phrases or isinstance(phrases[0], str):
            phrases, boxes = [phrases] * count, [boxes] * count
        if len(phrases) != count or len(boxes) != count:
            raise ValueError(
                f"gligen_phrases, gligen_boxes: {len(phrases)} and {len(boxes)} layouts for {count} prompts; give one for each "
                "prompt, or a flat list for all"
            )
        for place, (named, placed) in enumerate(zip(phrases, boxes, strict=True)):
            if len(named) != len(placed):
                raise ValueError(
                    f"gligen_boxes: picture {place} has {len(placed)} boxes for {len(named)} phrases; give one for each"
                )
            if len(named) > self.config["gligen_slots"]:
                raise ValueError(
                    f"gligen_boxes: picture {place} has {len(placed)} boxes for {self.config['gligen_slots']} slots; give fewer"
                )
            for box in placed:
                if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                    raise ValueError(
                        f"gligen_boxes: picture {place} has {list(box)}; give x0 < x1 and y0 < y1 in [0, 1], from the top left"
                    )
        return list(zip(phrases, boxes, strict=True))

    def _read(self, tokenizer: Any, encoder: Any, strings: list[str], padding: bool | str) -> tuple[Any, ...]:
        """Last and last but one hidden states (M, T, C), pooled (M, C) and projected vectors (M, P), where there is one."""
        longest = max(len(row) for row in tokenizer(strings, truncation=False, verbose=False).input_ids)
        if longest > tokenizer.model_max_length:
            logger.warning("a text is longer than %d tokens and was cut", tokenizer.model_max_length)
        tokens = tokenizer(
            strings, padding=padding, max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids.to(self._execution_device)
        found = encoder(tokens, output_hidden_states=True)
        ends = (tokens == tokenizer.eos_token_id).int().argmax(dim=-1)
        pooled = found.last_hidden_state[torch.arange(len(strings), device=tokens.device), ends]
        projection = getattr(encoder, "text_projection", None)
        projected = None if projection is None else projection(pooled)
        return found.last_hidden_state, found.hidden_states[-2], pooled, projected

    def _captions(self, captions: list[str]) -> tuple[Any, Any]:
        """Prompt tokens (B, T, C) and the pooled prompt (B, P), None for SD."""
        last, penultimate, _, _ = self._read(self.tokenizer, self.text_encoder, captions, "max_length")
        if self.text_encoder_2 is None:
            return last, None
        _, second, _, projected = self._read(self.tokenizer_2, self.text_encoder_2, captions, "max_length")
        return torch.cat([penultimate, second], dim=-1), projected

    def _phrases(self, phrases: list[str]) -> torch.Tensor:
        """A vector (M, C) for each phrase: the pooled output, in SDXL with the second encoder's projected one beside it."""
        _, _, pooled, _ = self._read(self.tokenizer, self.text_encoder, phrases, True)
        if self.text_encoder_2 is None:
            return pooled
        _, _, _, projected = self._read(self.tokenizer_2, self.text_encoder_2, phrases, True)
        return torch.cat([pooled, projected], dim=-1)

    def _conditions(
        self, prompts: list[str], negative: str | Sequence[str] | None, guided: bool, size: tuple[int, int]
    ) -> dict[str, Any]:
        """What the UNet takes beside latents and time; with guidance the unguided half comes first."""
        tokens, pooled = self._captions(prompts)
        if guided:
            captions = [negative or ""] * len(prompts) if isinstance(negative, str | None) else list(negative)
            if len(captions) != len(prompts):
                raise ValueError(
                    f"negative_prompt: {len(captions)} for {len(prompts)} prompts; give one for all, or one for each"
                )
            other, other_pooled = self._captions(captions)
            if negative is None and pooled is not None and self.config["force_zeros_for_empty_prompt"]:
                other, other_pooled = torch.zeros_like(other), torch.zeros_like(other_pooled)
            tokens = torch.cat([other, tokens])
            pooled = None if pooled is None else torch.cat([other_pooled, pooled])
        dtype = self.unet.dtype
        conditions = {"encoder_hidden_states": tokens.to(dtype)}
        if pooled is not None:
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=tokens.device)
            ids = ids.expand(len(tokens), -1)  # original size, crop corner, target size; not in half precision
            conditions["added_cond_kwargs"] = {"text_embeds": pooled.to(dtype), "time_ids": ids}
        return conditions

    def _grounding(self, layouts: list[tuple[Any, Any]], guided: bool) -> dict[str, torch.Tensor]:
        """Boxes (B, S, 4), phrase vectors (B, S, C) and masks (B, S) for the UNet; the unguided half is masked out."""
        count, slots = len(layouts), self.config["gligen_slots"]
        device, dtype = self._execution_device, self.unet.dtype
        boxes = torch.zeros(count, slots, 4, device=device, dtype=dtype)
        vectors = torch.zeros(count, slots, self.unet.config.cross_attention_dim, device=device, dtype=dtype)
        masks = torch.zeros(count, slots, device=device, dtype=dtype)
        for place, (phrases, placed) in enumerate(layouts):
            if phrases:
                boxes[place, : len(phrases)] = torch.tensor(placed, dtype=dtype, device=device)
                vectors[place, : len(phrases)] = self._phrases(list(phrases)).to(dtype)
                masks[place, : len(phrases)] = 1
        if guided:
            boxes, vectors = torch.cat([boxes] * 2), torch.cat([vectors] * 2)
            masks = torch.cat([torch.zeros_like(masks), masks])
        return {"boxes": boxes, "positive_embeddings": vectors, "masks": masks}

    def _start(self, latents: torch.Tensor | None, count: int, height: int, width: int, generator: Any) -> torch.Tensor:
        """Latents (B, 4, h, w) at the scheduler's first noise level."""
        shape = (
            count,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: {tuple(latents.shape)} for {shape}; give them in this shape, or leave them out")
        return latents.to(self._execution_device, self.unet.dtype) * self.scheduler.init_noise_sigma

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Pictures of latents; SDXL's autoencoder overflows in half precision, so it decodes in single."""
        config, dtype = self.vae.config, self.vae.dtype
        upcast = dtype == torch.float16 and getattr(config, "force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        latents = latents.to(self.vae.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        images = self.vae.decode(latents, return_dict=False)[0]
        if upcast:
            self.vae.to(dtype)
        return self.image_processor.postprocess(images, output_type=output_type)
