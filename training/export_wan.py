"""Put a trained Wan-layout model together as the folder that ships in the package.

    python -m training.export_wan --run runs/wan --text runs/video-text --vae runs/video-vae-refined --output F

Takes the averaged weights of `training.train_wan`'s state, in bfloat16, and an autoencoder whose encoder is the one
the latents were made with. Writes the sampling defaults of the checkpoint beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from transformers import T5TokenizerFast, UMT5EncoderModel

from training.export import write
from training.train_wan import build_transformer

DEFAULTS = {"width": 64, "height": 64, "num_frames": 17, "fps": 8, "num_inference_steps": 12, "guidance_scale": 1.0}
FLOW_SHIFT = 3.0


def scheduler() -> UniPCMultistepScheduler:
    """As Wan's repositories configure it."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        solver_order=2,
        solver_type="bh2",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "text", "vae", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    vae = AutoencoderKLWan.from_pretrained(args.vae)
    transformer = build_transformer(vae.config.z_dim)
    state = torch.load(args.run / "state.pt", weights_only=False)
    transformer.load_state_dict(state["average"])
    pipe = WanPipeline(
        tokenizer=T5TokenizerFast.from_pretrained(args.text / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(args.text / "text_encoder"),
        vae=vae.to(torch.bfloat16),
        scheduler=scheduler(),
        transformer=transformer.to(torch.bfloat16),
        expand_timesteps=True,
    )
    write(pipe, args.output, DEFAULTS)
    print(f"of step {state['step']}")


if __name__ == "__main__":
    main()
