"""Every command of the five documents Stepwell measures itself by, as data.

`sglang` reads `stepwell`, `{model}` stands for the model named, `{picture}` for a URL, everything else is verbatim. A
row *runs* (on a bundled model; videos of a size that takes a CPU hours on one without weights), is *refused* for a reason that
must match, or *needs a GPU*. Later work moves rows up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["runs", "refused", "needs a GPU"]
PAGE, BLOG = "sglang-diffusion", "sglang-diffusion-announcement"
DYNAMO, SUMMARY, TEXT = "dynamo-diffusion", "dynamo-diffusion-summary", "dynamo-diffusion-lm"

WAN, WAN_I2V, FAST = "WanPipeline", "WanImageToVideoPipeline", "HunyuanVideoPipeline"
FLUX, QWEN, QWEN_EDIT = "FluxPipeline", "QwenImagePipeline", "QwenImageEditPipeline"


@dataclass(frozen=True)
class Cli:
    """A command line. `pipeline` is the class of the model it names; `config` is the content of its {config} file. `smaller` goes
    behind it where a CPU takes minutes without; it is run verbatim by `-m long`, as is one that is `shown` by other rows."""

    document: str
    arguments: list[str]
    status: Status
    reason: str = ""
    pipeline: str = FLUX
    env: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    config_suffix: str = ".json"
    smaller: tuple[str, ...] = ()
    shown: bool = False


@dataclass(frozen=True)
class Http:
    """An HTTP call. `smaller` takes the place of what it names in the body, as a command's does."""

    document: str
    method: str
    path: str
    status: Status
    reason: str = ""
    body: dict[str, Any] | None = None
    model: Literal["pictures", "videos", "text"] = "pictures"  # what is served
    form: dict[str, str] | None = None  # sent with a picture as the file `file`
    file: str = "image"
    smaller: dict[str, Any] = field(default_factory=dict)


WAN_SERVER = ["--model-path", "{model}", "--text-encoder-cpu-offload", "--pin-cpu-memory", "--num-gpus", "4",
              "--ulysses-degree=2", "--ring-degree=2"]  # fmt: skip
RACCOON = ["--prompt", "A curious raccoon", "--save-output", "--output-path", "outputs", "--output-file-name",
           "A curious raccoon.mp4"]  # fmt: skip
HUNYUAN = {
    "model_path": "FastVideo/FastHunyuan-diffusers",
    "prompt": "A beautiful woman in a red dress walking down a street",
    "output_path": "outputs/",
    "num_gpus": 2,
    "sp_size": 2,
    "tp_size": 1,
    "num_frames": 45,
    "height": 720,
    "width": 1280,
    "num_inference_steps": 6,
    "seed": 1024,
    "fps": 24,
    "precision": "bf16",
    "vae_precision": "fp16",
    "vae_tiling": True,
    "vae_sp": True,
    "vae_config": {
        "load_encoder": False,
        "load_decoder": True,
        "tile_sample_min_height": 256,
        "tile_sample_min_width": 256,
    },
    "text_encoder_precisions": ["fp16", "fp16"],
    "mask_strategy_file_path": None,
    "enable_torch_compile": False,
}
OVIS = {
    "model_path": "AIDC-AI/Ovis-Image-7B",
    "backend": "diffusers",
    "prompt": "A beautiful landscape",
    "diffusers_kwargs": {"cross_attention_kwargs": {"scale": 0.5}},
}
LOGO = ["generate", "--model-path", "{model}", "--prompt", "A logo With Bold Large text: SGL Diffusion", "--save-output"]
QWEN_LOGO = ["generate", "--model-path", "{model}", "--prompt", "A Logo With Bold Large Text: SGL Diffusion", "--seed", "0"]
SMALL = ("--width", "64", "--height", "64")
CACHE = {"SGLANG_CACHE_DIT_ENABLED": "true"}

CLI = [
    # installation
    Cli(PAGE, LOGO, "runs"),
    Cli(PAGE, LOGO, "runs"),  # the ROCm image runs the same command
    # generate and serve
    Cli(PAGE, ["generate", "--config", "{config}"], "runs", "", FAST, config=HUNYUAN, smaller=SMALL),
    Cli(PAGE, ["generate", "--config", "{config}"], "runs", "", FAST, config=HUNYUAN, config_suffix=".yaml", smaller=SMALL),
    Cli(PAGE, ["generate", "--help"], "runs"),
    Cli(PAGE, ["serve", *WAN_SERVER], "runs", "", WAN),
    Cli(PAGE, ["generate", *WAN_SERVER, *RACCOON], "runs", "", WAN, shown=True),  # the one before has no cache, the next one has
    Cli(PAGE, ["generate", *WAN_SERVER, *RACCOON], "runs", "", WAN, env=CACHE),
    Cli(PAGE, ["serve", *WAN_SERVER, "--port", "30010"], "runs", "", WAN),
    # the diffusers backend
    Cli(
        PAGE,
        ["generate", "--model-path", "AIDC-AI/Ovis-Image-7B", "--backend", "diffusers", "--trust-remote-code",
         "--diffusers-attention-backend", "flash",
         "--prompt", "A serene Japanese garden with cherry blossoms", "--height", "1024", "--width", "1024",
         "--num-inference-steps", "30", "--save-output", "--output-path", "outputs", "--output-file-name", "ovis_garden.png"],
        "refused",
        "backend = 'diffusers'.*not in this version",
    ),
    Cli(PAGE, ["generate", "--config", "{config}"], "refused", "backend = 'diffusers'", config=OVIS),
    # attention backends
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "...", "--attention-backend", "fa"], "refused",
        "attention_backend = 'fa': needs a CUDA GPU.*the package .*flash-attn .*use 'torch_sdpa'"),
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "...", "--attention-backend", "torch_sdpa"], "runs"),
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "...", "--attention-backend", "sliding_tile_attn"], "refused",
        "sliding_tile_attn.*the library st_attn.*use 'sliding_tile_torch'",
        env={"SGLANG_DIFFUSION_ATTENTION_CONFIG": "/abs/path/to/mask_strategy.json"}),
    # Cache-DiT
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "A beautiful sunset over the mountains"], "refused",
        "is a QwenImagePipeline", QWEN, env=CACHE),
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "A curious raccoon in a forest"], "runs",
        env={**CACHE, "SGLANG_CACHE_DIT_FN": "2", "SGLANG_CACHE_DIT_BN": "1", "SGLANG_CACHE_DIT_WARMUP": "4",
             "SGLANG_CACHE_DIT_RDT": "0.4", "SGLANG_CACHE_DIT_MC": "4", "SGLANG_CACHE_DIT_TAYLORSEER": "true",
             "SGLANG_CACHE_DIT_TS_ORDER": "2"}),
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "A futuristic cityscape at sunset"], "refused",
        "is a QwenImagePipeline", QWEN, env={**CACHE, "SGLANG_CACHE_DIT_SCM_PRESET": "medium"}),
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "A futuristic cityscape at sunset"], "refused",
        "is a QwenImagePipeline", QWEN, env={**CACHE, "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "8,3,3,2,2",
                                        "SGLANG_CACHE_DIT_SCM_CACHE_BINS": "1,2,2,2,3"}),
    # profiling
    Cli(PAGE, [*QWEN_LOGO, "--profile"], "refused", "is a QwenImagePipeline", QWEN),
    Cli(PAGE, [*QWEN_LOGO, "--profile", "--num-profiled-timesteps", "10"], "refused", "is a QwenImagePipeline", QWEN),
    Cli(PAGE, [*QWEN_LOGO, "--profile", "--profile-all-stages"], "refused", "is a QwenImagePipeline", QWEN),
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "<PROMPT>", "--perf-dump-path", "perf.json"], "runs"),
    Cli(PAGE, QWEN_LOGO, "needs a GPU", "nsys profile around it", QWEN),
    Cli(PAGE, QWEN_LOGO, "needs a GPU", "nsys profile --delay --duration around it", QWEN),
    # contributing
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "A benchmark prompt", "--perf-dump-path", "baseline.json"],
        "runs"),
    Cli(PAGE, ["generate", "--model-path", "{model}", "--prompt", "A benchmark prompt", "--perf-dump-path", "new.json"], "runs"),
    Cli(PAGE, ["compare", "baseline.json", "new.json"], "runs"),
    # announcement
    Cli(BLOG, ["serve", "--model-path", "{model}"], "runs"),
    Cli(BLOG, [*LOGO[:4], "A Logo With Bold Large Text: SGL Diffusion", "--save-output"], "runs"),
    Cli(BLOG, ["generate", "--model-path", "{model}", "--prompt", "A curious raccoon", "--save-output"], "runs",
        pipeline=WAN),
    Cli(BLOG, ["generate", "--model-path={model}", "--prompt=Summer beach vacation style, a white cat",
               "--image-path={picture}",
               "--save-output", "--num-gpus", "2", "--enable-cfg-parallel"], "runs", pipeline=WAN_I2V),
    Cli(BLOG, ["generate", "--model-path={model}", "--prompt=A curious raccoon", "--width=720", "--height=720", "--save-output"],
        "refused", "is a QwenImagePipeline", QWEN),
    Cli(BLOG, ["generate", "--prompt=Convert 2D style to 3D style", "--image-path=https://github.com/TI2I_Qwen_Image_Edit_Input.jpg",
               "--model-path={model}", "--width=1024", "--height=1536", "--save-output"],
        "refused", "QwenImageEditPipeline", QWEN_EDIT),
    # Dynamo's workers: python -m dynamo.sglang reads stepwell worker
    Cli(TEXT, ["worker", "--model-path", "inclusionAI/LLaDA2.0-mini-preview", "--tp-size", "2", "--skip-tokenizer-init",
               "--trust-remote-code", "--endpoint", "dyn://dynamo.backend.generate", "--enable-metrics", "--disable-cuda-graph",
               "--disable-overlap-schedule", "--attention-backend", "triton", "--dllm-algorithm", "LowConfidence"],
        "needs a GPU", "without --attention-backend triton it runs: tests/dynamo/test_text.py"),
    Cli(DYNAMO, ["worker", "--model-path", "{model}", "--image-diffusion-worker"], "runs"),
    Cli(DYNAMO, ["worker", "--model-path", "{model}", "--video-generation-worker"], "runs", pipeline=WAN),
    Cli(SUMMARY, ["worker", "--image-diffusion-worker", "--media-output-fs-url", "file:///tmp/images"], "runs"),
]  # fmt: skip

CAT = {"prompt": "A calico cat playing a piano on stage", "size": "1024x1024", "n": 1, "response_format": "b64_json"}
LLADA = "inclusionAI/LLaDA2.0-mini-preview"
FEDERER = "Explain why Roger Federer is considered one of the greatest tennis players of all time"

PIANO = {"url": "image_url.jpg", "prompt": "A calico cat playing a piano on stage", "size": "1024x1024"}

HTTP = [
    Http(PAGE, "GET", "/models", "runs"),
    Http(PAGE, "POST", "/v1/images/generations", "runs", body=CAT),  # the Python example
    Http(PAGE, "POST", "/v1/images/generations", "runs", body=CAT),  # the curl example
    Http(PAGE, "POST", "/v1/images/edits", "runs", form={**PIANO, "response_format": "b64_json"}),
    Http(PAGE, "POST", "/v1/images/edits", "runs", form={**PIANO, "response_format": "url"}),
    Http(PAGE, "GET", "/v1/images/{image}/content", "runs"),
    Http(PAGE, "POST", "/v1/videos", "runs", body={"prompt": CAT["prompt"], "size": "1280x720"}, model="videos"),
    Http(PAGE, "POST", "/v1/videos", "runs", body={"prompt": CAT["prompt"], "size": "1280x720"}, model="videos"),
    Http(PAGE, "GET", "/v1/videos", "runs", model="videos"),
    Http(PAGE, "GET", "/v1/videos", "runs", model="videos"),
    Http(PAGE, "GET", "/v1/videos/{video}/content", "runs", model="videos"),
    Http(PAGE, "GET", "/v1/videos/{video}/content", "runs", model="videos"),
    *(
        Http(PAGE, "POST", "/v1/set_lora", "refused", "LoRA", body=body)
        for body in (
            {"lora_nickname": "lora_name", "lora_path": "/path/to/lora.safetensors", "target": "all", "strength": 0.8},
            {"lora_nickname": ["lora_1", "lora_2"], "lora_path": ["/path/to/lora1.safetensors", "/path/to/lora2.safetensors"],
             "target": ["transformer", "transformer_2"], "strength": [0.8, 1.0]},
            {"lora_nickname": ["style_lora", "character_lora"], "target": "all", "strength": [0.7, 0.9],
             "lora_path": ["/path/to/style.safetensors", "/path/to/character.safetensors"]},
            {"lora_nickname": "lora_a", "lora_path": "path/to/A"},
            {"lora_nickname": "lora_b", "lora_path": "path/to/B"},
        )
    ),
    Http(PAGE, "POST", "/v1/merge_lora_weights", "refused", "LoRA", body={"strength": 0.8}),
    Http(PAGE, "POST", "/v1/unmerge_lora_weights", "refused", "LoRA"),
    Http(PAGE, "POST", "/v1/unmerge_lora_weights", "refused", "LoRA"),
    Http(PAGE, "GET", "/v1/list_loras", "refused", "LoRA"),
    Http(BLOG, "POST", "/v1/images/edits", "runs", form={"prompt": "Create a meme based on image provide"}, file="image[]"),
    Http(TEXT, "POST", "/v1/chat/completions", "runs", model="text",
         body={"model": LLADA, "messages": [{"role": "user", "content": "Hello! How are you?"}], "temperature": 0.7,
               "max_tokens": 512}),
    Http(TEXT, "POST", "/v1/completions", "runs", model="text",
         body={"model": LLADA, "prompt": "Once upon a time", "max_tokens": 256}),
    Http(DYNAMO, "POST", "/v1/chat/completions", "runs", model="text",
         body={"model": LLADA, "messages": [{"role": "user", "content": FEDERER}], "temperature": 0.7, "max_tokens": 512}),
]  # fmt: skip

FLUX_DEV, WAN_1B = "black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
# calls to Dynamo's frontend, which has workers by these names: verbatim, model and all
FRONTEND = [
    *(row for row in HTTP if row.model == "text"),
    Http(DYNAMO, "POST", "/v1/images/generations", "runs",
         body={"model": FLUX_DEV, "prompt": FEDERER, "size": "1024x1024", "response_format": "url",
               "nvext": {"num_inference_steps": 15}}, smaller={"nvext": {"num_inference_steps": 2}}),
    Http(DYNAMO, "POST", "/v1/videos", "runs",
         body={"prompt": "Roger Federer winning his 19th grand slam", "model": WAN_1B, "seconds": 2, "size": "832x480",
               "response_format": "url", "nvext": {"fps": 8, "num_frames": 17, "num_inference_steps": 50}}),
]  # fmt: skip
