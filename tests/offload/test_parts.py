"""Offload by part. There may be no GPU, so the device is the CPU too: copies are copies, and who is there can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stepwell.engine.intake import complete
from stepwell.engine.steps import NewSample, Step
from stepwell.engine.worker import Worker
from stepwell.offload.layers import stays
from stepwell.offload.parts import Residency, Resident
from stepwell.types import Request, SamplingParams
from tests.support.driving import worker_of

KINDS = ("text_encoder", "dit", "vae")


def offloading(path: Path) -> tuple[Worker, dict[str, Resident]]:
    """A worker whose parts take turns."""
    worker = worker_of(path, threads=1, linear_backend="torch")
    stages = worker._stages
    encoder = stages["encode_text"].encoder  # type: ignore[attr-defined]
    modules = {
        "text_encoder": nn.ModuleList([encoder.clip, encoder.t5]),
        "dit": stages["denoise"].denoiser,  # type: ignore[attr-defined]
        "vae": stages["decode"].vae,  # type: ignore[attr-defined]
    }
    parts = {kind: Resident(stays(module), "cpu", pin=False) for kind, module in modules.items()}
    worker._residency = Residency({kind: [part] for kind, part in parts.items()})
    return worker, parts


def here(parts: dict[str, Resident]) -> set[str]:
    """The kinds of which a copy exists; all or nothing of each."""
    found = set()
    for kind, part in parts.items():
        away = [tensor.data_ptr() != home.data_ptr() for tensor, home in zip(part._tensors, part._homes, strict=True)]
        assert len(set(away)) == 1, f"half of {kind} is here"
        if away[0]:
            found.add(kind)
    return found


def decoded(worker: Worker, request: Request, parts: dict[str, Resident]) -> tuple[bytes, dict[str, set[str]]]:
    """The picture, and who was here after each stage's last step."""
    request = complete(request, worker.info)
    name = f"{request.id}/0"
    new: tuple[NewSample, ...] = (NewSample(name, request, 0),)
    after = {}
    for stage in worker.plan(request):
        for index in range(stage.steps):
            result = worker.execute(Step(stage.name, ((name, index),), new)).items[0]
            assert result.error is None, result.error
            new = ()
        after[stage.name] = here(parts)
    worker.free((name,))
    assert result.frames is not None
    return result.frames.data, after


def asked(**options: object) -> Request:
    sampling = SamplingParams(width=32, height=32, num_inference_steps=3, seed=5, max_sequence_length=16)
    return Request("a red circle", sampling, **options)  # type: ignore[arg-type]


def test_a_part_is_there_only_for_its_stages(flux_dev: Path) -> None:
    resident, _ = decoded(worker_of(flux_dev, threads=1, linear_backend="torch"), asked(), {})
    worker, parts = offloading(flux_dev)
    assert here(parts) == set()
    frames, after = decoded(worker, asked(), parts)
    assert frames == resident
    assert after["encode_text"] == {"text_encoder"}
    assert after["prepare_latents"] == after["denoise"] == {"dit"}
    assert after["decode"] == {"vae"}
    assert here(parts) == set(), "nobody has a sample, and something is still there"


def test_the_first_preview_needs_the_vae_too(flux_dev: Path) -> None:
    worker, parts = offloading(flux_dev)
    first, after = decoded(worker, asked(preview_every=3), parts)
    assert after["denoise"] == {"dit", "vae"}
    second, after = decoded(worker, asked(preview_every=3), parts)
    assert after["denoise"] == {"dit"} and first == second


def test_what_does_not_fit_fails_its_request_and_leaves_no_half(flux_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, parts = offloading(flux_dev)
    plain, count = torch.empty_like, 0

    def full(*arguments: object, **options: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments, **options)  # type: ignore[call-overload, no-any-return]

    request = complete(asked(), worker.info)
    name = f"{request.id}/0"
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", full)
        result = worker.execute(Step("encode_text", ((name, 0),), (NewSample(name, request, 0),))).items[0]
    assert result.error is not None and result.error.code == "out_of_memory"  # type: ignore[attr-defined]
    assert here(parts) == set()
    worker.free((name,))
    decoded(worker, asked(), parts)
