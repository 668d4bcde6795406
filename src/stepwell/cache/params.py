"""What a request may ask of the step cache: defaults by method, and what is refused. Without torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from stepwell.cache.masks import PRESETS
from stepwell.config.load import shorten, unknown_name
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.types import CacheParams, ModelInfo

OFF = CacheParams(method="none")
UNBOUNDED = -1  # of `mc`
_COMMON = CacheParams(
    fn=1, bn=0, warmup=4, rdt=0.24, mc=3, taylorseer=False, ts_order=1, scm_preset="none", scm_policy="dynamic"
)  # those of SGLang's documents
DEFAULTS = {
    "none": OFF,
    "dbcache": replace(_COMMON, method="dbcache"),
    "first_block": replace(_COMMON, method="first_block", warmup=0, rdt=0.08, mc=UNBOUNDED),
    "teacache": replace(_COMMON, method="teacache", fn=0, warmup=1, rdt=0.24, mc=UNBOUNDED),
}
MOST_STEPS = 1000  # of a run of a mask, and of the runs
OPTION, FIELD = "cache_dit_", "cache."  # how a field is called as an option, and in a request
logger = logging.getLogger(__name__)


def complete_cache(asked: CacheParams | None, model: ModelInfo) -> CacheParams:
    """The cache of a request with nothing left open. What is left out is the server's own if the method is the same, else
    the method's default. Raises InvalidRequest or Unsupported, naming the field."""
    standing = model.defaults.cache or OFF
    if asked is None:
        return standing
    _check_types(asked)
    method = asked.method or (standing.method if standing.method != "none" else "dbcache")
    _Refusals(FIELD).others("method", method, tuple(DEFAULTS))
    assert method is not None
    base = standing if method == standing.method else DEFAULTS[method]
    given = {f.name: value for f in fields(asked) if (value := getattr(asked, f.name)) is not None}
    completed = replace(base, **{**given, "method": method})
    if method != "none":
        check_cache(completed, model)
    return completed


def defaults_of(options: EngineOptions) -> CacheParams:
    """The step cache of requests that do not choose their own."""
    method = cache_method(options)
    if options.cache_dit_enabled and method == "none":
        logger.warning("cache_dit_enabled does not apply: cache_method is none")
    names = [f.name for f in fields(CacheParams) if f.name != "method"]
    values = {name: getattr(options, OPTION + name) for name in names}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None and value is not False
    }
    if given and method == "none":
        listed = ", ".join(OPTION + name for name in given)
        logger.warning("%s: does not apply, no step cache is on; set cache_dit_enabled or cache_method", listed)
    if "ts_order" in given and "taylorseer" not in given and method != "none":
        logger.warning("%sts_order does not apply: %staylorseer is off", OPTION, OPTION)
    return replace(DEFAULTS[method], **given) if method != "none" else OFF


def cache_method(options: EngineOptions) -> str:
    """The method that these options ask for."""
    return options.cache_method or ("dbcache" if options.cache_dit_enabled else "none")


def cache_of(values: Mapping[str, Any]) -> CacheParams:
    """Parameters from a request's `cache` object. Raises InvalidRequest for a name nobody knows."""
    if not isinstance(values, Mapping):
        raise InvalidRequest(f"cache = {shorten(values)}: must be an object of its parameters", param="cache")
    known = [f.name for f in fields(CacheParams)]
    for name in values:
        if name not in known:
            raise unknown_name(f"{FIELD}{name}", [f"{FIELD}{other}" for other in known], "in the request")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return CacheParams(**given)


def as_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same object by the names of options."""
    return {"cache_method" if name == "method" else OPTION + name: value for name, value in values.items() if value is not None}


def check_cache(cache: CacheParams, model: ModelInfo, prefix: str = FIELD) -> None:
    """Refuse what can't be: complete parameters against a model's own bounds. `prefix` is how fields are called there."""
    refuse = _Refusals(prefix)
    method = "cache_method" if prefix == OPTION else f"{prefix}method"
    if model.blocks == 0:
        raise Unsupported(f"{method} = {cache.method!r}: {model.id} has no blocks to skip", param=method)
    refuse.outside("fn", cache.fn, 0, model.blocks)
    refuse.outside("bn", cache.bn, 0, model.blocks)
    refuse.outside("warmup", cache.warmup, 0, 1000)
    refuse.outside("mc", cache.mc, UNBOUNDED, 1000)
    refuse.outside("ts_order", cache.ts_order, 1, 2)
    refuse.others("scm_preset", cache.scm_preset, ("none", *PRESETS))
    refuse.others("scm_policy", cache.scm_policy, ("dynamic", "static"))
    assert cache.fn is not None and cache.bn is not None and cache.rdt is not None
    if not (math.isfinite(cache.rdt) and cache.rdt >= 0):
        raise refuse.because("rdt", f"= {cache.rdt}: must be 0 (compute every step) or above")
    if cache.fn + cache.bn >= model.blocks:
        has = f"{model.id} has {model.blocks} blocks, and at least one must be left to skip"
        raise refuse.because("fn", f"+ {prefix}bn = {cache.fn} + {cache.bn}: {has}")
    if cache.method == "dbcache" and cache.fn < 1:
        raise refuse.because("fn", "= 0: dbcache decides by what its first blocks do; at least 1")
    fixed = {"first_block": (1, 0), "teacache": (0, 0)}.get(str(cache.method))
    if fixed is not None and (cache.fn, cache.bn) != fixed:
        raise refuse.because("fn", f"and {prefix}bn are {fixed[0]} and {fixed[1]} with {cache.method}; dbcache takes others")
    if cache.method == "teacache" and not model.has_teacache:
        raise Unsupported(f"teacache: nobody has fitted its coefficients to {model.id}; use dbcache or first_block", param=method)
    _check_bins(cache, refuse)


@dataclass(frozen=True, slots=True)
class _Refusals:
    """Errors that call a field what the user calls it."""

    prefix: str

    def because(self, name: str, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self.prefix}{name} {why}", param=f"{self.prefix}{name}")

    def outside(self, name: str, value: int | None, low: int, high: int) -> None:
        assert value is not None
        if not low <= value <= high:
            raise self.because(name, f"= {value}: must be between {low} and {high}")

    def others(self, name: str, value: str | None, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise self.because(name, f"= {value!r}: must be one of {', '.join(allowed)}")


def _check_bins(cache: CacheParams, refuse: _Refusals) -> None:
    compute, cached = cache.scm_compute_bins, cache.scm_cache_bins
    if compute is None and cached is None:
        return
    if compute is None or cached is None:
        raise refuse.because("scm_compute_bins" if compute is None else "scm_cache_bins", "is missing: both bins belong together")
    for name, bins in (("scm_compute_bins", compute), ("scm_cache_bins", cached)):
        if not 1 <= len(bins) <= MOST_STEPS or not all(1 <= steps <= MOST_STEPS for steps in bins):
            raise refuse.because(name, f"= {shorten(list(bins))}: must be numbers of steps, each from 1 to {MOST_STEPS}")
    if len(compute) - len(cached) not in (0, 1):
        raise refuse.because("scm_cache_bins", f"has {len(cached)} bins for {len(compute)} computed ones: as many, or one less")
    assert cache.mc is not None
    if cache.mc != UNBOUNDED and max(cached) > cache.mc:
        raise refuse.because(
            "scm_cache_bins",
            f"= {list(cached)}: {max(cached)} cached steps in a row, {refuse.prefix}mc allows {cache.mc}; raise it",
        )


def _check_types(cache: CacheParams) -> None:
    """Requests come from Python too, where nothing has checked a field's type."""
    for name in ("fn", "bn", "warmup", "mc", "ts_order"):
        value = getattr(cache, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidRequest(f"cache.{name} = {value!r}: must be an integer", param=f"cache.{name}")
    if cache.rdt is not None and (isinstance(cache.rdt, bool) or not isinstance(cache.rdt, int | float)):
        raise InvalidRequest(f"cache.rdt = {cache.rdt!r}: must be a number", param="cache.rdt")
    if cache.taylorseer is not None and not isinstance(cache.taylorseer, bool):
        raise InvalidRequest(f"cache.taylorseer = {cache.taylorseer!r}: must be true or false", param="cache.taylorseer")
    for name in ("scm_compute_bins", "scm_cache_bins"):
        bins = getattr(cache, name)
        if bins is not None and not isinstance(bins, tuple):
            raise InvalidRequest(f"cache.{name} = {bins!r}: must be a list of integers", param=f"cache.{name}")
        if bins is not None and not all(isinstance(b, int) and not isinstance(b, bool) for b in bins):
            raise InvalidRequest(f"cache.{name} = {bins!r}: must be a list of integers", param=f"cache.{name}")
