"""The engine's own process: a core loop that takes commands from a socket and reports to another.

    python -m stepwell.engine.process COMMANDS REPORTS PARENT

The two are ZeroMQ addresses of the parent, in a folder only its user may enter. The process ends when it is told to, or
when its parent, which it is told the number of, is gone: it may be gone before this process has begun.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import zmq

from stepwell.config.hardware import host_memory
from stepwell.config.schema import EngineOptions
from stepwell.config.sequence import check_ranks
from stepwell.engine.api import EngineInfo, Queue, Stats
from stepwell.engine.core import EngineCore
from stepwell.engine.fake import FAKES, fake_worker
from stepwell.engine.fleet import fleet
from stepwell.engine.steps import StepExecutor
from stepwell.engine.warmup import warm_up
from stepwell.engine.wire import Abort, Command, Open, Opened, Order, Pulse, Refusal, Report, Shut, Submit, pack, unpack
from stepwell.errors import InvalidRequest, StepwellError
from stepwell.types import replace

PULSE_S = 0.5
LAST_WORDS_S = 0.1  # until ZeroMQ's own thread has sent them


class Outbox:
    """Sends reports from any thread, in order, without ever blocking who reports."""

    def __init__(self, socket: zmq.Socket[bytes]):
        self._socket = socket
        self._waiting: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stepwell-outbox", daemon=True)
        self._thread.start()

    def put(self, report: Report) -> None:
        self._waiting.put(report)

    def flush(self) -> None:
        """Send what is waiting; nothing may be put after."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (report := self._waiting.get()) is not None:
            self._socket.send(pack(report))


def build(options: EngineOptions) -> StepExecutor:
    """The worker, or workers, these options ask for."""
    if all(path.split("?")[0] in FAKES for path in options.model_paths):
        if options.profile:
            raise InvalidRequest("profile = True: a fake model computes nothing that could be traced", param="profile")
        if options.num_gpus > 1:
            raise InvalidRequest(f"num_gpus = {options.num_gpus}: a fake model computes nothing to share", param="num_gpus")
        check_ranks(options)
        worker = fleet([fake_worker(path) for path in options.model_paths])
        warm_up(worker, options.warmup_sizes)
        return worker
    from stepwell.engine.build import build_worker

    return build_worker(options)


def main(commands_address: str, reports_address: str, parent: int) -> None:
    faulthandler.enable()  # a watchdog's SIGABRT then prints where every thread is
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("stepwell.profiling").setLevel(logging.INFO)
    context = zmq.Context()
    commands: zmq.Socket[bytes] = context.socket(zmq.PULL)
    commands.connect(commands_address)
    reports: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    reports.connect(reports_address)
    outbox = Outbox(reports)
    pulse: Callable[[], tuple[float, float | None]] = lambda: (0.0, None)  # noqa: E731  (replaced once there is a core)
    beat = Heart(outbox, pulse, parent, [commands_address, reports_address])
    beat.start()
    first = unpack(commands.recv())
    assert isinstance(first, Open)
    options = EngineOptions.model_validate_json(first.options)
    try:
        worker = build(options)
    except StepwellError as error:
        outbox.put(Refusal.of(error))
        outbox.flush()
        return
    core = EngineCore(
        worker,
        options.max_running_samples,
        options.max_queued_samples,
        options.max_queue_seconds,
        options.scheduling_policy,
    )
    beat.read = core.pace.overdue
    outbox.put(Opened(EngineInfo(worker.models, worker.choices)))
    threading.Thread(target=take_commands, args=(commands, core, outbox), name="stepwell-commands", daemon=True).start()
    core.run(when_broken=lambda: os._exit(1))  # it is replaced, and its requests run again
    outbox.flush()
    logging.shutdown()
    time.sleep(LAST_WORDS_S)
    os._exit(0)  # nothing is left to do, and the interpreter takes seconds to tidy up after torch


class Heart(threading.Thread):
    """Tells the parent twice a second that this process lives, and ends it when the parent does not."""

    def __init__(self, outbox: Outbox, read: Callable[[], tuple[float, float | None]], parent: int, addresses: Sequence[str]):
        super().__init__(name="stepwell-heart", daemon=True)
        self._outbox = outbox
        self.read = read
        self._parent = parent
        self._sockets = [Path(address.removeprefix("ipc://")) for address in addresses]

    def run(self) -> None:
        while os.getppid() == self._parent:
            self._outbox.put(Pulse(*self.read()))
            time.sleep(PULSE_S)
        with suppress(OSError):  # nobody else is left to tidy up
            for path in self._sockets:
                path.unlink(missing_ok=True)
            self._sockets[0].parent.rmdir()
        os._exit(1)


def take_commands(commands: zmq.Socket[bytes], core: EngineCore, outbox: Outbox) -> None:
    """Hand every command to the core until told to shut."""
    while True:
        command = unpack(commands.recv())
        if isinstance(command, Shut):
            core.close()
            return
        try:
            _take(command, core, outbox)
        except StepwellError as error:
            outbox.put(Refusal.of(error, command.request.id if isinstance(command, Submit) else None))


def _take(command: Command | Order | Report, core: EngineCore, outbox: Outbox) -> None:
    if isinstance(command, Submit):
        request = command.request
        answer = core.submit(request, outbox.put)

        def tell_refusal() -> None:
            error = answer.exception()
            if error is not None:
                known = error if isinstance(error, StepwellError) else StepwellError(str(error))
                outbox.put(Refusal.of(known, request.id))

        answer.add_done_callback(lambda _: tell_refusal())
    elif isinstance(command, Abort):
        core.abort(command.request_id)
    elif isinstance(command, Stats):
        outbox.put(replace(core.stats(), memory_bytes=host_memory().resident_bytes))
    elif isinstance(command, Queue):
        outbox.put(core.queue())
    else:
        raise AssertionError(command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
