"""The mean of several models' transformers, where one was trained on from another: often better than each of them.

    python -m training.average FOLDER FOLDER … --output FOLDER

All are pipeline folders; everything but the weights is taken from the last. M. Wortsman et al. 2022, "Model soups".
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(words)
    shutil.copytree(args.folders[-1], args.output)
    models = [load_file(folder / WEIGHTS) for folder in args.folders]
    mean = {
        name: (sum(model[name].float() for model in models) / len(models)).to(last.dtype).contiguous()
        for name, last in models[-1].items()
    }
    save_file(mean, args.output / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
