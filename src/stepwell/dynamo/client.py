"""A client that tries again: Dynamo's frontend hands the loss of a worker on to whoever asked."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from stepwell.errors import InvalidRequest, StepwellError, Unavailable

BUSY = frozenset({429, 502, 503, 504, 529})  # another worker, or another moment, may do
LOST = frozenset({500})  # the worker may have died of it, or of something else: once more, and no further
FIRST_WAIT_S, MOST_WAIT_S = 0.1, 2.0


class RetryingClient:
    """Sends JSON to the frontends in turn, until one has a result or `patience_s` is over; one try may take `timeout_s`.

    What a worker makes of a request depends on nothing but the request and its seed, so asking twice does no harm. A request that
    is wrong in itself is not tried again; one for a model nobody knows is, if this client has met it: its last worker may be
    about to come back.
    """

    def __init__(self, frontends: Sequence[str], *, timeout_s: float = 600, patience_s: float = 120):
        """Raises InvalidRequest for what is no list of URLs."""
        wrong = [url for url in frontends if not re.match(r"https?://[^/]", url)]
        if not frontends or isinstance(frontends, str) or wrong:
            raise InvalidRequest(
                f"frontends = {frontends!r:.200}: must be a list of URLs, such as ['http://10.0.0.1:8000']", param="frontends"
            )
        self._frontends = tuple(url.rstrip("/") for url in frontends)
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._met: set[str] = set()  # models
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request that is not streamed. Raises InvalidRequest for one that is refused, Unavailable once patience
        is over, StepwellError for one that fails."""
        deadline, tries, failures = time.monotonic() + self._patience_s, 0, 0
        model = str(body.get("model"))
        while True:
            status, text = self._try(self._frontends[tries % len(self._frontends)] + path, body)
            if status == 200:
                self._met.add(model)
                try:
                    return json.loads(text)
                except ValueError:  # of something between here and the frontend; another try may get past it
                    status = 0
            tries, failures = tries + 1, failures + (status in LOST)
            # a route is not there, and answers nothing, until a worker for it is
            is_early = status == 404 and (not text.strip() or model in self._met)
            if status in BUSY:
                self._met.add(model)
            if not (status in BUSY or status == 0 or is_early or (status in LOST and failures < 2)):
                kind = InvalidRequest if 400 <= status < 500 else StepwellError
                raise kind(f"{path}: {status} {text[:500]}")
            wait_s = random.uniform(0.5, 1) * min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** min(tries, 10))
            if time.monotonic() + wait_s > deadline:
                raise Unavailable(f"{path}: {status or 'no answer'} after {tries} tries: {text[:500]}")
            time.sleep(wait_s)

    def _try(self, url: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """(status, body) of one try; status 0 is no answer at all, and its reason."""
        content = json.dumps(body).encode()
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        try:
            try:
                answer = self._open(request, timeout=self._timeout_s)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}"
