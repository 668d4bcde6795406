"""Every way Stepwell says no. Each error knows how it looks over HTTP, so no frontend needs a table of its own."""

from __future__ import annotations


class StepwellError(Exception):
    """Base of all errors meant for a user: the message says what was wrong, with which value, and what would be right.

    `param` names the field, flag or file at fault; `code` is stable and machine-readable; `retry_after_s` is when
    the same could succeed, where that is known.
    """

    status = 500
    kind = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(StepwellError):
    """A request, option or file value that is wrong in itself."""

    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"


class Unsupported(InvalidRequest):
    """A valid wish this build, model or machine can't fulfil; the message gives the reason."""

    code = "unsupported"


class ModelNotFound(StepwellError):
    """No such model: folder, bundled id, hub id, or name served."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class WeightsError(StepwellError):
    """A repository that can't be loaded: truncated, pickled, or with the wrong set of tensors."""

    status = 400
    kind = "invalid_request_error"
    code = "bad_weights"


class Aborted(StepwellError):
    """The request was aborted by its owner."""

    status = 400
    kind = "invalid_request_error"
    code = "aborted"


class QueueFull(StepwellError):
    """The bounded queue has no room; try again later."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class OutOfMemory(StepwellError):
    """A step of this request did not fit into the device's memory."""

    code = "out_of_memory"


class StepFailed(StepwellError):
    """A step of this request raised; the request is over, others go on."""

    code = "step_failed"


class EngineClosed(StepwellError):
    """The engine is closing or closed and takes no requests."""

    status = 503
    code = "engine_closed"


class WorkerLost(StepwellError):
    """The engine's process died, or hung, with this request under way, and did so again before more of it was saved."""

    code = "worker_lost"


class Unavailable(StepwellError):
    """The server is loading, draining, or restarting its engine; try again later."""

    status = 503
    code = "unavailable"


class Asleep(Unavailable):
    """The engine has let go of its model until somebody wakes it."""

    code = "asleep"

    def __init__(
        self,
        message: str = "the engine is asleep; POST /v1/wake, or DiffGenerator.wake(), brings it back",
        *,
        param: str | None = None,
        retry_after_s: float | None = 10,
    ):
        super().__init__(message, param=param, retry_after_s=retry_after_s)


_BY_CODE: dict[str, type[StepwellError]] = {
    kind.code: kind
    for kind in (
        *(InvalidRequest, Unsupported, ModelNotFound, WeightsError, Aborted, QueueFull, OutOfMemory, EngineClosed),
        *(WorkerLost, Unavailable, Asleep),
    )
}


def by_code(code: str, message: str, param: str | None, retry_after_s: float | None = None) -> StepwellError:
    """The error a `Failed` event carries, as an exception again."""
    return _BY_CODE.get(code, StepFailed)(message, param=param, retry_after_s=retry_after_s)
