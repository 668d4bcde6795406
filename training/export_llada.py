"""Put the trained text model together as the folder that ships in the package.

    python -m training.export_llada --run runs/llada --output src/stepwell/zoo/tiny-llada

Takes the averaged weights of `training.train_llada`'s state, in bfloat16 but for the routers', whose choices are float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training.llada import CONFIG, tokenizer

MAX_NEW_TOKENS = 256  # of a text whose request does not say; the longest trained on is a quarter of it


def write(tensors: dict[str, torch.Tensor], folder: Path, config: dict[str, Any] = CONFIG) -> None:
    """The checkpoint: config, weights, tokenizer with the chat template, and the defaults of generating."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() if ".mlp.gate." in n else t.to(torch.bfloat16).contiguous() for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = {name: config[name] for name in ("eos_token_id", "pad_token_id", "mask_token_id")}
    (folder / "generation_config.json").write_text(json.dumps({**ids, "max_new_tokens": MAX_NEW_TOKENS}, indent=2) + "\n")
    tokenizer().save_pretrained(folder, save_jinja_files=False)
    published = json.loads((folder / "tokenizer_config.json").read_text())
    published.pop("backend", None)  # transformers 5's; the class is the name that every version knows
    published["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(published, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    size_mb = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"{sum(t.numel() for t in tensors.values())} parameters, {size_mb:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.run / "state.pt", weights_only=False)
    write(state["average"], args.output)
    print(f"of step {state['step']}")


if __name__ == "__main__":
    main()
