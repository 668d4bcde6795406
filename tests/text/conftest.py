"""A server of a random text model that speaks bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stepwell.config.schema import EngineOptions
from stepwell.generator import open_engine
from tests.support.llada2 import text_repository
from tests.support.sdk import KINDS, Sdk
from tests.support.server import Running, running


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Served as "writer"; 1024 tokens of context, and 24 of text where nothing is said."""
    path = text_repository(tmp_path_factory.mktemp("writer"), {"max_position_embeddings": 1024, "max_new_tokens": 24})
    options = EngineOptions(model_path=str(path), threads=1)
    with running(open_engine(options), tmp_path_factory.mktemp("data"), options, served_model_name="writer") as made:
        yield made


@pytest.fixture(params=KINDS)
def sdk(request: pytest.FixtureRequest, writer: Running) -> Sdk:
    return Sdk(request.param, f"{writer.url}/v1")


@pytest.fixture
def one(writer: Running) -> Sdk:
    """For what does not depend on which of the two clients asks."""
    return Sdk("sync", f"{writer.url}/v1")
