"""The process of another rank that the first one has started on its own host.

python -m stepwell.engine.follower RANK SIZE PORT < options.json
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from stepwell.config.load import Place
from stepwell.config.schema import EngineOptions
from stepwell.engine.build import assemble
from stepwell.engine.ranks import follow
from stepwell.errors import StepwellError
from stepwell.parallel.group import Lost

logger = logging.getLogger(__name__)


def main(rank: int, size: int, port: int) -> int:
    """Returns the exit code."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # Ctrl-C is the first rank's to handle, which ends this one
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    options = EngineOptions.model_validate_json(sys.stdin.buffer.read())
    try:
        follow(options, Place(rank, size, rank, size, "127.0.0.1", port, has_store=True), assemble)
    except Lost as error:
        logger.debug("%s", error)  # the first one says what there is to say
    except StepwellError as error:
        logger.error("%s", error.message)
        return 1
    return 0


if __name__ == "__main__":
    code = main(*map(int, sys.argv[1:]))
    logging.shutdown()
    os._exit(code)  # as `engine.process` does
