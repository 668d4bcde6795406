"""stepwell generate, as a user types it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepwell.cli.main import main
from stepwell.media.images import read_parameters

ZOO = Path(str(resources.files("stepwell.zoo") / "tiny-flux"))
QUICK = ["--num-inference-steps", "2", "--width", "32", "--height", "32", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with exit code 2 and one line; returns the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err, captured.err
    return captured.err


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from stepwell.cli.main import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    best = float("inf")
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.monotonic() - began)
    assert done.stderr.strip() == "False"
    assert "generate" in done.stdout
    assert best < 2  # a gross limit; the figure is measured by `make bench`


@pytest.mark.parametrize("module", [
    "stepwell", "stepwell.types", "stepwell.errors", "stepwell.config.load", "stepwell.config.resolve", "stepwell.api.images",
    "stepwell.api.models", "stepwell.serve.app", "stepwell.cli.generate", "stepwell.cli.serve", "stepwell.cli.compare",
    "stepwell.profiling.report", "stepwell.profiling.compare", "stepwell.engine.api",
    "stepwell.engine.scheduler", "stepwell.engine.core", "stepwell.engine.local", "stepwell.engine.fake", "stepwell.generator",
    "stepwell.engine.checkpoint_files",
    "stepwell.engine.remote", "stepwell.engine.process", "stepwell.media.video", "stepwell.media.storage",
    "stepwell.media.uploads", "stepwell.media.incoming", "stepwell.cli.worker", "stepwell.dynamo.media", "stepwell.dynamo.text",
    "stepwell.dynamo.client",
])  # fmt: skip
def test_frontends_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_picture_that_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a small red circle on a white background"
    assert main(["generate", "--prompt", prompt, "--seed", "7", *QUICK]) == 0
    out = capsys.readouterr().out
    path = Path(re.search(r"saved (\S+) \(seed 7,", out)[1])  # type: ignore[index]
    assert path == Path("outputs/a-small-red-circle-on-a-white-background-7.png")
    assert Image.open(path).size == (32, 32)
    assert read_parameters(path)["prompt"] == prompt

    again = ["generate", "--from", str(path), "--threads", "1", "--output-file-name", "again.png"]
    assert main(again) == 0
    assert Image.open("outputs/again.png").tobytes() == Image.open(path).tobytes()
    assert main([*again[:-1], "other.png", "--seed", "8"]) == 0  # a flag beats what the picture says
    assert read_parameters(Path("outputs/other.png"))["seed"] == 8


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_formats_carry_their_parameters(suffix: str) -> None:
    assert main(["generate", "--prompt", "ein Kreis, naïf ☀", "--output-file-name", f"x.{suffix}", "--seed", "1", *QUICK]) == 0
    assert read_parameters(Path(f"outputs/x.{suffix}"))["prompt"] == "ein Kreis, naïf ☀"


def test_starting_from_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (70, 50), "red").save("start.jpg")
    start = ["generate", "--prompt", "a star", "--image-path", "start.jpg", "--seed", "1", "--threads", "1"]
    assert main([*start, "--output-file-name", "small.png", "--num-inference-steps", "4", "--strength", "0.5"]) == 0
    with Image.open("outputs/small.png") as made:
        assert made.size == (64, 48)  # the picture's own size, as near as the model can
    assert read_parameters(Path("outputs/small.png"))["strength"] == 0.5
    assert "strength = 2.0" in fails([*start, "--strength", "2"], capsys)
    assert "must be above 0" in fails([*start, "--strength", "0"], capsys)
    Path("text.png").write_text("hello")
    assert "not a PNG, JPEG or WebP" in fails([*start[:3], "--image-path", "text.png"], capsys)
    assert "can't be read" in fails([*start[:3], "--image-path", "nowhere.png"], capsys)


def test_several_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a star", "--seed", "3", "--num-outputs-per-prompt", "3", *QUICK]) == 0
    assert sorted(p.name for p in Path("outputs").iterdir()) == ["a-star-3.png", "a-star-4.png", "a-star-5.png"]
    arguments = ["--num_outputs_per_prompt=2", "--output-file-name", "two.png", "--output-path", "elsewhere"]
    assert main(["generate", "--prompt", "a star", *arguments, *QUICK]) == 0
    assert sorted(p.name for p in Path("elsewhere").iterdir()) == ["two-0.png", "two-1.png"]


def test_saving_can_be_switched_off_and_raw_frames_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a star", "--no-save-output", "--return-frames", "--seed", "1", *QUICK]) == 0
    assert np.load("outputs/a-star-1.npy").shape == (1, 32, 32, 3)
    assert not list(Path("outputs").glob("*.png"))


def test_config_file_environment_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"prompt": "a circle", "width": 32, "height": 32, "num_inference_steps": 1, "seed": 5, "threads": 1}
    Path("run.yaml").write_text("\n".join(f"{key}: {value}" for key, value in config.items()))
    Path("run.json").write_text(json.dumps({**config, "max-sequence-length": 16}))
    assert main(["generate", "--config", "run.yaml"]) == 0
    assert read_parameters(Path("outputs/a-circle-5.png"))["num_inference_steps"] == 1
    monkeypatch.setenv("STEPWELL_SEED", "6")
    assert main(["generate", "--config", "run.json"]) == 0
    assert read_parameters(Path("outputs/a-circle-6.png"))["max_sequence_length"] == 16
    assert main(["generate", "--config", "run.json", "--seed", "7", "--num_inference_steps=2"]) == 0
    assert read_parameters(Path("outputs/a-circle-7.png"))["num_inference_steps"] == 2


def test_http_options_are_named_as_not_applying(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a star", "--port", "30010", *QUICK]) == 0
    assert "port do not apply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "prompt is missing"),
        (["--prompt", "x", "--width", "33"], "width = 33: must be a multiple of"),
        (["--prompt", "x", "--width", "0"], "width = 0: must be between"),
        (["--prompt", "x", "--width", "wide"], "width = 'wide': "),
        (["--prompt", "x", "--num-inference-steps", "0"], "num_inference_steps = 0"),
        (["--prompt", "x", "--num-inference-steps", "2.5"], "num_inference_steps = '2.5'"),
        (["--prompt", "x", "--seed", "-1"], "seed = -1"),
        (["--prompt", "x", "--guidance-scale", "nan"], "guidance_scale = nan"),
        (["--prompt", "x", "--sed", "1"], "did you mean '--seed'"),
        (["--prompt", "x", "extra"], "'extra'"),
        (["--prompt"], "--prompt"),
        (["--prompt", "x", "--model-path", "./nowhere"], "'./nowhere': no such folder"),
        (["--prompt", "x", "--model-path", "/no/such/folder"], "no such folder"),
        (["--prompt", "x", "--dit-precision", "int4"], "dit_precision = 'int4'"),
        (["--prompt", "x", "--dit-precision", "fp16", "--device", "cpu"], "fp16"),
        (["--prompt", "x", "--device", "cuda"], "no CUDA GPU"),
        (["--prompt", "x", "--text-encoder-precisions", "fp32", "fp32", "fp32"], "2 text encoders"),
        (["--prompt", "x", "--output-file-name", "a/b.png"], "must be a file name"),
        (["--prompt", "x", "--output-file-name", "b.gif"], "ends in .png"),
        (["--prompt", "x", "--config", "nowhere.json"], "nowhere.json"),
        (["--from", "nowhere.png"], "No such file"),
        (["--prompt", "x", "--vae-config", "{"], "vae_config"),
        (["--prompt", "x", "--vae-config", '{"load_decoder": false}'], "load_decoder"),
        (["--prompt", "x", "--output-path", "/proc/nowhere"], "output_path"),
        (["--prompt", "x", "--vae-config", '{"tile": 3}'], "vae_config.tile"),
        (["--prompt", "x", "--lora-path", "some/lora"], "LoRA adapters are not in this version"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in fails(["generate", *arguments], capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "must hold a mapping"),
        ("{", "config.json"),
        ('{"sede": 1}', "did you mean 'seed'"),
        ('{"seed": "x"}', "seed = 'x'"),
    ],
)
def test_bad_config_files(content: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.json").write_text(content)
    assert words in fails(["generate", "--config", "config.json", "--prompt", "x"], capsys)


def test_an_unknown_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STEPWELL_SEDE", "1")
    assert "did you mean 'STEPWELL_SEED'" in fails(["generate", "--prompt", "x"], capsys)


def test_a_picture_without_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "carries no parameters" in fails(["generate", "--from", "plain.png"], capsys)
    Path("text.png").write_text("no picture")
    assert "not a PNG" in fails(["generate", "--from", "text.png"], capsys)


# ------------------------------------------------------------------------------------------------ damaged repositories
def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:100_000]),
    "pickled": lambda model: (model / WEIGHTS).rename(model / WEIGHTS.replace("safetensors", "bin")),
    "pickled encoder": lambda model: (model / "text_encoder/model.safetensors").rename(model / "text_encoder/pytorch_model.bin"),
    "no weights": lambda model: (model / WEIGHTS).unlink(),
    "key set": lambda model: edit(model / "transformer/config.json", num_single_layers=5),
    "shapes": lambda model: edit(model / "transformer/config.json", joint_attention_dim=65),
    "no index": lambda model: (model / "model_index.json").unlink(),
    "no config": lambda model: (model / "transformer/config.json").unlink(),
    "foreign": lambda model: edit(model / "model_index.json", _class_name="StableDiffusionPipeline"),
    "no scheduler": lambda model: shutil.rmtree(model / "scheduler"),
    "half an encoder": lambda model: edit(model / "text_encoder_2/config.json", num_layers=3),
    "no tokenizer": lambda model: (model / "tokenizer_2/tokenizer.json").unlink(),
    "odd axes": lambda model: edit(model / "transformer/config.json", axes_dims_rope=[7, 13, 12]),
    "null layers": lambda model: edit(model / "transformer/config.json", num_layers=None),
    "variant": lambda model: (
        [shutil.copy(model / WEIGHTS, model / WEIGHTS.replace(".saf", f".{v}.saf")) for v in ("a", "b")]
        and (model / WEIGHTS).unlink()
    ),
    "bad vae": lambda model: (model / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", "truncated or not a safetensors file"),
        ("pickled", "only pickled weights"),
        ("pickled encoder", "only pickled weights"),
        ("no weights", "no safetensors file"),
        ("key set", "missing (single_transformer_blocks.4"),
        ("shapes", "has shape"),
        ("no index", "no model_index.json"),
        ("no config", "config.json is missing"),
        ("foreign", "is a StableDiffusionPipeline; this version runs FluxPipeline"),
        ("no scheduler", "scheduler is missing"),
        ("bad vae", "vae can't be loaded"),
        ("half an encoder", "missing tensors"),
        ("no tokenizer", "holds no tokenizer"),
        ("odd axes", "even numbers"),
        ("null layers", "num_layers = None"),
        ("variant", "holds several weights"),
    ],
)
def test_damaged_repositories(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ZOO, "model")
    DAMAGE[name](Path("model"))
    assert words in fails(["generate", "--prompt", "x", "--model-path", "./model"], capsys)


def test_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "stepwell/tiny-flux"]) == 0
    shown = capsys.readouterr().out
    assert "dit_precision" in shown and "batch_tokens" in shown
    assert main(["models"]) == 0
    assert "tiny-flux" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert "did you mean 'generate'" in fails(["generat"], capsys)
    assert "there are" in fails(["xyz"], capsys)


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    report = {"total_duration_ms": 1.0, "steps": [{"name": f"stage {n}", "duration_ms": 1.0} for n in range(5000)]}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(report))
    command = f"{sys.executable} -m stepwell compare a.json b.json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "### Performance Comparison Report\n" and done.stderr == ""


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--config", "config file a\0b"),
        ("--offload-path", "offload_path = 'a\\x00b'"),
        ("--output-path", "output_path = 'a\\x00b'"),
        ("--image-path", "image = 'a\\x00b'"),
        ("--vae-path", "vae_path = 'a\\x00b'"),
        ("--transformer-path", "transformer_path = 'a\\x00b'"),
        ("--mask-strategy-file-path", "mask_strategy_file_path = 'a\\x00b'"),
    ],
)
def test_a_path_with_a_nul_character_is_blamed_on_who_gave_it(flag: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"--mask-strategy-file-path": ["--attention-backend", "sliding_tile_torch"]}.get(flag, [])
    assert main(["generate", "--prompt", "x", "--dit-layerwise-offload", flag, "a\0b", *more]) == 2
    error = capsys.readouterr().err
    assert names in error and ("null byte" in error or "no such folder" in error)
    assert error.count("\n") == 1
