"""Put a trained model together as the folder that ships in the package.

    python -m training.export --run runs/flux --text runs/text --vae runs/vae-refined --output src/stepwell/zoo/tiny-flux

Takes the averaged weights of `training.train_flux`'s state, in bfloat16, and an autoencoder whose encoder is the one
the latents were made with. Writes the sampling defaults of the checkpoint beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from training.train_flux import build_transformer

DEFAULTS = {"width": 128, "height": 128, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "text", "vae", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.vae)
    transformer = build_transformer(vae.config.latent_channels)
    state = torch.load(args.run / "state.pt", weights_only=False)
    transformer.load_state_dict(state["average"])
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(args.text / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(args.text / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(args.text / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(args.text / "tokenizer_2"),
        transformer=transformer,
    )
    for part in (pipe.transformer, pipe.vae):  # not the small encoders: transformers would load them as bfloat16
        part.to(torch.bfloat16)
    write(pipe, args.output, DEFAULTS)
    print(f"of step {state['step']}")


def write(pipe: DiffusionPipeline, folder: Path, defaults: dict[str, float]) -> None:
    """The folder that ships, with its own sampling defaults."""
    pipe.save_pretrained(folder)
    for config in folder.rglob("config.json"):  # where it was loaded from is nobody's business
        content = json.loads(config.read_text())
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")
    print(f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
