"""Shared fixtures: one thread, so that results are bit-identical and timings do not fight; random repositories."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

# whom to trust: one certificate that nobody has the key of, as reading everybody's takes each HTTP client 23 ms
os.environ["SSL_CERT_FILE"] = str(Path(__file__).parent / "support" / "nobody.pem")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its own library of functions asks too

from stepwell import DiffGenerator
from tests.support.dynamo import Deployment, deployment
from tests.support.families import FAMILIES, Family


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.spec.name)
def family(request: pytest.FixtureRequest) -> Family:
    """Every model of the project, from its spec's tiny config."""
    found: Family = request.param
    return found


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random repository per family, made on first use."""
    return {f.spec.name: f.write(tmp_path_factory.mktemp(f.spec.name), {}) for f in FAMILIES}


@pytest.fixture(scope="session")
def repository(family: Family, repositories: dict[str, Path]) -> Path:
    return repositories[family.spec.name]


@pytest.fixture(scope="session")
def flux_dev(repositories: dict[str, Path]) -> Path:
    return repositories["flux.1-dev"]


@pytest.fixture(scope="session")
def tiny() -> Iterator[DiffGenerator]:
    """The bundled model, loaded once."""
    with DiffGenerator.from_pretrained("stepwell/tiny-flux", threads=1) as generator:
        yield generator


@pytest.fixture(scope="session")
def dynamo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Workers behind Dynamo's frontend; tests that ask for it are marked `needs_dynamo`."""
    with deployment(tmp_path_factory.mktemp("dynamo")) as made:
        yield made
