"""Random-weight repositories in diffusers layout, written by diffusers and transformers themselves."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TOKENIZERS = Path(str(resources.files("stepwell.zoo") / "tiny-flux"))


def flux_repository(
    path: Path, denoiser: dict[str, Any], *, vae_blocks: int = 3, schedule: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """A FLUX.1 repository whose denoiser has this config; returns `path`. Every weight is random, norms included."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(**denoiser)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")
    tokenizer_2 = T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=denoiser["pooled_projection_dim"],
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
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
