"""Random-weight repositories in diffusers layout, written by diffusers and transformers themselves."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE as IMAGE_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

TOKENIZERS = Path(str(resources.files("stepwell.zoo") / "tiny-flux"))


def flux_repository(
    path: Path, denoiser: dict[str, Any], *, vae_blocks: int = 3, schedule: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """A FLUX.1 repository whose denoiser has this config; returns `path`. Every weight is random, norms included."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(**denoiser)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")
    tokenizer_2 = T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2")
    clip = _clip(tokenizer, denoiser["pooled_projection_dim"])
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=denoiser["joint_attention_dim"],
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_blocks,
        up_block_types=("UpDecoderBlock2D",) * vae_blocks,
        block_out_channels=(8,) * vae_blocks,
        latent_channels=denoiser["in_channels"] // 4,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    with torch.no_grad():  # defaults are ones and zeros, which hide mistakes
        for module in (transformer, vae):
            for name, parameter in module.named_parameters():
                if "norm" in name and parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(schedule or {"shift": 1.0})),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(path)
    return path


def _clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def llama_3_tokenizer(template: str = DEFAULT_PROMPT_TEMPLATE["template"]) -> PreTrainedTokenizerFast:
    """Of Llama 3's kind, byte-level, with the words of HunyuanVideo's template; of which it makes 95 tokens before the prompt, as
    the real one does, and 103 of that with a picture."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    begin, special = "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[begin, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([template] * 20, trainer)
    made.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, pad_token="<pad>", padding_side="right")


def hunyuan_repository(path: Path, denoiser: dict[str, Any], *, shift: float = 7.0, seed: int = 0) -> Path:
    """A HunyuanVideo repository whose denoiser has this config, which says whether it starts from pictures. Returns `path`. Every
    weight is random, norms included."""
    torch.manual_seed(seed)
    sees = denoiser.get("image_condition_type") is not None
    tokenizer = llama_3_tokenizer(*([IMAGE_TEMPLATE["template"]] if sees else []))
    tokenizer_2 = CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=denoiser["text_embed_dim"],
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    parts: dict[str, Any] = {}
    if sees:
        llama: torch.nn.Module = _llava(language, tokenizer)
        side = {"height": 48, "width": 48}
        parts["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=side)
    else:
        llama = LlamaModel(language)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=denoiser["out_channels"],
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    transformer = HunyuanVideoTransformer3DModel(**denoiser)
    randomise(llama, vae, transformer)
    (HunyuanVideoImageToVideoPipeline if sees else HunyuanVideoPipeline)(
        tokenizer=tokenizer,
        text_encoder=llama,
        tokenizer_2=tokenizer_2,
        text_encoder_2=_clip(tokenizer_2, denoiser["pooled_projection_dim"]),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
        **parts,
    ).save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "LlamaTokenizerFast"]  # as it is published
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "generation_config.json").write_text(json.dumps({"width": 32, "height": 32, "num_frames": 5, "fps": 8}))
    return path


def _llava(language: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Which sees a picture as 576 patches, as the real one does."""
    vision = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=2
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=image_token, pad_token_id=tokenizer.pad_token_id
    )
    return LlavaForConditionalGeneration(config)


def wan_repository(
    path: Path,
    denoiser: dict[str, Any],
    *,
    pipeline: str = "WanPipeline",
    schedule: dict[str, Any] | None = None,
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
    vae_changes: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A Wan repository whose denoiser has this config; with a `boundary_ratio` it has two. Returns `path`. Every weight is
    random, norms and tables included."""
    torch.manual_seed(seed)
    tokenizer = T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2")
    umt5 = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=denoiser["text_dim"],
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )
    channels = denoiser["out_channels"]
    sizes: dict[str, Any] = {"base_dim": 8, "z_dim": channels, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
    means, deviations = [0.1 * (i % 3 - 1) for i in range(channels)], [0.8 + 0.1 * (i % 4) for i in range(channels)]
    vae = AutoencoderKLWan(**{**sizes, "latents_mean": means, "latents_std": deviations, **(vae_changes or {})})
    parts: dict[str, Any] = {}
    if denoiser.get("image_dim") is not None:
        vision = CLIPVisionConfig(
            hidden_size=denoiser["image_dim"],
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        parts["image_encoder"] = CLIPVisionModel(vision)
        parts["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    denoisers = [WanTransformer3DModel(**denoiser) for _ in range(1 if boundary_ratio is None else 2)]
    randomise(umt5, vae, *denoisers)
    if boundary_ratio is not None or pipeline == "WanImageToVideoPipeline":
        parts["transformer_2"] = denoisers[1] if boundary_ratio is not None else None
    {"WanPipeline": WanPipeline, "WanImageToVideoPipeline": WanImageToVideoPipeline}[pipeline](
        tokenizer=tokenizer,
        text_encoder=umt5,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            **{"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True, **(schedule or {})}
        ),
        transformer=denoisers[0],
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
        **parts,
    ).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"width": 32, "height": 32, "num_frames": 5, "fps": 8}))
    return path


def randomise(*modules: torch.nn.Module) -> None:
    """Change what libraries set to ones and zeros, which hides mistakes."""
    with torch.no_grad():
        for module in modules:
            for name, parameter in module.named_parameters():
                if ("norm" in name or name.endswith("gamma")) and parameter.squeeze().ndim <= 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
