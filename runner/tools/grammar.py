"""Grammars of calls in llguidance's dialect of Lark: literals, JSON of a schema, and text that ends at a tag."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llamabase.errors import FileFormatError
from llamabase.sampling.guidance import prepared

DESCRIBING = {  # keywords that allow and forbid nothing
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
    *("$id", "$defs", "definitions"),
}
LISTING = {"type", "properties", "required", "additionalProperties"}
OF_TEXT = {"type", "enum", "const", "minLength", "maxLength"}


class ObjectSchema:
    """The JSON schema of a function's arguments, property by property; anything that is not one allows everything."""

    def __init__(self, schema: Any) -> None:
        self._root = schema if isinstance(schema, dict) else {}
        self._schema = self._resolved(self._root)
        listed = self._schema.get("properties")
        self._properties: dict[str, Any] = listed if isinstance(listed, dict) else {}
        required = self._schema.get("required")
        self.required = [key for key in required if isinstance(key, str)] if isinstance(required, list) else []

    @property
    def keys(self) -> list[str]:
        """Names of the properties, and of required ones that have no schema."""
        return list(dict.fromkeys([*self._properties, *self.required]))

    def require_listed(self) -> None:
        """Raise FileFormatError if the properties alone do not say what is allowed."""
        if others := sorted(self._schema.keys() - LISTING - DESCRIBING):
            raise FileFormatError(
                f"{others[0]} beside the properties of a function's arguments cannot be enforced in the form in which "
                "this model writes calls; leave it out"
            )

    def property(self, key: str) -> Any:
        """The schema of a property, with the definitions that it may refer to."""
        found = self._properties.get(key, self._schema.get("additionalProperties", True))
        if not isinstance(found, dict):
            return found
        named = {name: self._root[name] for name in ("$defs", "definitions") if name in self._root}
        return named | self._resolved(found)

    def types(self, key: str) -> set[str] | None:
        """The JSON types that a property may have; None for any."""
        return self._types(self.property(key))

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema that is only a reference: what it refers to in this document."""
        seen = set()
        while isinstance(ref := schema.get("$ref"), str) and not schema.keys() - DESCRIBING - {"$ref"}:
            found: Any = self._root
            for part in ref.removeprefix("#").split("/")[1:]:
                found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
            if ref in seen or not ref.startswith("#/") or not isinstance(found, dict):
                break
            seen.add(ref)
            schema = found
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
        for several in ("anyOf", "oneOf"):
            if isinstance(schema.get(several), list):
                found = [self._types(each, depth + 1) for each in schema[several]]
                return None if None in found else set().union(*(each or set() for each in found))
        return None


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
        self._names = re.compile(
            "|".join(re.escape(name) for name in sorted(controls, key=len, reverse=True)) or r"\Z."
        )
        self.rules: list[str] = []

    def literal(self, text: str) -> str:
        """Exactly this text; nothing for an empty one."""
        parts, at = [], 0
        for found in self._names.finditer(text):
            parts += [json.dumps(text[at : found.start()]), f"<[{self._controls[found[0]]}]>"]
            at = found.end()
        return " ".join(part for part in (*parts, json.dumps(text[at:])) if part != '""')

    def is_control(self, text: str) -> bool:
        return text in self._controls

    def arguments(self, schema: Any) -> str:
        """JSON of an object that obeys a schema."""
        return self.json({"type": "object", **(schema if isinstance(schema, dict) else {})})

    def json(self, schema: Any) -> str:
        """JSON that obeys a schema."""
        found = json.loads(json.dumps(schema)) if isinstance(schema, dict) else {}  # a copy
        return self._rule(f"%json {json.dumps(prepared(found))}")

    def one_of(self, choices: Iterable[str]) -> str:
        return f"({' | '.join(choices)})"

    def until(self, end: str, *, least: int = 0, most: int | None = None) -> str:
        """A text of so many characters, and the tag that ends it, white space before which is not the text's."""
        bounds = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
        terminal = self._terminal(f"/(?s:.{bounds})/ & {self._without([end.strip()])}")
        return self._rule(terminal, f"[suffix={json.dumps(end)}]")

    def free(self, openings: Iterable[str], end: str = "") -> str:
        """Any text in which none of the openings stands, and then the end."""
        body = f"/(?s:.*)/ & {self._without(openings)}"
        return self._terminal(f"({body}) {json.dumps(end)}" if end else body)

    def text(self, pattern: str) -> str:
        return self._terminal(f"/{pattern}/")

    def value(self, schema: ObjectSchema, key: str, end: str) -> str:
        """An argument that is written without quotes if it is text, and the tag that ends it."""
        found, types = schema.property(key), schema.types(key)
        if types != {"string"}:
            return f"{self.json(found)} {self.literal(end)}"
        if others := sorted(found.keys() - OF_TEXT - DESCRIBING):
            raise FileFormatError(
                f"{others[0]} of the property {key} cannot be enforced in the form in which this model writes calls, "
                "where text has no quotes; leave it out"
            )
        if "enum" in found or "const" in found:
            texts = [each for each in found.get("enum", [found.get("const")]) if isinstance(each, str)]
            return self.one_of(self.literal(text + end) for text in texts)
        return self.until(end, least=found.get("minLength", 0), most=found.get("maxLength"))

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
