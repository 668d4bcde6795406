"""Loads the parts that are not ours: text encoders and tokenizers from transformers, VAE and schedule from diffusers."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stepwell.config.schema import VaeConfig
from stepwell.errors import Unsupported, WeightsError
from stepwell.models.spec import Part
from stepwell.weights.reader import tensor_files
from stepwell.weights.repository import Repository, read_json

# quant_method in a config.json -> what must be importable, and the package that brings it
QUANTISERS = {
    "torchao": ("torchao", "torchao"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
# transformers 5 builds these anew as SentencePiece would, which is wrong for Llama 3's: tokenizer.json is taken as it is instead
AS_SAVED = ("LlamaTokenizer", "LlamaTokenizerFast")


def load_processor(repository: Repository, part: Part) -> Any:
    """A transformers tokenizer, or what prepares pictures for an encoder."""
    folder = repository.path / part.folder
    if part.kind == "tokenizer" and folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise WeightsError(f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)})", param=part.folder)
    with _errors_of(folder), _quiet_transformers():
        import transformers

        kind = _library_class(transformers, repository, part)
        if repository.classes(part.folder)[1] in AS_SAVED and (folder / "tokenizer.json").is_file():
            kind = transformers.PreTrainedTokenizerFast
        return kind.from_pretrained(folder, local_files_only=True)


def load_fast_tokenizer(folder: Path) -> Any:
    """The tokenizer.json of a text model, with its chat template if it has one."""
    if not (folder / "tokenizer.json").is_file():
        raise WeightsError(f"{folder} holds no tokenizer.json", param=folder.name)
    with _errors_of(folder), _quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        _check_template(folder, tokenizer)
        return tokenizer


def _check_template(folder: Path, tokenizer: Any) -> None:
    """Raise WeightsError for a chat template that is no program: no request can be to blame for it."""
    from jinja2 import TemplateSyntaxError

    named = tokenizer.chat_template
    for name in named if isinstance(named, dict) else ("default",) if named else ():
        chosen = name if isinstance(named, dict) else None
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=chosen, tokenize=False)
        except TemplateSyntaxError as error:
            files = (f"additional_chat_templates/{name}.jinja", "chat_template.jinja", "tokenizer_config.json")
            file = next(folder / each for each in files if (folder / each).is_file())
            message = f"{file}: the chat template can't be read: {error.message} (line {error.lineno})"
            raise WeightsError(message, param="chat_template") from None
        except Exception:  # of running it, which may be this conversation's fault
            continue


def load_encoder(repository: Repository, part: Part, dtype: torch.dtype, device: str, attention: str | None = None) -> Any:
    """A transformers text or image encoder, in evaluation mode; one that is quantised stays so. `attention` is
    transformers' name of a kernel, None for its own choice."""
    folder = repository.path / part.folder
    tensor_files(folder)  # refuses pickles with our own words
    quantization = read_json(folder / "config.json").get("quantization_config")
    if isinstance(quantization, dict):
        need_quantiser(folder, str(quantization.get("quant_method")))
    with _errors_of(folder), _quiet():
        import transformers

        model, report = _library_class(transformers, repository, part).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        _check_loaded(folder, report)
        return model.eval().requires_grad_(False).to(device)


def need_quantiser(folder: Path, method: str) -> None:
    """Raise Unsupported, naming the package, if that which quantised a folder's weights is not installed."""
    if method in QUANTISERS:
        module, package = QUANTISERS[method]
        need_package(folder, module, f"its weights are quantised by {method}", package)


def need_package(folder: Path, module: str, why: str, package: str | None = None) -> None:
    """Raise Unsupported, naming the package, if a module can't be imported."""
    try:
        with _quiet():
            importlib.import_module(module)
    except ImportError:
        name = package or module
        raise Unsupported(f"{folder}: {why}, which takes the package {name}: pip install {name}", param=folder.name) from None


def load_quantised(folder: Path, class_name: str) -> Any:
    """A diffusers model whose config.json holds a quantization_config."""
    with _errors_of(folder), _quiet():
        import diffusers

        model, report = getattr(diffusers, class_name).from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        _check_loaded(folder, report)
        return model.requires_grad_(False)


def load_schedule(repository: Repository, part: Part) -> Any:
    """A diffusers noise schedule."""
    name = repository.classes(part.folder)[1]
    _check_class(name, part)
    with _errors_of(repository.path / part.folder), _quiet():
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        schedules = {kind.__name__: kind for kind in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)}
        return schedules[name].from_pretrained(repository.path / part.folder)


def read_vae_config(folder: Path, part: Part) -> dict[str, Any]:
    """An autoencoder's config.json, if it is of a class that the model takes."""
    config = read_json(folder / "config.json")
    _check_class(config.get("_class_name", ""), part)
    return config


def load_vae(folder: Path, part: Part, config: VaeConfig, dtype: torch.dtype, device: str) -> Any:
    """A diffusers autoencoder; on a CPU in channels-last layout, measured 1.2× faster to decode there."""
    name = read_vae_config(folder, part)["_class_name"]
    tensor_files(folder)
    with _errors_of(folder), _quiet():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        kinds = (AutoencoderKL, AutoencoderTiny, AutoencoderKLWan, AutoencoderKLHunyuanVideo)
        classes = {kind.__name__: kind for kind in kinds}
        vae, report = classes[name].from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        _check_loaded(folder, report)
        if not config.load_encoder:
            vae.encoder = None
        vae = vae.eval().requires_grad_(False).to(device)
        is_video = next(vae.parameters()).ndim == 5
        return vae.to(memory_format=torch.channels_last) if device == "cpu" and not is_video else vae


def set_tile_size(vae: Any, config: VaeConfig) -> None:
    """The size of a tile, in pixels. A picture's autoencoder knows square tiles only; a video's tiles overlap by a quarter."""
    sides = {"height": config.tile_sample_min_height, "width": config.tile_sample_min_width}
    asked = {name: side for name, side in sides.items() if side is not None}
    if asked and hasattr(vae, "tile_sample_stride_height"):
        ratio = vae.spatial_compression_ratio
        for name, side in asked.items():
            latents = max(2, side // ratio)
            setattr(vae, f"tile_sample_min_{name}", latents * ratio)
            setattr(vae, f"tile_sample_stride_{name}", max(1, latents * 3 // 4) * ratio)
    elif asked:
        side = min(asked.values())
        vae.tile_latent_min_size = max(1, side * vae.tile_latent_min_size // vae.tile_sample_min_size)
        vae.tile_sample_min_size = side


def _check_loaded(folder: Path, report: dict[str, Any]) -> None:
    """A library fills what a checkpoint lacks with random numbers and says so in a log; here it is an error."""
    for what in ("missing_keys", "mismatched_keys"):
        names = [str(name) for name in report.get(what, ())]
        if names:
            kind = what.split("_")[0]
            raise WeightsError(f"{folder}: {len(names)} {kind} tensors ({', '.join(sorted(names)[:3])})", param=folder.name)


def _library_class(library: Any, repository: Repository, part: Part) -> Any:
    name = repository.classes(part.folder)[1]
    _check_class(name, part)
    return getattr(library, name)


def _check_class(name: str, part: Part) -> None:
    if name not in part.classes:
        raise WeightsError(f"{part.folder} is a {name!r}; this model takes {' or '.join(part.classes)}", param=part.folder)


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """A library's complaint about a folder, in one line and under our own type."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is missing", param=folder.name)
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{folder} can't be loaded: {' '.join(str(error).split())[:400]}", param=folder.name) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' loading bars and notices, those of their first import too: progress is ours to show."""
    from diffusers.utils import logging as diffusers_logging

    # their own function, as it sets a level when first asked; the other two speak when torchao is imported
    others = (logging.getLogger(name) for name in ("torchao", "torch.utils._pytree"))
    with _quiet_transformers(), _silent(diffusers_logging.get_logger("diffusers"), *others):
        yield


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """`_quiet` where diffusers is not needed: importing it takes longer than all else that a text model needs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        with _silent(transformers_logging.get_logger("transformers")):
            yield
    finally:
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _silent(*loggers: logging.Logger) -> Iterator[None]:
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
