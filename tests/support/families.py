"""What the contract suite needs to know of each model: how to write a random repository, and its reference pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import PreTrainedTokenizerFast

from stepwell.models import hunyuan_video, wan
from stepwell.models.flux import DEV, SCHNELL
from stepwell.models.spec import ModelSpec
from stepwell.stages.latents import Latents
from stepwell.types import Request
from tests.support.repositories import flux_repository, hunyuan_repository, wan_repository


@dataclass(frozen=True)
class Reference:
    """What the reference pipeline makes of a request: final latents (tokens, channels), pixels (h, w, 3), of a
    video (frames, h, w, 3), uint8."""

    latents: torch.Tensor
    pixels: np.ndarray


@dataclass(frozen=True)
class Family:
    """A spec, and its counterpart in diffusers.

    write(path, changes) saves a random repository of the spec's tiny config with `changes`;
    reference(path, request) runs the pipeline; checkpoint_keys(config) lists the denoiser's tensors;
    odd_configs are changes the parity test tries; wide is a change that makes layers of 1,000 inputs and more;
    sizes are (width, height) pairs all requests of the suite use.
    """

    spec: ModelSpec
    write: Callable[[Path, dict[str, Any]], Path]
    reference: Callable[[Path, Request], Reference]
    checkpoint_keys: Callable[[dict[str, Any]], set[str]]
    odd_configs: tuple[dict[str, Any], ...] = ({},)
    wide: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (48, 32), (32, 64))


def _flux_reference(path: Path, request: Request) -> Reference:
    s, image = request.sampling, request.image
    start: dict[str, Any] = {}
    if image is not None:
        start = {"image": Image.frombytes("RGB", (image.width, image.height), image.data), "strength": s.strength}
    pipe = (FluxPipeline if image is None else FluxImg2ImgPipeline).from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)

    def run(output_type: str) -> Any:
        return pipe(
            request.prompt,
            negative_prompt=s.negative_prompt,
            true_cfg_scale=1.0 if s.true_cfg_scale is None else s.true_cfg_scale,
            width=s.width,
            height=s.height,
            num_inference_steps=s.num_inference_steps,
            guidance_scale=0.0 if s.guidance_scale is None else s.guidance_scale,
            max_sequence_length=s.max_sequence_length,
            generator=torch.Generator().manual_seed(s.seed),
            output_type=output_type,
            **start,
        ).images[0]

    return Reference(run("latent"), np.asarray(run("pil")))


def _flux(spec: ModelSpec) -> Family:
    return Family(
        spec=spec,
        write=lambda path, changes: flux_repository(
            path, {**spec.tiny, **changes}, schedule={"use_dynamic_shifting": spec is DEV, "shift": 3.0 if spec is DEV else 1.0}
        ),
        reference=_flux_reference,
        checkpoint_keys=lambda config: set(FluxTransformer2DModel(**config).state_dict()),
        odd_configs=(
            {},
            {
                "num_layers": 1,
                "num_single_layers": 3,
                "num_attention_heads": 3,
                "attention_head_dim": 8,
                "axes_dims_rope": [2, 4, 2],
            },
            {"num_layers": 3, "num_single_layers": 1, "in_channels": 32, "joint_attention_dim": 20, "pooled_projection_dim": 16},
        ),
        wide={"num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]},
    )


def _wan_reference(path: Path, request: Request) -> Reference:
    s, image = request.sampling, request.image
    cls = WanPipeline if image is None else WanImageToVideoPipeline
    pipe = cls.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    extra: dict[str, Any] = {}
    if image is not None:
        extra["image"] = Image.frombytes("RGB", (image.width, image.height), image.data)
    if s.guidance_scale_2 is not None:
        extra["guidance_scale_2"] = s.guidance_scale_2

    def run(output_type: str) -> Any:
        return pipe(
            prompt=request.prompt,
            negative_prompt=s.negative_prompt,
            width=s.width,
            height=s.height,
            num_frames=s.num_frames or 5,
            num_inference_steps=s.num_inference_steps,
            guidance_scale=5.0 if s.guidance_scale is None else s.guidance_scale,
            max_sequence_length=s.max_sequence_length or 512,
            generator=torch.Generator().manual_seed(s.seed),
            output_type=output_type,
            **extra,
        ).frames[0]

    latents, patch = run("latent"), pipe.transformer.config.patch_size
    packed = Latents(len(latents), 1, 1.0, 0.0, patch=tuple(patch)).pack(latents)
    return Reference(packed, (run("np") * 255).round().astype(np.uint8))


def _wan(spec: ModelSpec, *odd: dict[str, Any], vae: dict[str, Any] | None = None, index: dict[str, Any] | None = None) -> Family:
    return Family(
        spec=spec,
        write=lambda path, changes: wan_repository(
            path, {**spec.tiny, **changes}, pipeline=spec.pipeline_class, vae_changes=vae, **(index or {})
        ),
        reference=_wan_reference,
        checkpoint_keys=lambda config: set(WanTransformer3DModel(**config).state_dict()),
        odd_configs=({}, *odd),
        wide={"num_attention_heads": 4, "attention_head_dim": 64},
    )


def _hunyuan_reference(path: Path, request: Request, shift: float | None) -> Reference:
    s, image = request.sampling, request.image
    # transformers 5 would load a Llama 3's tokenizer as if it were of SentencePiece's kind
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path / "tokenizer")
    cls = HunyuanVideoPipeline if image is None else HunyuanVideoImageToVideoPipeline
    pipe = cls.from_pretrained(path, tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    if shift is not None:
        pipe.scheduler.set_shift(shift)
    extra: dict[str, Any] = {}
    unseen, last = 0, torch.empty(0)
    if image is not None:
        extra["image"] = Image.frombytes("RGB", (image.width, image.height), image.data)
        unseen = 4 if pipe.transformer.config.image_condition_type == "latent_concat" else 0

    def note(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        last = tensors["latents"][0]  # all of them: the pipeline hands out fewer where some are never seen
        return tensors

    def run(output_type: str) -> Any:
        return pipe(
            prompt=request.prompt,
            negative_prompt=s.negative_prompt,
            true_cfg_scale=1.0 if s.true_cfg_scale is None else s.true_cfg_scale,
            width=s.width,
            height=s.height,
            num_frames=(s.num_frames or 5) + unseen,
            num_inference_steps=s.num_inference_steps,
            guidance_scale=6.0 if s.guidance_scale is None else s.guidance_scale,
            max_sequence_length=s.max_sequence_length or 256,
            generator=torch.Generator().manual_seed(s.seed),
            output_type=output_type,
            callback_on_step_end=note,
            **extra,
        ).frames[0]

    pixels, patch = (run("np") * 255).round().astype(np.uint8), pipe.transformer.config.patch_size
    return Reference(Latents(len(last), 1, 1.0, 0.0, patch=(1, patch, patch)).pack(last), pixels)


def _hunyuan(spec: ModelSpec, *odd: dict[str, Any], folder: str = "hunyuan", shift: float | None = None) -> Family:
    return Family(
        spec=spec,
        write=lambda path, changes: hunyuan_repository(path / folder, {**spec.tiny, **changes}),
        reference=lambda path, request: _hunyuan_reference(path, request, shift),
        checkpoint_keys=lambda config: set(HunyuanVideoTransformer3DModel(**config).state_dict()),
        odd_configs=({}, *odd),
        wide={"num_attention_heads": 4, "attention_head_dim": 64, "rope_axes_dim": [16, 24, 24]},
    )


# the 5B's autoencoder: residual, of patches, with a decoder of its own width; here of one level less
_PATCHED = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "dim_mult": [1, 1, 1],
    "temperal_downsample": [True, True],
    "decoder_base_dim": 8,
}
_DEEPER = {"num_layers": 4, "num_attention_heads": 3, "attention_head_dim": 16, "ffn_dim": 40, "text_dim": 24}
_PLAIN = {"cross_attn_norm": False, "num_layers": 1, "freq_dim": 16, "patch_size": (1, 1, 2)}
_OTHER = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "rope_axes_dim": [4, 6, 6],
    "mlp_ratio": 2.5,
    "num_layers": 1,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "patch_size": 1,
    "rope_theta": 100.0,
}
# inherit all of the suite; between them they have one denoiser and two, one modulation per sequence and two, a picture or none
FAMILIES = [_flux(DEV), _flux(SCHNELL), _wan(wan.TI2V_5B, vae=_PATCHED, index={"expand_timesteps": True})]
# the rest of them are held to their reference only
VARIANTS = [
    _wan(wan.T2V_1B, _DEEPER, _PLAIN),
    _wan(wan.I2V_14B, {"num_attention_heads": 3, "added_kv_proj_dim": 36, "num_layers": 1}),
    _wan(wan.T2V_A14B, _DEEPER, index={"boundary_ratio": 0.875}),
    _wan(wan.I2V_A14B, index={"boundary_ratio": 0.9}),
    _hunyuan(hunyuan_video.T2V, _OTHER),
    _hunyuan(hunyuan_video.FAST, folder="FastHunyuan-diffusers", shift=17.0),
    _hunyuan(hunyuan_video.UNDISTILLED, {"num_single_layers": 0, "text_embed_dim": 24, "num_refiner_layers": 0}),
    _hunyuan(hunyuan_video.I2V, _OTHER),
    _hunyuan(hunyuan_video.I2V_UNDISTILLED, {"num_single_layers": 0, "text_embed_dim": 24}),
    _hunyuan(hunyuan_video.I2V_33, _OTHER),
    _hunyuan(hunyuan_video.I2V_33_DISTILLED, {"num_layers": 0, "in_channels": 13, "out_channels": 6}),
]
