"""Text that satisfies a JSON schema, whatever the model: random weights, weights that want masks only, any tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from stepwell import DiffGenerator
from stepwell.errors import InvalidRequest, StepwellError
from stepwell.samplers.schema import shape_of
from stepwell.types import Chunk, Event
from tests.support.llada2 import SPECIALS, text_repository

INNER = {
    "type": "object",
    "properties": {"a": {"type": ["integer", "null"]}, "b": {"type": "string", "minLength": 2, "maxLength": 4}},
    "required": ["b"],
}
RECORD = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue", "blueish"], "description": "of the thing"},
        'the "name"': {"type": "string", "maxLength": 12},
        "n": {"type": "integer", "minimum": 3, "maximum": 120},
        "ok": {"type": "boolean"},
        "x": {"type": "number", "minimum": -0.5, "exclusiveMaximum": 1},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/Inner"},
    },
    "required": ["color", 'the "name"', "n", "ok", "x", "tags", "inner"],
    "additionalProperties": False,
    "$defs": {"Inner": INNER},
}


def animal(kind: str) -> dict[str, Any]:
    """What pydantic makes of a class in a discriminated union."""
    return {"type": "object", "required": ["kind"], "properties": {"kind": {"const": kind}, "legs": {"type": "integer"}}}


def component(kind: str, inner: Any) -> dict[str, Any]:
    """A part of a user interface, with others inside."""
    properties = {"kind": {"const": kind}, "children": {"type": "array", "items": inner}}
    return {"type": "object", "required": ["kind", "children"], "properties": properties}


WITHIN = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in ("Row", "Column", "Card", "Tabs", "Text")]}
SCHEMAS: dict[str, Any] = {
    "record": RECORD,
    "any object": {},
    "any value": {"type": "object", "properties": {"v": {}}, "required": ["v"]},
    "mixed enum": {"enum": [1, 12, 123, "a", None, [1, 2], {"b": 1.5}]},
    "exponents": {"enum": [1e300, -2.5e-07, 1e22, 1, 1.5]},
    "names": {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": {"enum": ["x", 7]}}},
    "any value with a title": {"type": "object", "properties": {"v": {"title": "V"}}, "required": ["v"]},
    "integer": {"type": "integer"},
    "bounded": {"type": "integer", "exclusiveMinimum": -20, "maximum": -10},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 5},
    "string": {"type": "string", "minLength": 3},
    "optional": {"type": "object", "properties": {c: {"type": "boolean"} for c in "abcdef"}, "required": ["c"]},
    "const": {"type": "object", "properties": {"kind": {"const": "ä €"}}, "required": ["kind"]},
    "one of": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}, INNER]}},
    "whole numbers with a point": {
        "type": "array",
        "items": {"type": "string", "minLength": 2.0},
        "minItems": 1.0,
        "maxItems": 2e0,
    },
    "encoded": {"$ref": "#/%24defs/a%20b~1c%25", "$defs": {"a b/c%": {"enum": ["found"]}}},
    "empty list": {"type": "array", "items": False},
    "no empty list": {"type": "object", "properties": {"a": {"type": "array", "items": False}}, "required": ["a"]},
    "room for all": {"type": "array", "items": {"type": "string", "maxLength": 10**30}, "minItems": 1},
    "objects": {"enum": [{"a": 1, "b": [{}, None]}, {"a": 1}, {}, [], [{"a": ""}]]},
    "an object": {"const": {"a": {"b": [1, 2.5, "x"]}}},
    "others": {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "additionalProperties": {"type": "string"},
        "required": ["a"],
    },
    "bounds beyond any number": {"type": "integer", "minimum": -(10**400), "maximum": 10**400},
    "tools": {
        "anyOf": [
            {"type": "object", "properties": {"name": {"const": name}, "arguments": arguments}, "required": ["name", "arguments"]}
            for name, arguments in [
                ("weather", {"type": "object", "properties": {"city": {"type": "string", "minLength": 2}}, "required": ["city"]}),
                ("weather_map", {"type": "object", "properties": {"zoom": {"type": "integer"}}}),
                ("now", {"type": "object", "properties": {}}),
            ]
        ]
    },
    "told apart by a later field": {
        "type": "array",
        "minItems": 2,
        "items": {
            "anyOf": [
                {"properties": {"kind": {"type": "string"}, "a": {"type": "null"}}, "required": ["kind", "a"]},
                {"properties": {"kind": {"type": "string"}, "b": {"enum": [1, 12]}}, "required": ["kind", "b"]},
                {"properties": {"kind": {"type": "integer"}, "b": {"type": "number"}}, "required": ["kind", "b"]},
                {"properties": {"kind": {"const": "ab"}, "c": {}}, "required": ["kind", "c"]},
                {"additionalProperties": {"type": "boolean"}},
            ]
        },
    },
    "within literals": {
        "anyOf": [
            {"enum": ["cat", "catalogue", "a dog", [1, 2, "x"], {"a": {"b": 1}}, 15, 150]},
            {"enum": ["cat", "cater", "a", [1, 2, "y"], {"a": {"c": 1}}]},
            {"type": "array", "items": {"type": "integer"}, "minItems": 3},
            {"type": "integer", "minimum": 151, "maximum": 1500},
        ]
    },
    "words of several lengths": {
        "anyOf": [
            {"type": "string", "maxLength": 2},
            {"enum": ["auto", "by hand"]},
            {"type": "string", "minLength": 9, "maxLength": 11},
        ]
    },
    "a type beside": {"type": "object", "anyOf": [INNER, {"properties": {"c": True}, "required": ["c"]}, {"type": "string"}]},
    "types beside": {
        "type": ["integer", "null"],
        "anyOf": [{"type": "number", "minimum": 3}, {"enum": ["a", None, 1.5, 2]}, True],
    },
    "a type beside a reference": {
        "type": "integer",
        "$ref": "#/$defs/N",
        "$defs": {"N": {"anyOf": [{"const": 7}, {"const": "x"}]}},
    },
    "one of objects told apart": {
        "oneOf": [animal(name) for name in ("cat", "dog")] + [{"type": "null"}, {"enum": [1, 2]}],
        "discriminator": {"propertyName": "kind"},
    },
    "one of references": {
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "$defs": {"Cat": animal("cat"), "Dog": animal("dog")},
    },
    "one of objects, said beside": {
        "type": "object",
        "oneOf": [{"properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("a", "b")],
    },
    "one of several of several": {
        "oneOf": [{"oneOf": [animal("cat"), animal("dog")]}, animal("cow"), {"anyOf": [{"type": "string"}, {"type": "null"}]}]
    },
    "all of one": {"allOf": [{"$ref": "#/$defs/Inner"}], "type": "object", "$defs": {"Inner": INNER}},
    "linked list": {
        "$ref": "#/$defs/Node",
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
    },
    "user interface": {
        "type": "object",
        "properties": {"kind": {"enum": ["div", "button"]}, "children": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["kind", "children"],
    },
    "components within each other": {
        **WITHIN,
        "$defs": {
            **{name: component(name, WITHIN) for name in ("Row", "Column", "Card", "Tabs")},
            "Text": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        },
    },
    "a reference into a list": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/anyOf/1"}}]},
    "several of themselves": {"anyOf": [{"type": "null"}, {"type": "array", "minItems": 3, "items": {"$ref": "#"}}]},
    "an end that is far": {
        "$ref": "#/$defs/N0",
        "$defs": {
            **{
                f"N{i}": {"type": "object", "properties": {"n": {"$ref": f"#/$defs/N{i + 1}"}}, "required": ["n"]}
                for i in range(10)
            },
            "N10": {"type": "array", "items": {"$ref": "#/$defs/N0"}},
        },
    },
    "tree": {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "leaf": {"type": "boolean"}}},
    "names within names": {"type": "object", "additionalProperties": {"$ref": "#"}},
    "arrays of themselves": {"$ref": "#/$defs/A", "$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}}},
    "terms": {
        "$ref": "#/$defs/Term",
        "$defs": {
            "Term": {"oneOf": [{"$ref": "#/$defs/Sum"}, {"type": "integer"}, {"$ref": "#/$defs/Not"}]},
            "Sum": {
                "type": "object",
                "required": ["op", "a", "b"],
                "properties": {"op": {"const": "+"}, "a": {"$ref": "#/$defs/Term"}, "b": {"$ref": "#/$defs/Term"}},
            },
            "Not": {
                "type": "object",
                "required": ["op", "a"],
                "properties": {"op": {"const": "-"}, "a": {"$ref": "#/$defs/Term"}},
            },
        },
    },
    "nested": {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1}},
}


def bpe_tokenizer(path: Path) -> None:
    """Replace the tokenizer of bytes by one whose tokens are several characters, quotes and commas among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    corpus = [
        json.dumps({"color": c, "name": f"{c} {n}\n", "n": n, "tags": ["a", c]}) for c in ("red", "blue") for n in range(99)
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0], mask_token=SPECIALS[1])
    made.save_pretrained(path)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffGenerator]:
    path = text_repository(tmp_path_factory.mktemp("schema"), {"block_size": 16, "vocab_size": 400})
    if request.param == "bpe":
        bpe_tokenizer(path)
    with DiffGenerator.from_pretrained(path, threads=1) as made:
        yield made


def made(generator: DiffGenerator, schema: Any, **asked: Any) -> Any:
    (text,) = generator.generate("hello", schema=schema, **{"max_tokens": 160, "seed": 3, **asked})
    check(text, schema, asked.get("max_tokens", 160))
    return text


def check(text: Any, schema: Any, limit: int) -> None:
    jsonschema_rs.validate(schema or {"type": "object"}, json.loads(text.text))
    assert text.finish_reason == "stop" and text.usage.completion_tokens <= limit


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_it_parses_and_validates_within_any_limit_that_can_hold_it(generator: DiffGenerator, schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="max_tokens = 0: the shortest text of this schema may take") as error:
        made(generator, schema, max_tokens=0)
    least = int(error.value.message.rsplit(" ", 1)[1])
    for spare, temperature in ((0, 0.0), (1, 1.0), (2, 2.0), (7, 1.0)):
        made(generator, schema, max_tokens=least + spare, temperature=temperature, diffusion={"threshold": 0.0}, seed=spare)
    made(generator, schema, max_tokens=least + 12)
    made(generator, schema, max_tokens=least + 60, temperature=3.0, diffusion={"threshold": 0.0})
    made(generator, schema, max_tokens=least + 8, logit_bias={1: 100.0})  # the mask


def test_names_may_be_anything_and_their_values_what_is_said(generator: DiffGenerator) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "null"}}
    texts = [made(generator, schema, temperature=10.0, seed=seed) for seed in range(12)]
    assert any(None in json.loads(text.text).values() for text in texts)


def test_what_refers_to_itself_nests_as_deep_as_it_is_followed(generator: DiffGenerator) -> None:
    depths = set()
    for seed in range(16):
        node, depth = json.loads(made(generator, SCHEMAS["linked list"], temperature=9.0, seed=seed, max_tokens=200).text), 0
        while node is not None:
            node, depth = node["next"], depth + 1
        depths.add(depth)
    assert max(depths) >= 3 and max(depths) <= 5 and len(depths) >= 3


def test_a_long_text_looks_no_further_ahead_than_a_short_one(generator: DiffGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell.stages.form.MOST_NODES", 12)
    bracket = next(i for i in range(400) if piece(generator, i) == "]")
    text = made(generator, {"type": "array", "items": {"enum": ["x", "y"]}}, logit_bias={bracket: -100.0})
    assert len(json.loads(text.text)) > 20


@pytest.mark.clock
def test_many_alternatives_are_told_apart_in_no_time() -> None:
    begin = time.process_time()
    shape_of({"oneOf": [{"enum": list(range(i * 500, i * 500 + 500))} for i in range(100)]})
    assert time.process_time() - begin < 5


def test_a_schema_of_endless_lists_is_refused(generator: DiffGenerator) -> None:
    rows = {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": {"type": "null"}}}
    with pytest.raises(InvalidRequest, match="schema: its shortest text has more than 5000 parts"):
        made(generator, rows)


def test_strings_hold_escapes_and_no_bare_quote(generator: DiffGenerator) -> None:
    quote, backslash = (next(i for i in range(400) if piece(generator, i) == c) for c in '"\\')
    text = made(generator, {"type": "string"}, logit_bias={backslash: 100.0}, max_tokens=20)
    assert text.text.count("\\") >= 5
    text = made(generator, {"type": "string", "minLength": 6}, logit_bias={quote: 100.0}, max_tokens=40)
    assert len(json.loads(text.text)) == 6 or "\\" in text.text


def piece(generator: DiffGenerator, token: int) -> str:
    from transformers import PreTrainedTokenizerFast

    return str(PreTrainedTokenizerFast.from_pretrained(generator.model.path).decode([token]))


def test_the_skeleton_takes_no_forwards_and_a_choice_takes_one(generator: DiffGenerator) -> None:
    fixed = made(generator, SCHEMAS["const"])
    assert fixed.usage.forwards == 0 and fixed.text == '{"kind": "ä €"}'
    labels = {"type": "object", "properties": {"label": {"enum": ["spam", "ham", "unsure"]}}, "required": ["label"]}
    assert made(generator, labels).usage.forwards - made(generator, labels).usage.commits <= 2  # if a block ends within it
    for word in ("ham", "unsure"):
        letter = next(i for i in range(400) if piece(generator, i) == word[0])
        assert json.loads(made(generator, labels, logit_bias={letter: 100.0}).text) == {"label": word}


@pytest.mark.parametrize(("liked", "disliked", "schema", "wanted"), [
    ("q", '"', {"anyOf": [{"enum": ["quiet", "quick"]}, {"type": "string", "maxLength": 7}]}, "q" * 7),
    ("q", "", {"anyOf": [{"enum": ["quiet", "x"]}, {"enum": ["quick", "x"]}]}, None),
    ("9", ",", {"anyOf": [{"const": 98}, {"type": "integer", "maximum": 99999}, {"type": "number", "maximum": 99}]}, 99999),
])  # fmt: skip
def test_alternatives_that_begin_alike_are_all_there(
    generator: DiffGenerator, liked: str, disliked: str, schema: Any, wanted: Any
) -> None:
    """What one has begun another may go on with."""
    named = {piece(generator, i): i for i in range(400)}
    bias = {named[liked]: 50.0, **({named[disliked]: -50.0} if disliked else {})}
    found = json.loads(made(generator, schema, logit_bias=bias, max_tokens=40).text)
    assert found == wanted if wanted is not None else found in ("quiet", "quick")


def test_a_union_of_many_reads_a_long_list_of_them(generator: DiffGenerator) -> None:
    """Readings of what is written do not add up."""
    items = {
        "anyOf": [{"type": "string", "maxLength": n} for n in range(1, 9)] + [{"type": "array", "items": {"type": "string"}}]
    }
    made(generator, {"type": "array", "items": items, "minItems": 25}, max_tokens=200)


def test_a_lower_threshold_goes_through_several_values_at_once(generator: DiffGenerator) -> None:
    slow, fast = (made(generator, RECORD, diffusion={"threshold": at}).usage.forwards for at in (0.99, 0.0))
    assert fast < slow / 2


def test_chunks_are_only_appended_and_tokens_told(generator: DiffGenerator) -> None:
    events: list[Event] = []
    text = made(generator, RECORD, logprobs=1, on_event=events.append)
    assert "".join(event.text for event in events if isinstance(event, Chunk)) == text.text
    assert len(text.tokens) == text.usage.completion_tokens
    assert any(token.top for token in text.tokens) and all(token.logprob <= 0 for token in text.tokens)


def test_company_changes_nothing(generator: DiffGenerator) -> None:
    """Forms of two kinds and plain texts share every step of theirs."""
    from stepwell.types import Done, Request, SamplingParams, TextParams

    engine = generator._engine
    asked = [
        TextParams(schema=RECORD, max_tokens=140, temperature=1.0),
        TextParams(max_tokens=40, ignore_eos=True, temperature=0.7),
        TextParams(schema=SCHEMAS["one of"], max_tokens=120),
        TextParams(max_tokens=3, suffix="end"),
        TextParams(max_tokens=40, prediction="red and blue", ignore_eos=True),
    ]
    requests = [lambda p=params: Request("a prompt ", SamplingParams(seed=5), text=p) for params in asked]
    alone = [next(e for e in engine.stream(make()) if isinstance(e, Done)).outputs[0].text for make in requests]
    import queue

    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    ids = [engine.submit(make(), events.put).id for make in requests]
    done: dict[str, Any] = {}
    while len(done) < len(ids):
        event = events.get(timeout=60)
        if isinstance(event, Done):
            done[event.request_id] = event.outputs[0].text
    for own, name in zip(alone, ids, strict=True):
        assert own is not None and (own.text, own.usage.forwards) == (done[name].text, done[name].usage.forwards)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "pattern": "a+"}, "schema.pattern: not supported"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, r"schema.oneOf\[1\]: a value may satisfy schema.oneOf\[0\] too"),
        ({"oneOf": [{"type": "number"}, {"type": ["integer", "null"]}]}, r"schema.oneOf\[1\]: a value may satisfy"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, r"schema.oneOf\[1\]: a value may satisfy"),
        ({"oneOf": [{"const": [1]}, {"const": [1.0]}]}, r"schema.oneOf\[1\]: a value may satisfy"),
        ({"oneOf": [{"const": {"a": 1, "b": 2}}, {"enum": [{"b": 2, "a": 1}]}]}, r"schema.oneOf\[1\]: a value may satisfy"),
        ({"oneOf": [{"$ref": "#/oneOf/1"}, {"anyOf": [{"type": "null"}, {"$ref": "#"}]}]}, "a value may satisfy"),
        ({"oneOf": [{"type": 5}, {"type": "null"}]}, r"schema.oneOf\[0\].type = 5: must be a list"),
        ({"oneOf": [{"enum": 5}, {"type": "null"}]}, r"schema.oneOf\[0\].enum = 5: must be a list"),
        ({"oneOf": [{"const": float("nan")}, {"const": 1}]}, r"schema.oneOf\[0\]: a value that JSON does not have"),
        ({"oneOf": [{**animal("a"), "required": 5}, animal("b")]}, r"schema.oneOf\[0\]: .*required a list of strings"),
        ({"oneOf": [INNER, {**INNER, "properties": {"b": {"const": "xyz"}}}]}, r"schema.oneOf\[1\]: a value may satisfy"),
        ({"oneOf": [{"type": "null"}], "minItems": 1}, "schema.minItems: not supported beside oneOf"),
        ({"allOf": [{"type": "string"}, {"minLength": 3}]}, "schema.allOf: more than one is not supported"),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}, "schema.a.format: not supported"),
        ({"anyOf": [{"type": "string"}, {"pattern": "a"}]}, r"schema.anyOf\[1\].pattern: not supported"),
        ({"anyOf": [], "type": "string"}, r"schema.anyOf = \[\]: must be a list"),
        (
            {"anyOf": [{"type": "string"}, {"type": "null"}], "type": "object"},
            "schema: type = 'object' leaves none of the alternatives of anyOf",
        ),
        (
            {"$ref": "#/$defs/A", "type": ["array"], "$defs": {"A": {"type": "string"}}},
            r"schema: type = \['array'\] leaves nothing of \$ref = '#/\$defs/A'",
        ),
        ({"anyOf": [{"type": "string"}], "minLength": 3}, "schema.minLength: not supported beside anyOf"),
        ({"anyOf": [True], "type": "text"}, "schema.type = 'text': must be one of string"),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/A"}}}},
            r"schema.\$ref = '#/\$defs/A': refers to itself without an end",
        ),
        (
            {"type": "object", "properties": {"me": {"$ref": "#"}}, "required": ["me"]},
            r"\$ref = '#': refers to itself without an end",
        ),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, "refers to itself without an end"),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/B"}]}, "B": {"$ref": "#/$defs/A"}}},
            "refers to itself without an end",
        ),
        ({"$ref": "#/$defs/B"}, "there is no such part"),
        ({"type": "text"}, "schema.type = 'text'"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "schema.required"),
        ({"type": "object", "properties": {"a": True}, "required": [["a"]]}, "required a list of strings"),
        ({"type": "object", "additionalProperties": 5}, "schema.additionalProperties = 5"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "within its bounds"),
        ({"type": "number", "minimum": 1e-7, "maximum": 2e-7}, "within its bounds"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "schema.minLength = 5"),
        ({"type": "array", "items": {"type": "string", "maxLength": -1}}, "schema.items.maxLength = -1"),
        ({"enum": []}, "schema.enum"),
        ({"enum": list(range(1001))}, r"schema.enum = \[0, 1, .*… \(.* characters\): must be a list of 1 to 1000"),
        ({"type": "string", "minLength": 2.5}, "schema.minLength = 2.5: must be a whole number"),
        ({"type": "string", "minLength": None, "maxLength": 4}, "schema.minLength = None: must be a whole number"),
        ({"type": "string", "maxLength": None}, "schema.maxLength = None: must be a whole number"),
        ({"type": "number", "minimum": None}, "schema.minimum = None: must be a number"),
        ({"type": "integer", "minimum": 10**400}, "no integer of 15 digits is within its bounds"),
        ({"type": "object", "required": ["a"]}, "schema.required: properties does not tell what 'a' is"),
        ({"type": "array", "prefixItems": [{"type": "null"}]}, "schema.prefixItems: not supported"),
        ({"type": "array", "items": [{"type": "null"}]}, r"schema.items = \[.*\]: must be an object"),
        ({"type": "array", "items": False, "minItems": 1}, "schema.minItems = 1: at most 0 would do"),
        ({"type": "object", "properties": {"a": False}}, "schema.a = False: no value satisfies it"),
        ({"type": "object", "additionalProperties": {"pattern": "a"}}, "schema.additionalProperties.pattern: not supported"),
        ({"$ref": "#Inner", "$defs": {"Inner": INNER}}, r"schema.\$ref = '#Inner': there is no such part"),
        ({"$ref": "other.json#/$defs/Inner", "$defs": {"Inner": INNER}}, "there is no such part"),
        ({"const": float("nan")}, "JSON does not have"),
        ({"title": "x", "minLength": 3, "maxItems": 3}, "has no type"),
        ([], "schema = \\[\\]"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(schema: Any, said: str) -> None:
    with pytest.raises(StepwellError, match=said) as error:
        shape_of(schema)
    assert error.value.param == "schema"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"suffix": "x"}, "suffix does not go with a schema"),
        ({"stop": "}"}, "stop does not go with a schema"),
        ({"prediction": "{}"}, "prediction does not go with a schema"),
        ({"diffusion": {"algorithm": "JointThreshold"}}, "diffusion.algorithm does not apply with a schema"),
        ({"diffusion": {"max_steps": 3}}, "diffusion.max_steps does not apply with a schema"),
    ],
)
def test_what_would_break_it_is_refused(generator: DiffGenerator, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        made(generator, {}, **asked)
