"""What a request may ask of the step cache: defaults by method, and what is refused. Without torch."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import msgspec

from stepwell.cache.masks import PRESETS
from stepwell.config.load import shorten, unknown_name
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.types import CacheParams, ModelInfo

OFF = CacheParams(method="none")
UNBOUNDED = -1  # of `mc`
MASK = ("scm_preset", "scm_compute_bins", "scm_cache_bins")
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
    if asked is None or asked == CacheParams():
        return standing
    checked = cache_of(asdict(asked))  # Python's callers may have filled in anything
    completed = _over(standing, checked, FIELD)
    check_cache(completed, model, asked=checked)
    return completed


def defaults_of(options: EngineOptions, model: ModelInfo) -> CacheParams:
    """The step cache of requests that do not choose their own: what the options say, over the model's own."""
    own = model.defaults.cache or OFF
    if options.cache_dit_enabled and options.cache_method == "none":
        logger.warning("cache_dit_enabled does not apply: cache_method is none")
    method: str | None = options.cache_method
    if method is None and not options.cache_dit_enabled and (own == OFF or "cache_dit_enabled" in options.model_fields_set):
        method = "none"
    given = {f.name: getattr(options, OPTION + f.name) for f in fields(CacheParams) if f.name != "method"}
    said = {name: value for name, value in given.items() if OPTION + name in options.model_fields_set}
    asked = cache_of({**said, "method": method})
    completed = _over(own, asked, OPTION)
    check_cache(completed, model, OPTION, asked)
    return completed


def cache_of(values: Any) -> CacheParams:
    """Parameters from a `cache` object. Raises InvalidRequest for a name nobody knows, or a value of another type."""
    if not isinstance(values, Mapping):
        raise InvalidRequest(f"cache = {shorten(values)}: must be an object of its parameters", param="cache")
    known = [f.name for f in fields(CacheParams)]
    for name in values:
        if name not in known:
            raise unknown_name(f"{FIELD}{name}", [f"{FIELD}{other}" for other in known], "in the request")
    try:
        return msgspec.convert(dict(values), CacheParams)
    except msgspec.ValidationError as error:  # "Expected `int | null`, got `str` - at `$.fn`"
        what, _, place = str(error).replace(" | null", "").partition(" - at `$.")
        name = re.split(r"\W", place)[0]
        raise _Refusals(FIELD).because(name, f"= {shorten(values[name])}: {what[0].lower()}{what[1:]}") from None


def _over(standing: CacheParams, asked: CacheParams, prefix: str) -> CacheParams:
    """`asked`, completed by what stands if the method is the same, else by the method's defaults; one mask replaces another.
    Says what was asked for and changes nothing; `prefix` is how fields are called there."""
    method = asked.method if asked.method is not None else standing.method if standing.method != "none" else "dbcache"
    _Refusals(prefix).others("method", method, tuple(DEFAULTS))
    assert method is not None
    base = standing if method == standing.method else DEFAULTS[method]
    given = {name: value for name, value in asdict(asked).items() if value is not None and name != "method"}
    differs = [name for name, value in given.items() if value is not False and value != getattr(base, name)]
    if method == "none":
        if differs:
            switch = "cache_dit_enabled or cache_method" if prefix == OPTION else "another cache.method"
            listed = ", ".join(prefix + name for name in differs)
            logger.warning("%s: does not apply, no step cache is on; set %s", listed, switch)
        return OFF
    if not given.keys().isdisjoint(MASK):
        base = replace(base, scm_preset="none", scm_compute_bins=None, scm_cache_bins=None)
    made = replace(base, **{**given, "method": method})
    if "ts_order" in differs and not made.taylorseer:
        logger.warning("%sts_order does not apply: %staylorseer is off", prefix, prefix)
    if "scm_policy" in differs and made.scm_preset == "none" and made.scm_compute_bins is None:
        logger.warning("%sscm_policy does not apply: there is no mask; give %sscm_preset, or bins", prefix, prefix)
    return made


def as_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same object by the names of options."""
    return {"cache_method" if name == "method" else OPTION + name: value for name, value in values.items() if value is not None}


def check_cache(cache: CacheParams, model: ModelInfo, prefix: str = FIELD, asked: CacheParams = OFF) -> None:
    """Refuse what can't be: complete parameters, made from those `asked` for, against a model's own bounds."""
    if cache.method == "none":
        return
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
    _check_bins(cache, refuse, asked)


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


def _check_bins(cache: CacheParams, refuse: _Refusals, asked: CacheParams) -> None:
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
    if cache.scm_preset not in (None, "none"):
        raise refuse.because("scm_preset", f"= {cache.scm_preset!r}: bins are given too; give one of them")
    assert cache.mc is not None
    if cache.mc != UNBOUNDED and max(cached) > cache.mc:
        run = f"{max(cached)} cached steps in a row"
        if asked.scm_cache_bins is None:
            stands = f"{refuse.prefix}scm_cache_bins stands at {list(cached)}, {run}"
            raise refuse.because("mc", f"= {cache.mc}: {stands}; raise mc, or give another mask")
        raise refuse.because("scm_cache_bins", f"= {list(cached)}: {run}, {refuse.prefix}mc allows {cache.mc}; raise it")
