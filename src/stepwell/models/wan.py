"""Wan 2.1 and 2.2, FastWan: checkpoints, pipelines and the family's members.

Reference: diffusers `WanPipeline` and `WanImageToVideoPipeline`. The transformer is in `models.wan_transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from stepwell.guidance import NO_CFG, PLAIN_CFG
from stepwell.models.spec import CLIP_PROCESSORS, KeyMap, Matches, ModelSpec, Part
from stepwell.models.wan_transformer import Wan, WanConfig
from stepwell.samplers.base import Sampler
from stepwell.samplers.dmd import Dmd
from stepwell.samplers.flow import FlowMatchEuler
from stepwell.samplers.unipc import UniPC
from stepwell.stages.base import Stage, StageSettings
from stepwell.stages.denoise import Denoise, DenoiseLate
from stepwell.stages.latents import Lanes, Latents, Phase, PrepareLatents, SwitchDenoiser
from stepwell.stages.preview import LatentPreview
from stepwell.stages.text import EncodeText, Umt5Encoder
from stepwell.stages.video import DecodeVideo, EncodeFirstFrame, ImageEncoder, WanDecoder
from stepwell.types import Limits, SamplingParams, Task

FAST = "WanDMDPipeline"  # FastWan: distilled to three steps without guidance


# ------------------------------------------------------------------------------------------------------- checkpoints
def key_map(config: Mapping[str, Any]) -> KeyMap:
    """Our parameters and the tensors of a diffusers Wan transformer they are made of."""
    wan = WanConfig.from_json(config)
    embedder = "condition_embedder"
    layers: dict[str, tuple[str, ...]] = {
        "video_in": ("patch_embedding",),
        "time_embedder.linear_1": (f"{embedder}.time_embedder.linear_1",),
        "time_embedder.linear_2": (f"{embedder}.time_embedder.linear_2",),
        "time_modulation": (f"{embedder}.time_proj",),
        "text_up": (f"{embedder}.text_embedder.linear_1",),
        "text_down": (f"{embedder}.text_embedder.linear_2",),
        "video_out": ("proj_out",),
    }
    if wan.image_dim is not None:
        names = {"norm_in": "norm1", "up": "ff.net.0.proj", "down": "ff.net.2", "norm_out": "norm2"}
        layers |= {f"image_embedder.{ours}": (f"{embedder}.image_embedder.{theirs}",) for ours, theirs in names.items()}
    tables = [f"blocks.{i}.scale_shift_table" for i in range(wan.num_layers)]
    vectors: dict[str, tuple[str, ...]] = {"modulation": (*tables, "scale_shift_table")}
    for i in range(wan.num_layers):
        block, keys = f"blocks.{i}", f"cross_keys.{i}"
        layers[f"{block}.qkv"] = tuple(f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))
        layers[f"{block}.out"] = (f"{block}.attn1.to_out.0",)
        layers[f"{block}.cross_q"] = (f"{block}.attn2.to_q",)
        layers[f"{block}.cross_out"] = (f"{block}.attn2.to_out.0",)
        layers[f"{block}.mlp.up"] = (f"{block}.ffn.net.0.proj",)
        layers[f"{block}.mlp.down"] = (f"{block}.ffn.net.2",)
        layers[f"{keys}.kv"] = (f"{block}.attn2.to_k", f"{block}.attn2.to_v")
        vectors[f"{block}.norm.weight"] = (f"{block}.attn1.norm_q.weight", f"{block}.attn1.norm_k.weight")
        vectors[f"{block}.cross_q_norm"] = (f"{block}.attn2.norm_q.weight",)
        vectors[f"{keys}.norm"] = (f"{block}.attn2.norm_k.weight",)
        if wan.cross_attn_norm:
            layers[f"{block}.cross_norm"] = (f"{block}.norm2",)
        if wan.image_dim is not None:
            layers[f"{keys}.image_kv"] = (f"{block}.attn2.add_k_proj", f"{block}.attn2.add_v_proj")
            vectors[f"{keys}.image_norm"] = (f"{block}.attn2.norm_added_k.weight",)
    tensors = {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }
    return {**tensors, **vectors}


# -------------------------------------------------------------------------------------------------- pipeline and specs
def layout(config: WanConfig, vae: Mapping[str, Any]) -> Latents:
    """The VAE's latents in the transformer's patches, channel by channel to mean 0 and deviation 1; `vae` is its config."""
    return Latents(
        channels=config.channels_out,
        factor=vae.get("scale_factor_spatial", 8),  # that of Wan 2.1 leaves them out
        scaling=1.0 / torch.tensor(vae["latents_std"]).view(-1, 1, 1, 1),
        shift=torch.tensor(vae["latents_mean"]).view(-1, 1, 1, 1),
        frame_factor=vae.get("scale_factor_temporal", 4),
        patch=config.patch_size,
        dtype=torch.float32,
    )


def pipeline(parts: Mapping[str, Any], settings: StageSettings) -> tuple[Stage, ...]:
    """Text to video as `WanPipeline` does it, image to video as `WanImageToVideoPipeline` does."""
    denoiser, vae, index = parts["transformer"], parts["vae"], settings.index
    latents = layout(denoiser.config, vae.config)
    is_distilled = index.get("_class_name") == FAST
    sampler, guider = (Dmd(), NO_CFG) if is_distilled else (_sampler(parts["scheduler"]), PLAIN_CFG)
    late = parts.get("transformer_2")
    boundary = 0.0 if late is None else float(index["boundary_ratio"]) * 1000
    lanes = Lanes(denoiser, Phase(sampler, latents, low=boundary), settings)
    see = ImageEncoder(parts["image_processor"], parts["image_encoder"]) if "image_encoder" in parts else None
    preview = LatentPreview(vae, latents)
    denoise: tuple[Stage, ...] = (PrepareLatents(lanes), Denoise(lanes, guider, preview, text_in_sequence=False))
    if late is not None:
        late_lanes = Lanes(late, Phase(sampler, latents, high=boundary), settings)
        denoise += (SwitchDenoiser(late_lanes), DenoiseLate(late_lanes, guider, preview, text_in_sequence=False))
    return (
        EncodeText(Umt5Encoder(parts["tokenizer"], parts["text_encoder"]), guider, settings.prompt_cache_bytes),
        EncodeFirstFrame(vae, latents, see, gives=bool(index.get("expand_timesteps"))),
        *denoise,
        DecodeVideo(WanDecoder(vae, latents), latents, settings.decoding),
    )


def _sampler(schedule: Any) -> Sampler:
    """Of the two kinds of schedule a repository may have"""
    return UniPC(schedule) if "solver_order" in schedule.config else FlowMatchEuler(schedule, has_own_levels=True)


_PARTS = {
    "transformer": Part("transformer", "dit", ("WanTransformer3DModel",)),
    "transformer_2": Part("transformer_2", "dit_2", ("WanTransformer3DModel",), is_optional=True),
    "vae": Part("vae", "vae", ("AutoencoderKLWan",)),
    "text_encoder": Part("text_encoder", "text_encoder", ("UMT5EncoderModel",)),
    "tokenizer": Part("tokenizer", "tokenizer", ("T5TokenizerFast", "T5Tokenizer")),
    "image_encoder": Part("image_encoder", "image_encoder", ("CLIPVisionModel",), is_optional=True),
    "image_processor": Part("image_processor", "image_processor", CLIP_PROCESSORS, is_optional=True),
    "scheduler": Part("scheduler", "scheduler", ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")),
}


def _is(pipeline_class: str, *, layers: int | None = None, late: bool = False, expands: bool = False) -> Matches:
    """Whether a repository is this member of the family, by what differs among its published ones."""

    def matches(index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        has_late = (index.get("transformer_2") or [None])[0] is not None
        is_as_deep = layers is None or config.get("num_layers", 40) >= layers
        found = index.get("_class_name"), has_late, bool(index.get("expand_timesteps"))
        return found == (pipeline_class, late, expands) and is_as_deep

    return matches


T2V_14B = ModelSpec(
    name="wan2.1-t2v-14b",
    family="wan",
    pipeline_class="WanPipeline",
    hub_ids=("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
    tasks=(Task.TEXT_TO_VIDEO,),
    defaults=SamplingParams(
        width=832,
        height=480,
        num_inference_steps=50,
        guidance_scale=5.0,
        true_cfg_scale=1.0,
        num_outputs=1,
        max_sequence_length=512,
        strength=1.0,
        num_frames=81,
        fps=16,
    ),
    limits=Limits(max_frames=1025),
    parts=_PARTS,
    matches=_is("WanPipeline", layers=40),
    build_denoiser=lambda config: Wan(WanConfig.from_json(config)),
    key_map=key_map,
    latents=lambda config, vae: layout(WanConfig.from_json(config), vae),
    pipeline=pipeline,
    unused=("norm_added_q",),
    has_guidance=True,
    vendor_patterns=("sliding_tile_attn", "video_sparse_attn"),
    cfg_field="guidance_scale",
    # of TeaCache4Wan2.1, for the embedded time
    teacache=(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    tiny={
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
    },
)
T2V_1B = replace(
    T2V_14B,
    name="wan2.1-t2v-1.3b",
    hub_ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    matches=_is("WanPipeline"),
    teacache=(2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
)
I2V_14B = replace(
    T2V_14B,
    name="wan2.1-i2v-14b",
    pipeline_class="WanImageToVideoPipeline",
    hub_ids=("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
    tasks=(Task.IMAGE_TO_VIDEO,),
    matches=_is("WanImageToVideoPipeline"),
    teacache=(-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),  # fitted at 480P
    tiny={**T2V_14B.tiny, "in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24},
)
_EXPERTS = replace(T2V_14B.defaults, width=1280, height=720, num_inference_steps=40, guidance_scale=4.0)
T2V_A14B = replace(
    T2V_14B,
    name="wan2.2-t2v-a14b",
    hub_ids=("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
    defaults=replace(_EXPERTS, guidance_scale_2=3.0),
    matches=_is("WanPipeline", late=True),
    has_guidance_2=True,
    teacache=(),
)
I2V_A14B = replace(
    T2V_A14B,
    name="wan2.2-i2v-a14b",
    pipeline_class="WanImageToVideoPipeline",
    hub_ids=("Wan-AI/Wan2.2-I2V-A14B-Diffusers",),
    tasks=(Task.IMAGE_TO_VIDEO,),
    defaults=replace(_EXPERTS, guidance_scale=3.5, guidance_scale_2=3.5),
    matches=_is("WanImageToVideoPipeline", late=True),
    tiny={**T2V_14B.tiny, "in_channels": 12},
)
TI2V_5B = replace(
    T2V_14B,
    name="wan2.2-ti2v-5b",
    hub_ids=("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
    tasks=(Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO),
    defaults=replace(T2V_14B.defaults, width=1280, height=704, num_frames=121, fps=24),
    matches=_is("WanPipeline", expands=True),
    teacache=(),
)
TI2V_5B_IMAGE = replace(
    TI2V_5B,
    name="wan2.2-ti2v-5b-image",
    pipeline_class="WanImageToVideoPipeline",
    hub_ids=(),
    tasks=(Task.IMAGE_TO_VIDEO,),
    matches=_is("WanImageToVideoPipeline", expands=True),
)

# FastWan 2.1 may hold the gates of video sparse attention, which dense attention does without, as its reference does then
FAST_1B = replace(
    T2V_1B,
    name="fastwan2.1-t2v",
    pipeline_class=FAST,
    hub_ids=("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers"),
    defaults=replace(T2V_14B.defaults, num_frames=61, num_inference_steps=3, guidance_scale=1.0),
    limits=replace(T2V_14B.limits, min_steps=3, max_steps=3),
    matches=_is(FAST),
    unused=(*T2V_14B.unused, "to_gate_compress"),
    has_guidance=False,
    vendor_patterns=("sliding_tile_attn",),  # video sparse attention would need the gates
    cfg_field=None,
    teacache=(),
)
FAST_5B = replace(
    FAST_1B,
    name="fastwan2.2-ti2v-5b",
    hub_ids=("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", "FastVideo/FastWan2.2-TI2V-5B-Diffusers"),
    defaults=replace(TI2V_5B.defaults, num_inference_steps=3, guidance_scale=1.0),
    matches=_is(FAST, expands=True),
)

SPECS = (T2V_14B, T2V_1B, I2V_14B, T2V_A14B, I2V_A14B, TI2V_5B, TI2V_5B_IMAGE, FAST_1B, FAST_5B)
