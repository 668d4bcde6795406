"""The step cache through every door: flags, environment, the API's `cache` object, Python; and what is refused."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image
from safetensors.torch import load_file, save_file

from stepwell import DiffGenerator
from stepwell.cache.masks import preset_mask
from stepwell.cache.params import DEFAULTS
from stepwell.cli.main import main
from stepwell.errors import InvalidRequest, WeightsError
from stepwell.media.images import read_parameters
from stepwell.types import CacheParams, replace
from tests.support.server import serving

SMALL = {"width": 64, "height": 64, "num_inference_steps": 12, "seed": 4}
FAST = {"method": "dbcache", "warmup": 2, "rdt": 0.5, "taylorseer": True}


def test_python(tiny: DiffGenerator) -> None:
    (plain,) = tiny.generate("a red star", **SMALL)
    (cached,) = tiny.generate("a red star", **SMALL, cache=FAST)
    (exact,) = tiny.generate("a red star", **SMALL, cache={**FAST, "rdt": 0})
    assert plain.cache is None
    assert cached.cache is not None and cached.cache.computed_ratio < 0.8
    assert len(cached.cache.computed_steps) == len(cached.cache.residuals) == 12
    assert exact.cache is not None and exact.cache.computed_ratio == 1.0
    assert (exact.frames == plain.frames).all() and (cached.frames != plain.frames).any()


def test_a_repeated_request_makes_the_same_picture(tiny: DiffGenerator) -> None:
    """Nothing of one request's cache is left to the next."""
    first, second = (tiny.generate("a red star", **SMALL, cache=FAST)[0] for _ in range(2))
    assert (first.frames == second.frames).all() and first.cache == second.cache


def generated(folder: Path, *extra: str) -> Path:
    before = set(folder.glob("outputs/*.png"))
    flags = ["--width", "64", "--height", "64", "--num-inference-steps", "12", "--seed", "4", "--threads", "1"]
    assert main(["generate", "--prompt", "a red star", *flags, *extra]) == 0
    (made,) = set(folder.glob("outputs/*.png")) - before
    return made


def test_flags_environment_and_repeating_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_flag = generated(tmp_path, "--cache-dit-enabled", "--cache-dit-warmup", "2", "--cache-dit-rdt", "0.5")
    for name, value in (("ENABLED", "true"), ("WARMUP", "2"), ("RDT", "0.5")):
        monkeypatch.setenv(f"SGLANG_CACHE_DIT_{name}", value)
    by_environment = generated(tmp_path)
    for name in ("ENABLED", "WARMUP", "RDT"):
        monkeypatch.delenv(f"SGLANG_CACHE_DIT_{name}")
    parameters = read_parameters(by_flag)
    assert parameters["cache_method"] == "dbcache" and parameters["cache_dit_rdt"] == 0.5
    repeated = generated(tmp_path, "--from", str(by_flag))
    plain = generated(tmp_path)
    assert by_flag.read_bytes() == by_environment.read_bytes() == repeated.read_bytes() != plain.read_bytes()


def test_another_method_takes_nothing_of_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a picture was made with, such as teacache's fn of 0, is no other method's."""
    monkeypatch.chdir(tmp_path)
    first = generated(tmp_path, "--cache-method", "teacache", "--cache-dit-rdt", "0.9")
    for flags, method in ((["--cache-method", "dbcache"], "dbcache"), (["--cache-dit-enabled"], "dbcache")):
        parameters = read_parameters(generated(tmp_path, "--from", str(first), *flags))
        assert (parameters["cache_method"], parameters["cache_dit_fn"], parameters["cache_dit_rdt"]) == (method, 1, 0.24)
    kept = read_parameters(generated(tmp_path, "--from", str(first), "--cache-method", "teacache", "--cache-dit-mc", "7"))
    assert (kept["cache_dit_rdt"], kept["cache_dit_mc"]) == (0.9, 7)


@pytest.mark.parametrize("flags", [["--cache-method", "none"], ["--no-cache-dit-enabled"]])
def test_a_picture_can_be_repeated_without_its_cache(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = generated(tmp_path, "--cache-dit-enabled", "--cache-dit-warmup", "2", "--cache-dit-rdt", "0.5")
    without = generated(tmp_path, "--from", str(cached), *flags)
    assert without.read_bytes() == generated(tmp_path).read_bytes() and "not apply" not in caplog.text


def test_a_picture_made_without_a_cache_is_repeated_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = generated(tmp_path)
    assert read_parameters(plain)["cache_method"] == "none"
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", "true")
    assert generated(tmp_path, "--from", str(plain)).read_bytes() == plain.read_bytes()
    assert "cache_dit_enabled does not apply: cache_method is none" in caplog.text
    cached = generated(tmp_path, "--from", str(plain), "--cache-dit-enabled", "--cache-dit-warmup", "2")
    assert read_parameters(cached)["cache_method"] == "dbcache"


@pytest.fixture(scope="module")
def client(tiny: DiffGenerator) -> Iterator[OpenAI]:
    with serving(tiny._engine, "stepwell/tiny-flux") as url:
        yield OpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0)


def ask(client: OpenAI, cache: Any) -> Any:
    body = {"num_inference_steps": 12, "seed": 4, **({} if cache is None else {"cache": cache})}
    answer = client.images.generate(prompt="a red star", size="64x64", response_format="b64_json", extra_body=body)
    assert answer.data is not None
    return answer.data[0]


def test_api(client: OpenAI) -> None:
    plain, cached, repeated = ask(client, None), ask(client, FAST), ask(client, FAST)
    assert plain.cache is None
    assert set(cached.cache) == {"computed_ratio", "steps", "residuals"}
    assert len(cached.cache["steps"]) == 12 and cached.cache["steps"].startswith("11") and "0" in cached.cache["steps"]
    assert 0 < cached.cache["computed_ratio"] < 1
    assert cached.b64_json == repeated.b64_json != plain.b64_json
    assert base64.b64decode(cached.b64_json)[:4] == b"\x89PNG"
    assert ask(client, {"method": "none"}).b64_json == plain.b64_json
    assert "0" in ask(client, {"scm_preset": "fast", "scm_policy": "static"}).cache["steps"]
    assert ask(client, {"method": "teacache"}).cache["steps"][-1] == "1"


BINS: dict[str, Any] = {"scm_compute_bins": [4, 1], "scm_cache_bins": [2, 1]}


def edited(client: OpenAI, data: dict[str, Any]) -> httpx.Response:
    """A picture made from another, asked for by a form."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    form = {"prompt": "a star", "seed": "4", "num_inference_steps": "12", "response_format": "b64_json", **data}
    return httpx.post(f"{client.base_url}images/edits", data=form, files={"image": picture.getvalue()}, timeout=60)


@pytest.mark.parametrize("form", [
    {"cache": json.dumps(BINS)},
    {"cache[scm_compute_bins]": "4,1", "cache[scm_cache_bins]": "2, 1"},
    {"cache[scm_compute_bins]": "[4, 1]", "cache[scm_cache_bins]": " [2,1]"},
    {"cache[scm_compute_bins][]": ["4", "1"], "cache[scm_cache_bins][]": ["2", "1"]},
    {"cache[scm_compute_bins][]": "4,1", "cache[scm_cache_bins]": "2,1"},
])  # fmt: skip
def test_lists_in_forms(client: OpenAI, form: dict[str, Any]) -> None:
    answer = edited(client, {**form, "cache[scm_policy]": "static"} if "cache" not in form else
                    {"cache": json.dumps({**BINS, "scm_policy": "static"})})  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["cache"]["steps"] == "11110010"  # of 12 steps, a strength of 0.6 leaves 8


def test_lists_in_the_forms_of_the_sdk(client: OpenAI) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    extra = {"num_inference_steps": 12, "seed": 4, "cache": {**BINS, "scm_policy": "static"}}
    answer = client.images.edit(
        image=("start.png", picture.getvalue()), prompt="a star", response_format="b64_json", extra_body=extra
    )
    assert answer.data is not None and answer.data[0].cache["steps"] == "11110010"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("form", "words"), [
    ({"cache[scm_compute_bins]": "4,x", "cache[scm_cache_bins]": "1"}, "cache.scm_compute_bins[1] = 'x'"),
    ({"cache[scm_compute_bins]": "", "cache[scm_cache_bins]": "1"}, "cache.scm_compute_bins[0] = ''"),
    ({"cache[scm_compute_bins]": "[4", "cache[scm_cache_bins]": "1"}, "cache[scm_compute_bins] is not JSON"),
    ({"cache[scm_compute_bins]": "4", "cache[scm_compute_bins][]": "1"}, "cache is given twice"),
    ({"cache": '{"rdt": 0.1}', "cache[rdt]": "0.2"}, "cache is given twice"),
    ({"cache[rdt][]": ["0.1", "0.2"]}, "unknown name 'cache[rdt][]'"),
    ({"seed[]": ["1", "2"]}, "unknown name 'seed[]'"),
])  # fmt: skip
def test_forms_that_are_refused(client: OpenAI, form: dict[str, Any], words: str) -> None:
    answer = edited(client, form)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(("cache", "words"), [
    ({"method": "dbcash"}, "cache.method = 'dbcash'"),
    ({"method": "dbcache", "fn": 6}, "cache.fn + cache.bn = 6 + 0: stepwell/tiny-flux has 6 blocks"),
    ({"fn": 0}, "cache.fn = 0"),
    ({"fn": 1, "bn": -1}, "cache.bn = -1: must be between 0 and 6"),
    ({"rdt": -0.1}, "cache.rdt = -0.1"),
    ({"rdt": "much"}, "cache.rdt = 'much'"),
    ({"mc": -2}, "cache.mc = -2"),
    ({"ts_order": 3}, "cache.ts_order = 3: must be between 1 and 2"),
    ({"scm_preset": "warp"}, "cache.scm_preset = 'warp'"),
    ({"scm_compute_bins": [2, 2]}, "cache.scm_cache_bins is missing"),
    ({"scm_compute_bins": [2, 0], "scm_cache_bins": [1]}, "cache.scm_compute_bins = [2, 0]"),
    ({"scm_compute_bins": [2], "scm_cache_bins": [4]}, "4 cached steps in a row, cache.mc allows 3"),
    ({"scm_compute_bins": [2, 2, 2], "scm_cache_bins": [1]}, "cache.scm_cache_bins has 1 bins for 3"),
    ({"scm_compute_bins": [10**12], "scm_cache_bins": [1]}, "each from 1 to 1000"),
    ({"mc": -1, "scm_compute_bins": [1], "scm_cache_bins": [10**20]}, "cache.scm_cache_bins"),
    ({"method": "first_block", "fn": 2}, "cache.fn and cache.bn are 1 and 0 with first_block"),
    ({"method": "teacache", "fn": 1}, "cache.fn and cache.bn are 0 and 0 with teacache"),
    ({"rtd": 0.2}, "did you mean 'cache.rdt'"),
    ({"scm_preset": "fast", "scm_compute_bins": [2], "scm_cache_bins": [1]}, "cache.scm_preset = 'fast': bins are given too"),
    ({"method": ""}, "cache.method = ''"),
    (7, "cache = 7"),
])  # fmt: skip
def test_the_api_refuses(client: OpenAI, cache: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, cache)
    assert words in refused.value.message and refused.value.param is not None and "cache" in refused.value.param


@pytest.mark.parametrize(("cache", "words"), [
    ({"rdt": float("nan")}, "cache.rdt = nan"),
    ({"rdt": True}, "cache.rdt = True: expected `float`, got `bool`"),
    ({"rdt": 10**400}, "cache.rdt = 1000"),
    ({"fn": 1.5}, "cache.fn = 1.5: expected `int`, got `float`"),
    (CacheParams(fn="2"), "cache.fn = '2': expected `int`, got `str`"),  # type: ignore[arg-type]
    ({"taylorseer": "yes"}, "cache.taylorseer = 'yes'"),
    ({"method": ""}, "cache.method = '': must be one of none, dbcache"),
    ([], "cache = []: must be an object"),
    ({"scm_compute_bins": ["2"], "scm_cache_bins": [1]}, "cache.scm_compute_bins"),
    ({"order": 2}, "unknown name 'cache.order'"),
    ({"scm_compute_bins": 5, "scm_cache_bins": 5}, "cache.scm_compute_bins = 5: expected `array`, got `int`"),
    ("dbcache", "cache = 'dbcache': must be an object"),
])  # fmt: skip
def test_python_refuses(tiny: DiffGenerator, cache: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        tiny.generate("x", **SMALL, cache=cache)
    assert words in refused.value.message


@pytest.mark.parametrize(("flags", "words"), [
    (["--cache-dit-enabled", "--cache-dit-fn", "9"], "cache_dit_fn = 9: must be between 0 and 6"),
    (["--cache-dit-enabled", "--cache-dit-scm-compute-bins", "8,3"], "cache_dit_scm_cache_bins is missing"),
    (["--cache-dit-enabled", "--cache-dit-scm-compute-bins", "8,x", "--cache-dit-scm-cache-bins", "1"],
     "cache_dit_scm_compute_bins"),
    (["--cache-dit-enabled", "--cache-dit-scm-preset", "slow", "--cache-dit-scm-compute-bins", "2", "--cache-dit-scm-cache-bins",
      "1"], "cache_dit_scm_preset = 'slow': bins are given too"),
    (["--cache-method", "magic"], "cache_method = 'magic'"),
])  # fmt: skip
def test_the_command_line_refuses(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "x", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_server_with_a_cache_and_requests_of_their_own(flux_dev: Path) -> None:
    options = {"cache_method": "dbcache", "cache_dit_warmup": 1, "cache_dit_rdt": 0.9, "cache_dit_bn": 1, "threads": 1}
    asked = {**SMALL, "num_inference_steps": 8, "max_sequence_length": 16}
    with DiffGenerator.from_pretrained(str(flux_dev), **options) as g:
        standing, own, off = (g.generate("x", **asked, cache=cache)[0] for cache in (None, {"rdt": 0}, {"method": "none"}))
        other = g.generate("x", **asked, cache={"method": "first_block"})[0]
    assert standing.cache is not None and standing.cache.computed_ratio < 1
    assert own.cache is not None and own.cache.computed_ratio == 1.0, "the request's threshold, the server's warm-up"
    assert off.cache is None and (off.frames == own.frames).all()
    assert other.cache is not None and not any(step is None for step in other.cache.residuals[1:])


def test_one_mask_replaces_another(flux_dev: Path) -> None:
    """A server that stands on bins, and requests that say something else of which steps are computed."""
    options = {"cache_method": "dbcache", "cache_dit_warmup": 0, "cache_dit_rdt": 0.9, "cache_dit_mc": 4, "threads": 1}
    bins = {"cache_dit_scm_compute_bins": [1, 1], "cache_dit_scm_cache_bins": [2, 2], "cache_dit_scm_policy": "static"}
    with DiffGenerator.from_pretrained(str(flux_dev), **options, **bins) as g:

        def steps(cache: Any) -> str:
            (made,) = g.generate("x", **SMALL, max_sequence_length=16, cache=cache)
            assert made.cache is not None
            return "".join("01"[computed] for computed in made.cache.computed_steps)

        assert steps(None) == steps({}) == steps({"warmup": 1}) == "100100100100"
        assert steps({"scm_preset": "none", "mc": 1}) == "101010101010"
        assert steps({"scm_preset": "slow"}) == "".join("01"[computed] for computed in preset_mask("slow", 12, 4))
        assert steps({"scm_compute_bins": [3], "scm_cache_bins": [1]}) == "111011101110"
        for cache, words in (
            ({"mc": 0}, "cache.mc = 0: cache.scm_cache_bins stands at [2, 2], 2 cached steps in a row"),
            ({"scm_compute_bins": [3]}, "cache.scm_cache_bins is missing"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                g.generate("x", **SMALL, cache=cache)
            assert words in refused.value.message and refused.value.param is not None
            assert refused.value.param.split(".")[1] in words.split(" ")[0]


@pytest.mark.parametrize(("cache", "words"), [
    ({"ts_order": 2}, "cache.ts_order does not apply: cache.taylorseer is off"),
    ({"scm_policy": "static"}, "cache.scm_policy does not apply: there is no mask"),
    ({"method": "none", "rdt": -5, "mc": 2}, "cache.rdt, cache.mc: does not apply, no step cache is on"),
    ({"ts_order": 2, "taylorseer": True, "scm_policy": "static", "scm_preset": "slow"}, ""),
    ({"method": "none"}, ""),
])  # fmt: skip
def test_what_changes_nothing_is_said(tiny: DiffGenerator, cache: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny.generate("x", **{**SMALL, "num_inference_steps": 2}, cache=cache)
    assert words in caplog.text and ("not apply" in caplog.text) == bool(words)


def test_first_blocks_that_add_nothing(tmp_path: Path, flux_dev: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing divided by nothing tells no step from another: all are computed, and it is said once for each picture."""
    shutil.copytree(flux_dev, tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    weights = load_file(file)
    for name in (
        f"transformer_blocks.0.{norm}.linear.{kind}" for norm in ("norm1", "norm1_context") for kind in ("weight", "bias")
    ):
        weights[name].zero_()  # its gates
    save_file(weights, file)
    with DiffGenerator.from_pretrained(str(tmp_path / "model"), threads=1) as g:
        (made,) = g.generate("x", **SMALL, max_sequence_length=16, cache={"method": "first_block", "rdt": 0.9})
        assert made.cache is not None and made.cache.computed_ratio == 1
        assert caplog.text.count("the first 1 of the blocks add nothing") == 1
        (made,) = g.generate("x", **SMALL, max_sequence_length=16, cache={"fn": 2, "rdt": 0.9})
        assert made.cache is not None and made.cache.computed_ratio < 1


def test_a_checkpoint_s_own_cache(tmp_path: Path, flux_dev: Path) -> None:
    """generation_config.json stands below the options, and they below the request."""
    own = tmp_path / "model"
    shutil.copytree(flux_dev, own)
    config = own / "generation_config.json"
    config.write_text(json.dumps({"cache": {"method": "dbcache", "warmup": 1, "rdt": 0.0}}))

    def standing(**options: Any) -> CacheParams:
        with DiffGenerator.from_pretrained(str(own), threads=1, **options) as g:
            made = g.generate("x", **{**SMALL, "num_inference_steps": 2}, max_sequence_length=16)[0]
            assert made.parameters.cache is not None
            return made.parameters.cache

    assert standing() == replace(DEFAULTS["dbcache"], warmup=1, rdt=0.0)
    assert standing(cache_dit_rdt=0.5) == replace(DEFAULTS["dbcache"], warmup=1, rdt=0.5)
    assert standing(cache_method="first_block") == DEFAULTS["first_block"]
    assert standing(cache_method="none") == standing(cache_dit_enabled=False) == CacheParams("none")
    for cache, words in (({"rtd": 1}, "unknown name 'cache.rtd'"), ({"fn": 99}, "cache.fn = 99"), (3, "cache = 3")):
        config.write_text(json.dumps({"cache": cache}))
        with pytest.raises(WeightsError, match=f"generation_config.json: .*{words}"):
            standing()


def test_from_a_picture_with_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", "true")
    plain = generated(tmp_path, "--cache-method", "none")
    masked = generated(tmp_path, "--cache-dit-scm-compute-bins", "2", "--cache-dit-scm-cache-bins", "2")

    def repeated(picture: Path, *extra: str) -> dict[str, Any]:
        return read_parameters(generated(tmp_path, "--from", str(picture), *extra))

    assert repeated(plain) == read_parameters(plain) == {**read_parameters(plain), "cache_method": "none"}
    assert repeated(plain, "--cache-dit-enabled")["cache_method"] == "dbcache"
    teacache = generated(tmp_path, "--from", str(masked), "--cache-method", "teacache")
    assert read_parameters(teacache)["cache_dit_fn"] == 0 and "cache_dit_scm_cache_bins" not in read_parameters(teacache)
    assert repeated(teacache, "--cache-method", "dbcache")["cache_dit_fn"] == 1
    assert repeated(teacache, "--cache-dit-rdt", "0.5")["cache_method"] == "teacache"
    assert repeated(teacache, "--no-cache-dit-enabled")["cache_method"] == "none"
    slow = generated(tmp_path, "--from", str(masked), "--cache-dit-scm-preset", "slow")
    assert read_parameters(slow)["cache_dit_scm_preset"] == "slow" and "cache_dit_scm_cache_bins" not in read_parameters(slow)
    bins = repeated(slow, "--cache-dit-scm-compute-bins", "3", "--cache-dit-scm-cache-bins", "1")
    assert (bins["cache_dit_scm_preset"], bins["cache_dit_scm_compute_bins"]) == ("none", [3])


@pytest.mark.parametrize("fields", [
    {"cache[scm_compute_bins]": "2,1", "cache[scm_cache_bins]": "1, 2"},
    {"cache[scm_compute_bins]": "[2,1]", "cache[scm_cache_bins]": "[1, 2]"},
    {"cache[scm_compute_bins][]": ["2", "1"], "cache[scm_cache_bins][]": ["1", "2"]},
    {"cache": '{"scm_compute_bins": [2, 1], "scm_cache_bins": [1, 2]}'},
])  # fmt: skip
def test_bins_of_a_form(client: OpenAI, tmp_path: Path, fields: dict[str, Any]) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    data = {"prompt": "x", "strength": "1", "num_inference_steps": "6", "cache[scm_policy]": "static", "cache[warmup]": "0"}
    if "cache" in fields:
        data = {name: value for name, value in data.items() if "[" not in name}
        fields = {"cache": json.dumps({**json.loads(fields["cache"]), "scm_policy": "static", "warmup": 0})}
    answer = httpx.post(f"{client.base_url}images/edits", data={**data, **fields}, files={"image": picture.getvalue()})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["cache"]["steps"] == "110100"


def test_forms_that_say_something_twice(client: OpenAI) -> None:
    for name, values in (("prompt", ["x", "y"]), ("cache[mc]", ["1", "2"])):
        data = {"prompt": "x", name: values}
        answer = httpx.post(f"{client.base_url}images/edits", data=data, files={"image": b"x"})
        assert answer.status_code == 400 and f"{name} is given twice" in answer.json()["error"]["message"]


def test_a_timing_report_says_what_the_cache_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generated(tmp_path, "--cache-dit-enabled", "--cache-dit-warmup", "2", "--perf-dump-path", "perf.json")
    report = json.loads((tmp_path / "perf.json").read_text())
    made = report["meta"]["cache_report"]
    assert len(made["steps"]) == len(report["denoise_steps_ms"]) == 12 and 0 < made["computed_ratio"] < 1
