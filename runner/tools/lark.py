"""Grammars of calls in llguidance's dialect of Lark: literals, JSON of a schema, and text that ends at a tag."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from llamabase.errors import FileFormatError
from llamabase.sampling.guidance import prepared

DESCRIBING = {  # keywords that allow and forbid nothing
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
    *("$id", "$defs", "definitions"),
}
LISTING = {"type", "properties", "required", "additionalProperties"}  # those that list an object's properties
OF_TEXT = {"type", "enum", "const", "minLength", "maxLength"}  # those that can be enforced in a text without quotes


class ObjectSchema:
    """The JSON schema of a function's arguments, property by property; what is not a schema allows everything."""

    def __init__(self, schema: Any) -> None:
        self._root = schema if isinstance(schema, dict) else {}
        self._schema = self._resolved(self._root)
        properties, required = self._schema.get("properties"), self._schema.get("required")
        self._properties: dict[str, Any] = properties if isinstance(properties, dict) else {}
        self.required = [key for key in required if isinstance(key, str)] if isinstance(required, list) else []
        # Required properties may have no schema.
        self.keys = list(dict.fromkeys([*self._properties, *self.required]))

    def require_listed(self) -> None:
        """Raise FileFormatError if the properties alone do not say what is allowed."""
        if others := sorted(self._schema.keys() - LISTING - DESCRIBING):
            raise FileFormatError(
                f"{others[0]} beside the properties of a function's arguments cannot be enforced in the form in which "
                "this model writes calls; leave it out"
            )

    def property(self, key: str) -> Any:
        """The schema of a property, with the definitions that it may refer to."""
        schema = self._properties.get(key, self._schema.get("additionalProperties", True))
        if not isinstance(schema, dict):
            return schema
        return {name: self._root[name] for name in ("$defs", "definitions") if name in self._root} | self._resolved(
            schema
        )

    def types(self, key: str) -> set[str] | None:
        """The JSON types that a property may have; None for any."""
        return self._types(self.property(key))

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What a schema that is only a reference refers to in this document; another schema as it is."""
        seen = set()
        while isinstance(ref := schema.get("$ref"), str) and not schema.keys() - DESCRIBING - {"$ref"}:
            target: Any = self._root
            for part in ref.removeprefix("#").split("/")[1:]:
                target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            if ref in seen or not ref.startswith("#/") or not isinstance(target, dict):
                break
            seen.add(ref)
            schema = target
        return schema

    def _types(self, schema: Any, depth: int = 0) -> set[str] | None:
        if not isinstance(schema, dict) or depth > 16:
            return None
        schema = self._resolved(schema)
        if (given := schema.get("type")) is not None:
            listed = [given] if isinstance(given, str) else given
            return {each for each in listed if isinstance(each, str)} if isinstance(listed, list) else None
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list):
            return set().union(*map(types_of, values))
        choices = next((schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)), None)
        types = [None] if choices is None else [self._types(choice, depth + 1) for choice in choices]
        return None if None in types else set().union(*filter(None, types))


def types_of(value: Any) -> set[str]:
    """JSON Schema's names of the types that a value has."""
    if value is None or isinstance(value, bool):
        return {"null" if value is None else "boolean"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    kinds = {str: {"string"}, int: {"integer", "number"}, dict: {"object"}, list: {"array"}}
    return kinds[type(value)]


class Writer:
    """Collects the rules of one grammar. controls: ids of control tokens, which stand for no text, by their names."""

    def __init__(self, controls: Mapping[str, int]) -> None:
        self._controls = controls
        names = sorted(controls, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"\Z.")
        self.rules: list[str] = []

    def literal(self, text: str) -> str:
        """Exactly this text; nothing for an empty one."""
        parts, at = [], 0
        for name in self._names.finditer(text):
            parts += [json.dumps(text[at : name.start()]), f"<[{self._controls[name[0]]}]>"]
            at = name.end()
        return " ".join(part for part in (*parts, json.dumps(text[at:])) if part != '""')

    def arguments(self, schema: Any) -> str:
        """JSON of an object that obeys a schema."""
        return self.json({"type": "object", **(schema if isinstance(schema, dict) else {})})

    def json(self, schema: Any) -> str:
        """JSON that obeys a schema."""
        return self._rule(f"%json {json.dumps(prepared(deepcopy(schema) if isinstance(schema, dict) else {}))}")

    def one_of(self, choices: Iterable[str]) -> str:
        return f"({' | '.join(choices)})"

    def until(self, end: str, *, least: int = 0, most: int | None = None) -> str:
        """A text of `least` to `most` characters, and the tag that ends it; white space before the tag is the tag's."""
        bounds = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
        terminal = self._terminal(f"/(?s:.{bounds})/ & {self._without([end.strip()])}")
        return self._rule(terminal, f"[suffix={json.dumps(end)}]")

    def free(self, openings: Iterable[str], end: str = "") -> str:
        """Any text that holds none of the openings, and then the end."""
        body = f"/(?s:.*)/ & {self._without(openings)}"
        return self._terminal(f"({body}) {json.dumps(end)}" if end else body)

    def text(self, pattern: str) -> str:
        return self._terminal(f"/{pattern}/")

    def value(self, schema: ObjectSchema, key: str, end: str) -> str:
        """An argument, without quotes if it is text, and the tag that ends it."""
        wanted = schema.property(key)
        if schema.types(key) != {"string"}:
            return f"{self.json(wanted)} {self.literal(end)}"
        if others := sorted(wanted.keys() - OF_TEXT - DESCRIBING):
            raise FileFormatError(
                f"{others[0]} of the property {key} cannot be enforced in the form in which this model writes calls, "
                "because its texts have no quotes; leave it out"
            )
        if "enum" in wanted or "const" in wanted:
            texts = wanted.get("enum", [wanted.get("const")])
            return self.one_of(self.literal(text + end) for text in texts if isinstance(text, str))
        return self.until(end, least=wanted.get("minLength", 0), most=wanted.get("maxLength"))

    def _without(self, parts: Iterable[str]) -> str:
        return " & ".join(f"~/(?s:.*){_escaped(part)}(?s:.*)/" for part in parts)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"TEXT_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name


def _escaped(text: str) -> str:
    """Text as a regular expression of Lark."""
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$/#&-~" else char for char in text).replace("\n", r"\n")
