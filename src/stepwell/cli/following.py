"""Commands that torchrun has started: the first rank serves, the others follow it."""

from __future__ import annotations

import signal

from stepwell.cli.flags import quiet_threads
from stepwell.config.load import torchrun_place
from stepwell.config.schema import EngineOptions


def follows(options: EngineOptions) -> bool:
    """Whether this process is another rank of one model than the first. It has done its part by then."""
    place = torchrun_place()
    if place is None or place.rank == 0:
        return False
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # the first rank finishes what is running, and then says that it is over
    quiet_threads()
    from stepwell.engine.build import assemble
    from stepwell.engine.ranks import follow_on, ranked

    follow_on(ranked(options, place), place, assemble)
    return True
