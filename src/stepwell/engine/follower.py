"""The process of another rank that the first one has started on its own host.

python -m stepwell.engine.follower RANK SIZE PORT PARENT < options.json

It ends with its parent, which it is told the number of, whatever either is doing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from stepwell.config.load import Place
from stepwell.config.schema import EngineOptions
from stepwell.engine.build import assemble
from stepwell.engine.ranks import follow
from stepwell.errors import StepwellError
from stepwell.parallel.group import Lost

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK_S = 0.5  # between looks whether the parent lives


def main(rank: int, size: int, port: int, parent: int) -> int:
    """Returns the exit code."""
    _end_with(parent)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the first rank says when it is over
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


def _end_with(parent: int) -> None:
    """Have the system kill this process once its parent is gone; where it can't, a thread looks."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    with suppress(OSError, AttributeError):  # no such call
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even if it is stopped, or hangs holding the interpreter
    threading.Thread(target=look, name="stepwell-heart", daemon=True).start()


if __name__ == "__main__":
    code = main(*map(int, sys.argv[1:]))
    logging.shutdown()
    os._exit(code)  # as `engine.process` does
