"""Warm-up: a step of each size that was named is made before anybody else's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.config.load import load
from stepwell.config.schema import EngineOptions
from stepwell.engine.fake import FakeWorker
from stepwell.engine.remote import RemoteEngine
from stepwell.engine.steps import Step, StepResult
from stepwell.engine.warmup import warm_up
from stepwell.errors import InvalidRequest, OutOfMemory


def test_each_size_goes_through_every_stage_and_nothing_stays() -> None:
    class Recording(FakeWorker):
        def execute(self, step: Step) -> StepResult:
            for new in step.new:
                sizes.append((new.request.sampling.width, new.request.sampling.height))
            stages.append(step.stage)
            return super().execute(step)

    sizes: list[tuple[int | None, int | None]] = []
    stages: list[str] = []
    worker = Recording(0)
    warm_up(worker, ["64x64", "128x32"])
    assert sizes == [(64, 64), (128, 32)] and stages == ["encode_text", "denoise", "decode"] * 2
    assert worker.held() == 0


@pytest.mark.parametrize("model", ["stepwell/tiny-flux", "stepwell/fake-image"])
def test_a_size_that_can_not_be_is_refused_at_the_start(model: str) -> None:
    engine = RemoteEngine(EngineOptions(model_path=model, warmup_sizes=["64x64", "65x64"], threads=1))
    with pytest.raises(InvalidRequest, match="warmup_sizes = '65x64': width = 65: must be a multiple of 16") as refused:
        asyncio.run(engine.start())
    assert refused.value.param == "warmup_sizes"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--warmup-sizes", "64x64", "7x7"], "warmup_sizes = '7x7': width = 7: must be"),
        (["--cache-dit-enabled", "--cache-dit-fn", "99"], "cache_dit_fn = 99: must be between 0 and 6"),
        (["--dit-layerwise-offload", "--offload-path", "/nowhere"], "offload_path = '/nowhere': can't be written"),
        (["--vae-path", "/nowhere"], "vae_path = '/nowhere': no such folder"),
    ],
)
def test_doctor_refuses_what_a_start_refuses(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["doctor"], ["generate", "--prompt", "x"]):
        assert main([*command, *flags]) == 2
        assert words in capsys.readouterr().err


def test_doctor_tells_of_step_caches(capsys: pytest.CaptureFixture[str]) -> None:
    def says(*flags: str) -> str:
        assert main(["doctor", "stepwell/tiny-flux", *flags]) == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    assert "step_cache none none was asked for; a request may bring dbcache, first_block or teacache" in says()
    assert "step_cache dbcache as asked, unless a request brings its own: fn 2, bn 0, warmup 4, rdt 0.24" in says(
        "--cache-dit-enabled", "--cache-dit-fn", "2"
    )


def test_a_size_that_does_not_fit_is_named() -> None:
    class Small(FakeWorker):
        def execute(self, step: Step) -> StepResult:
            raised = super().execute(step)
            item = raised.items[0]
            return StepResult((type(item)(item.sample_id, error=OutOfMemory("too large")),), 1.0)

    with pytest.raises(OutOfMemory, match="warmup_sizes = '64x64': too large"):
        warm_up(Small(0), ["64x64"])


def test_the_python_api_warms_up_and_makes_the_same(tiny: DiffGenerator) -> None:
    asked = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 4}
    plain = tiny.generate("a star", **asked)[0].frames
    with DiffGenerator.from_pretrained(threads=1, warmup_sizes=["64x64"]) as generator:
        assert (generator.generate("a star", **asked)[0].frames == plain).all()


def test_sizes_are_spelled_in_many_ways_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("512x512,1024x768", ["512x512", "1024x768"], ["512x512,1024x768"]):
        for name in ("warmup_sizes", "warmup_resolutions"):
            assert load((EngineOptions,), flags={name: given})[EngineOptions].warmup_sizes == ["512x512", "1024x768"]
    line = ["doctor", "stepwell/tiny-flux", "--warmup-resolutions", "64x64", "128x64"]
    assert main(line) == 0
    assert "64x64, 128x64" in capsys.readouterr().out
    for wrong in ("512", "512x", "x", "-1x5", "512×512x3", ""):
        with pytest.raises(
            InvalidRequest, match=r"warmup_sizes = [^:]*: must be sizes as WIDTHxHEIGHT in pixels, such as 512x512"
        ):
            load((EngineOptions,), flags={"warmup_sizes": wrong})
