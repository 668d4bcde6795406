"""An engine over a family's random repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stepwell.engine.local import LocalEngine
from tests.contract.test_contract import opened


@pytest.fixture
def engine(repository: Path) -> Iterator[LocalEngine]:
    made = opened(repository)
    yield made
    made.shut()
