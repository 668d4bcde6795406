"""The names FLUX.1's tensors were published under (BFL's `flux/model.py`), which GGUF files keep.

Reference: diffusers `convert_flux_transformer_checkpoint_to_diffusers`, which takes the published width only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepwell.weights.gguf import Cut, OriginalNames

MLP = 4  # width of the feed-forward, in widths of the model


def cuts(config: Mapping[str, Any]) -> dict[str, tuple[Cut, ...]]:
    """Original tensor -> the tensors of a diffusers checkpoint it holds."""
    width = int(config.get("num_attention_heads", 24)) * int(config.get("attention_head_dim", 128))
    layers: dict[str, tuple[Cut, ...]] = {
        "img_in": (Cut("x_embedder"),),
        "txt_in": (Cut("context_embedder"),),
        "final_layer.linear": (Cut("proj_out"),),
        # shift, then scale; diffusers has them the other way round
        "final_layer.adaLN_modulation.1": (Cut("norm_out.linear", ((width, 2 * width), (0, width))),),
    }
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if config.get("guidance_embeds"):
        embedders["guidance_in"] = "guidance_embedder"
    for theirs, name in embedders.items():
        for layer, place in (("in_layer", 1), ("out_layer", 2)):
            layers[f"{theirs}.{layer}"] = (Cut(f"time_text_embed.{name}.linear_{place}"),)
    norms: dict[str, tuple[Cut, ...]] = {}
    for i in range(int(config.get("num_layers", 19))):
        block = f"transformer_blocks.{i}"
        for stream, modulation, qkv, out, query_key, mlp in (
            ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k"), "ff"),
            ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
             ("norm_added_q", "norm_added_k"), "ff_context"),
        ):  # fmt: skip
            theirs = f"double_blocks.{i}.{stream}"
            layers[f"{theirs}_mod.lin"] = (Cut(f"{block}.{modulation}.linear"),)
            layers[f"{theirs}_attn.qkv"] = _thirds([f"{block}.attn.{name}" for name in qkv], width)
            layers[f"{theirs}_attn.proj"] = (Cut(f"{block}.attn.{out}"),)
            layers[f"{theirs}_mlp.0"] = (Cut(f"{block}.{mlp}.net.0.proj"),)
            layers[f"{theirs}_mlp.2"] = (Cut(f"{block}.{mlp}.net.2"),)
            for kind, name in zip(("query", "key"), query_key, strict=True):
                norms[f"{theirs}_attn.norm.{kind}_norm.scale"] = (Cut(f"{block}.attn.{name}.weight"),)
    for i in range(int(config.get("num_single_layers", 38))):
        theirs, block = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        layers[f"{theirs}.modulation.lin"] = (Cut(f"{block}.norm.linear"),)
        layers[f"{theirs}.linear1"] = (
            *_thirds([f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v")], width),
            Cut(f"{block}.proj_mlp", ((3 * width, (3 + MLP) * width),)),
        )
        layers[f"{theirs}.linear2"] = (Cut(f"{block}.proj_out"),)
        for kind, name in (("query", "norm_q"), ("key", "norm_k")):
            norms[f"{theirs}.norm.{kind}_norm.scale"] = (Cut(f"{block}.attn.{name}.weight"),)
    tensors = {
        f"{theirs}.{kind}": tuple(Cut(f"{cut.name}.{kind}", cut.rows) for cut in layer)
        for theirs, layer in layers.items()
        for kind in ("weight", "bias")
    }
    return {**tensors, **norms}


def _thirds(names: list[str], width: int) -> tuple[Cut, ...]:
    """Queries, keys and values, one below the other."""
    return tuple(Cut(name, ((i * width, (i + 1) * width),)) for i, name in enumerate(names))


ORIGINAL = OriginalNames("flux", cuts)
