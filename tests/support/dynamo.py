"""Real workers behind a real frontend of Dynamo, for tests that ask them over HTTP."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.cluster import Cluster, until
from stepwell.models import wan
from tests.support.llada2 import text_repository
from tests.support.repositories import wan_repository

IS_INSTALLED = importlib.util.find_spec("dynamo") is not None and importlib.util.find_spec("uvloop") is not None
needs_dynamo = pytest.mark.skipif(not IS_INSTALLED, reason="NVIDIA Dynamo is not installed: make setup-dynamo")
FLUX, WAN, LLADA = "black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "inclusionAI/LLaDA2.0-mini-preview"
FAKE_IMAGE, FAKE_VIDEO = "fake/image", "fake/video"
TEMPLATE = (
    "{% for m in messages %}<role>{{ 'HUMAN' if m['role'] == 'user' else 'ASSISTANT' }}</role>{{ m['content'] }}<|role_end|>"
    "{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
QUICK = ("--threads", "1")


@dataclass(frozen=True, slots=True)
class Deployment:
    """Workers for pictures, videos and text, and the frontend before them."""

    url: str
    cluster: Cluster
    media: Path
    text: Path  # the text model's files, which the frontend does not see where there are mount namespaces

    def post(self, path: str, body: dict[str, Any], timeout: float = 120) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=timeout, trust_env=False)

    def refused(self, path: str, body: dict[str, Any]) -> str:
        """The message of a 400."""
        answer = self.post(path, body)
        assert answer.status_code == 400, answer.text
        return str(answer.json()["message"])


@contextmanager
def deployment(folder: Path) -> Iterator[Deployment]:
    """The bundled model under two names, a random Wan, a random LLaDA2 and models without weights, each by a worker."""
    media, text = folder / "media", text_repository(folder / "text", {"max_position_embeddings": 1024}, template=TEMPLATE)
    video = wan_repository(folder / "wan", dict(wan.T2V_1B.tiny))
    keeps = ("--media-output-fs-url", f"file://{media}")
    with Cluster(env={"OMP_NUM_THREADS": "1"}) as cluster:
        cluster.worker("--image-diffusion-worker", "--served-model-name", FLUX, *keeps, *QUICK)
        cluster.worker("--video-generation-worker", "--model-path", str(video), "--served-model-name", WAN, *keeps, *QUICK)
        speaks = cluster.worker(
            *("--model-path", str(text), "--served-model-name", LLADA, "--dllm-algorithm", "LowConfidence", *QUICK),
            DYN_SELF_HOST_METADATA="1",
        )
        fake_image = ("--model-path", "stepwell/fake-image?step_ms=2", "--served-model-name", FAKE_IMAGE)
        cluster.worker(*fake_image, "--media-output-http-url", "https://cdn.example.com/media", *keeps)
        cluster.worker("--model-path", "stepwell/fake-video?step_ms=2", "--served-model-name", FAKE_VIDEO, *keeps)
        until(lambda: cluster.check() or speaks.health() == 200, 120, "the worker for text")  # type: ignore[func-returns-value]
        url = cluster.frontend(without=text)
        cluster.wait_for(url, FLUX, WAN, LLADA, FAKE_IMAGE, FAKE_VIDEO)
        yield Deployment(url, cluster, media, text)
