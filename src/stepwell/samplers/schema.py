"""The part of JSON Schema that a text can be held to, read into shapes. What is beyond it is refused by name.

Supported: type (or several), enum, const, properties, required, items, minItems, maxItems, minLength, maxLength, minimum,
maximum, exclusiveMinimum, exclusiveMaximum, anyOf, oneOf of alternatives that exclude one another, allOf of a single one, and
$ref (beside these four a type only). A $ref is within the document; one may lead back to itself: then LEVELS references are
followed within each other, and what would need another one is left out. `{}` at the top is any object, elsewhere anything.
additionalProperties are written only where there are no properties.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from stepwell.config.load import shorten
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.samplers.grammar import (
    ANY_NUMBER,
    DIGITS,
    PLACES,
    Entries,
    Fields,
    Free,
    Items,
    Number,
    OneOf,
    Shape,
    Values,
    Words,
    written,
)

MOST_ITEMS, MOST_PARTS, MOST_DEPTH, MOST_OPTIONAL, MOST_VALUES = 64, 1000, 32, 64, 1000
ENDLESS = 2**31 - 1  # characters: more than any text has
LEVELS = 5  # of references within each other, where one leads back to itself; more if nothing has an end before
FREE_DEPTH = 3  # arrays and objects within each other, where the schema leaves it open
ANY_OBJECT = Entries(Free(FREE_DEPTH - 1))
NOTES = frozenset(
    "title description default examples deprecated readOnly writeOnly discriminator $schema $id $comment $defs "
    "definitions".split()
)
KEYWORDS = {
    "string": ("minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
ALONE = ("$ref", "anyOf", "oneOf", "allOf")
KNOWN = NOTES | {"type", "enum", "const", *ALONE} | {word for words in KEYWORDS.values() for word in words}


# --------------------------------------------------------------------------------------------------------------- reading
def shape_of(schema: Mapping[str, Any]) -> Shape:
    """Raises InvalidRequest or Unsupported, naming the keyword and where it is."""
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"schema = {schema!r}: must be an object", param="schema")
    return _read(schema, schema)


def object_of(schema: Mapping[str, Any]) -> Shape:
    """Of what a schema allows, the objects. Raises as `shape_of`, and if there is none."""
    shape_of(schema)
    objects = _narrowed(schema, ["object"])
    if objects is None:
        raise InvalidRequest("schema: must be those of an object", param="schema")
    return _read(schema, objects)


def _read(root: Mapping[str, Any], schema: Mapping[str, Any]) -> Shape:
    """The shape of a schema, whose references are within `root`."""
    if not set(root) - NOTES:
        return ANY_OBJECT
    found, said = None, f"schema: more than {MOST_DEPTH} references within each other"
    whole = _Reader(root, MOST_DEPTH)
    try:
        found = whole.read(schema, "schema", ())
    except _TooLarge as error:
        said = str(error)
    except _Endless:
        pass  # said below, if it is without an end
    if whole.is_recursive:
        found = _deepest(root, schema)
    if found is None:
        raise InvalidRequest(said, param="schema")
    return found


def _deepest(root: Mapping[str, Any], schema: Mapping[str, Any]) -> Shape | None:
    """Of a schema that refers to itself, the shape of as many levels as are not too large, None if the first one is."""
    found: Shape | None = None
    for levels in range(1, MOST_DEPTH + 1):
        reader = _Reader(root, levels)
        try:
            found = reader.read(schema, "schema", ())
        except _Endless as error:
            if len({ref for ref, *_ in reader.known}) <= levels:  # the way to an end would have no reference twice
                raise InvalidRequest(f"{error}: refers to itself without an end", param="schema") from None
        except _TooLarge:
            break
        if found is not None and levels >= LEVELS:
            break
    return found


class _Endless(Exception):
    """There are more references within each other than are followed."""


class _TooLarge(Exception):
    """There are too many parts."""


class _Reader:
    """Follows so many references within each other. What one refers to is read once for each level, and its parts count every
    time, as a grammar opens them every time."""

    def __init__(self, root: Mapping[str, Any], levels: int):
        self.root, self.levels, self.parts, self.is_recursive = root, levels, 0, False
        self.known: dict[tuple[str, int, str], tuple[Shape | None, int]] = {}
        self.marks: dict[tuple[str, bool], dict[str, set[str]]] = {}

    def read(self, schema: Any, where: str, refs: tuple[str, ...]) -> Shape:
        self._count(1, where)
        if schema is False:
            raise Unsupported(f"{where} = False: no value satisfies it, which is not supported; leave it out", param="schema")
        if schema is not True and not isinstance(schema, Mapping):
            raise InvalidRequest(f"{where} = {schema!r}: must be an object", param="schema")
        if schema is True or not schema.keys() - NOTES:
            return Free(FREE_DEPTH)
        alone = _alone(schema, where)
        if alone is not None:
            return self._alternatives(alone, schema, where, refs)
        if "enum" in schema or "const" in schema:
            return _values(schema, where)
        kinds = _kinds(schema["type"], where) if "type" in schema else [self._implied(schema, where)]
        if len(kinds) > 1:
            return self._one_of("type", [({**schema, "type": kind}, where) for kind in kinds], {}, where, refs)
        return self._typed(kinds[0], schema, where, refs)

    def _implied(self, schema: Mapping[str, Any], where: str) -> str:
        found = [kind for kind, words in KEYWORDS.items() if any(word in schema for word in words)]
        if len(found) != 1:
            raise Unsupported(f"{where}: has no type; give one", param="schema")
        return found[0]

    def _count(self, parts: int, where: str) -> None:
        self.parts += parts
        if self.parts > MOST_PARTS or where.count(".") > MOST_DEPTH:
            raise _TooLarge(f"{where}: more than {MOST_PARTS} parts, or {MOST_DEPTH} within each other")

    def _optional(self, schema: Any, where: str, refs: tuple[str, ...]) -> Shape | None:
        """Of what may be left out; None where it has no end."""
        with suppress(_Endless):
            return self.read(schema, where, refs)
        return None

    def _target(self, ref: Any, where: str) -> Any:
        begin, *names = unquote(str(ref)).split("/")  # a JSON pointer in a fragment (RFC 6901, 6)
        target: Any = self.root if begin == "#" else None
        for name in names:
            if isinstance(target, list):
                target = {str(index): each for index, each in enumerate(target)}
            target = target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
        if target is None:
            raise InvalidRequest(f"{where}.$ref = {ref!r}: there is no such part", param="schema")
        return target

    def _referred(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Shape:
        """What $ref says, of the types beside it; the same at the same level is read once."""
        ref = str(schema["$ref"])
        target = self._target(ref, where)
        self.is_recursive = self.is_recursive or ref in refs
        key, parts = (ref, len(refs), repr(schema.get("type"))), self.parts
        if key in self.known:
            self._count(self.known[key][1], where)
        else:
            shape: Shape | None = None
            with suppress(_Endless):
                if len(refs) < self.levels:
                    shape = self._one_of("$ref", [(target, where)], schema, where, (*refs, ref))
            self.known[key] = shape, self.parts - parts
        if (found := self.known[key][0]) is None:
            raise _Endless(f"{where}.$ref = {ref!r}")
        return found

    def _alternatives(self, alone: str, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Shape:
        """What $ref, anyOf, oneOf or allOf say, of the types that are beside it."""
        if alone == "$ref":
            return self._referred(schema, where, refs)
        each = [(one, f"{where}.{alone}[{i}]") for i, one in enumerate(_list(schema, alone, where))]
        if alone == "allOf" and len(each) > 1:
            raise Unsupported(f"{where}.allOf: more than one is not supported", param="schema")
        return self._one_of(alone, each, schema, where, refs)

    def _one_of(
        self, alone: str, each: Sequence[tuple[Any, str]], schema: Mapping[str, Any], where: str, refs: tuple[str, ...]
    ) -> Shape:
        """Those that have an end."""
        if "type" in schema:
            kinds = _kinds(schema["type"], where)
            each = [(narrowed, at) for one, at in each if (narrowed := _narrowed(one, kinds)) is not None]
        if not each:
            of = f"nothing of $ref = {schema['$ref']!r}" if alone == "$ref" else f"none of the alternatives of {alone}"
            raise InvalidRequest(f"{where}: type = {schema['type']!r} leaves {of}", param="schema")
        shapes: list[Shape] = []
        endless: _Endless | None = None
        for one, at in each:
            try:
                shapes.append(self.read(one, at, refs))
            except _Endless as error:
                endless = error
        if not shapes and endless is not None:
            raise endless
        if alone == "oneOf":
            self._check_apart(each)
        return shapes[0] if len(shapes) == 1 else OneOf(tuple(shapes))

    def _check_apart(self, each: Sequence[tuple[Any, str]]) -> None:
        """Refuse alternatives of oneOf that a value may satisfy two of, as far as types and constants tell."""
        marked = [(self._marks(one, at), at) for one, at in each]
        for (one, where), (other, there) in itertools.combinations(marked, 2):
            if not any(marks.isdisjoint(other[key]) for key, marks in one.items() if key in other):
                raise Unsupported(
                    f"{there}: a value may satisfy {where} too, as neither types nor constants of a property that both require "
                    "tell them apart; use anyOf", param="schema",
                )  # fmt: skip

    def _marks(self, schema: Any, where: str, *, has_fields: bool = True) -> dict[str, set[str]]:
        """The types and constants that a value may have, and the fields of an object that are there, as far as that is known."""
        if not isinstance(schema, Mapping):
            return {}
        found: dict[str, set[str]] = {}
        if "$ref" in schema:
            key = (str(schema["$ref"]), has_fields)
            if key not in self.marks:
                self.marks[key] = {}  # while it is made, for what refers to itself
                self.marks[key] = self._marks(self._target(key[0], where), where, has_fields=has_fields)
            found |= self.marks[key]
        elif alone := next((word for word in ALONE if word in schema), None):
            every = [self._marks(one, where, has_fields=has_fields) for one in _list(schema, alone, where)]
            found |= {key: set().union(*(one[key] for one in every)) for key in every[0] if all(key in one for one in every)}
        if "enum" in schema or "const" in schema:
            values = _list(schema, "enum", where) if "enum" in schema else [schema["const"]]
            found["type"] = {kind for value in values for kind in TYPES if kind != "integer" and _is(value, kind)}
            found["const"] = {json.dumps(_plain(value), sort_keys=True, default=str) for value in values}
        if "type" in schema:
            found["type"] = {"number" if kind == "integer" else kind for kind in _kinds(schema["type"], where)}
        given, required = schema.get("properties"), schema.get("required")
        if has_fields and found.get("type") == {"object"} and isinstance(given, Mapping) and isinstance(required, list):
            for name in {name for name in required if isinstance(name, str)} & given.keys():
                marks = self._marks(given[name], where, has_fields=False)
                found |= {f"{word} of {name}": own for word, own in marks.items()}
        return found

    def _typed(self, kind: str, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Shape:
        if kind == "null":
            return Values((), ("null",))
        if kind == "boolean":
            return Values((), ("true", "false"))
        if kind == "string":
            return Words(*_span(schema, "minLength", "maxLength", where, None))
        if kind in ("integer", "number"):
            return _number(schema, kind, where)
        if kind == "array":
            if schema.get("items") is False:
                schema = {**schema, "items": True, "maxItems": 0}
            least, most = _span(schema, "minItems", "maxItems", where, MOST_ITEMS)
            items, at, parts = schema.get("items", True), f"{where}.items", self.parts
            item = self.read(items, at, refs) if least else self._optional(items, at, refs)
            if least and self.is_recursive:  # each of them may have as many
                self._count((least - 1) * (self.parts - parts), at)
            return Values((), ("[]",)) if item is None else Items(item, least, most or 0)
        return self._fields(schema, where, refs)

    def _fields(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> Shape:
        given, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(given, Mapping) or not isinstance(required, list) or not all(isinstance(n, str) for n in required):
            raise InvalidRequest(f"{where}: properties must be an object, and required a list of strings", param="schema")
        for name in required:
            if name not in given:
                raise Unsupported(f"{where}.required: properties does not tell what {name!r} is", param="schema")
        others = schema.get("additionalProperties", "properties" not in schema)
        if not isinstance(others, bool | Mapping):
            raise InvalidRequest(f"{where}.additionalProperties = {others!r}: must be an object or a boolean", param="schema")
        if not given and others is not False:
            if others is True:
                return ANY_OBJECT
            value = self._optional(others, f"{where}.additionalProperties", refs)
            return Fields(()) if value is None else Entries(value)
        if len(given) - len(set(required)) > MOST_OPTIONAL:
            raise Unsupported(f"{where}.properties: more than {MOST_OPTIONAL} that are not required", param="schema")
        return Fields(tuple(self._properties(given, required, where, refs)))

    def _properties(
        self, given: Mapping[str, Any], required: Sequence[str], where: str, refs: tuple[str, ...]
    ) -> Iterator[tuple[str, Shape, bool]]:
        for name, each in given.items():
            at = f"{where}.{name}"
            shape = self.read(each, at, refs) if name in required else self._optional(each, at, refs)
            if shape is not None:
                yield name, shape, name in required


def _alone(schema: Mapping[str, Any], where: str) -> str | None:
    """The keyword that stands alone but for a type, if there is one. Raises Unsupported for what is not known, or beside it."""
    for word in schema:
        if word not in KNOWN:
            raise Unsupported(f"{where}.{word}: not supported; leave it out", param="schema")
    alone = next((word for word in ALONE if word in schema), None)
    if alone is not None and (others := schema.keys() - NOTES - {alone, "type"}):
        raise Unsupported(f"{where}.{min(others)}: not supported beside {alone}", param="schema")
    return alone


def _list(schema: Mapping[str, Any], word: str, where: str) -> list[Any]:
    value = schema[word]
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_VALUES:
        raise InvalidRequest(f"{where}.{word} = {shorten(value)}: must be a list of 1 to {MOST_VALUES}", param="schema")
    return list(value)


def _kinds(given: Any, where: str) -> list[str]:
    kinds = [given] if isinstance(given, str) else _list({"type": given}, "type", where)
    for kind in kinds:
        if kind not in TYPES:
            raise InvalidRequest(f"{where}.type = {kind!r}: must be one of {', '.join(TYPES)}", param="schema")
    return list(dict.fromkeys(kinds))


def _narrowed(schema: Any, kinds: Sequence[str]) -> Any:
    """A schema of these types only, None if it has none of them. What is no schema stays what it is, to be refused."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        return schema
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values and not any(_is(value, kind) for value in values for kind in kinds):
        return None
    own = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type")
    if "type" not in schema:
        found = list(kinds)
    elif not isinstance(own, list | tuple) or not all(kind in TYPES for kind in own):
        return schema
    else:
        found = [kind for kind in own if kind in kinds or (kind == "integer" and "number" in kinds)]
        found += ["integer"] * ("number" in own and "integer" in kinds and not {"number", "integer"} & set(found))
    return {**schema, "type": found if len(found) > 1 else found[0]} if found else None


def _plain(value: Any) -> Any:
    """What is equal in JSON Schema made the same: 1.0 is 1."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _values(schema: Mapping[str, Any], where: str) -> Shape:
    values = _list(schema, "enum", where) if "enum" in schema else [schema["const"]]
    try:
        texts = {written(value): value for value in values if "const" not in schema or written(value) == written(schema["const"])}
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{where}: a value that JSON does not have: {error}", param="schema") from None
    if "type" in schema:
        kinds = _kinds(schema["type"], where)
        texts = {text: value for text, value in texts.items() if any(_is(value, kind) for kind in kinds)}
    if not texts:
        raise InvalidRequest(f"{where}: no value of enum or const fits the rest", param="schema")
    if words := [word for word in schema if word not in NOTES | {"type", "enum", "const"}]:
        raise Unsupported(f"{where}.{words[0]}: not supported beside enum or const", param="schema")
    numbers = tuple(text for text, value in texts.items() if _is(value, "number"))
    return Values(numbers, tuple(text for text in texts if text not in numbers))


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and (isinstance(value, int) or value.is_integer()))
    return kind == ("string" if isinstance(value, str) else "array" if isinstance(value, list | tuple) else "object")


def _span(schema: Mapping[str, Any], low: str, high: str, where: str, default: int | None) -> tuple[int, int | None]:
    for word in (low, high):
        if word in schema and not (_is(schema[word], "integer") and schema[word] >= 0):
            raise InvalidRequest(f"{where}.{word} = {schema[word]!r}: must be a whole number from 0 on", param="schema")
    least, most = int(schema.get(low, 0)), int(schema[high]) if high in schema else None
    if most is not None and least > most:
        raise InvalidRequest(f"{where}.{low} = {least}: at most {most} would do", param="schema")
    bound = None if default is None else max(default, least)
    return least, bound if most is None else min(most, ENDLESS if bound is None else bound)


def _number(schema: Mapping[str, Any], kind: str, where: str) -> Number:
    places = PLACES if kind == "number" else 0
    low, high = ANY_NUMBER.low, ANY_NUMBER.high
    for word in KEYWORDS["number"]:
        if word not in schema:
            continue
        value = schema[word]
        if not _is(value, "number") or value in (math.inf, -math.inf) or value != value:
            raise InvalidRequest(f"{where}.{word} = {value!r}: must be a number", param="schema")
        scaled = Fraction(str(value) if isinstance(value, float) else value) * 10**places
        beyond = word.startswith("exclusive") and scaled.denominator == 1
        if word.endswith("inimum"):
            low = max(low, math.ceil(scaled) + beyond)
        else:
            high = min(high, math.floor(scaled) - beyond)
    made = Number(low, high, places)
    if low > high or made.extra("") is None:
        raise InvalidRequest(f"{where}: no {kind} of {DIGITS} digits is within its bounds", param="schema")
    return made
