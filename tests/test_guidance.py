"""JSON schemas: an answer obeys its schema, or the schema is refused by naming the keyword."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from llamabase.errors import FileFormatError, SettingError
from llamabase.llama.model import Model
from llamabase.sampling.chain import Chain
from llamabase.sampling.guidance import Guide, lark_guide, schema_guide
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling


@pytest.fixture(scope="module")
def model(toys: dict[str, Path]) -> Iterator[Model]:
    with Model(toys["target"], vocab_only=True) as opened:
        yield opened


def allows(model: Model, guide: str, text: str) -> bool:
    """Whether a text is allowed token by token, and may end there."""
    follower = Guide(model, guide)
    for token in model.tokenize(text, special=False, add_bos=False):
        if not follower.allowed(np.array([token]))[0]:
            return False
        follower.accept(token)
    return bool(follower.allowed(np.array([token for token in range(model.n_vocab) if model.is_end(token)])).any())


# A schema, texts that obey it and texts that do not.
OBEYED: list[tuple[Any, list[str], list[str]]] = [
    ({"type": ["string", "null"], "enum": ["a", None]}, ['"a"', "null"], ['"b"']),
    ({"type": ["object", "null"], "properties": {"a": {"type": "integer"}}}, ["null", '{"a": 1}'], ['{"a": "x"}', "1"]),
    ({"type": ["array", "null"], "items": {"type": "integer"}}, ["null", "[1]"], ['["x"]']),
    ({"type": ["string", "null"], "maxLength": 2}, ["null", '"ab"'], ['"abc"']),
    (
        {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}], "properties": {"b": {"const": 1}}},
        ['{"a": 2, "b": 1}'],
        ['{"b": 1}', '{"b": 2, "a": 2}'],
    ),
    ({"type": "object", "required": ["c"]}, ['{"c": 1}', '{"c": {"d": []}}'], ["{}", '{"d": 1}']),
    ({"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": {"type": "string"}}}, ['"ab"'], ['"abc"', "1"]),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 2, "items": {"const": 5}},
        ["[1, 5]"],
        ["[1]"],
    ),
    ({"properties": {"": {"type": "integer"}}, "required": [""]}, ['{"": 1}'], ["{}", '{"": "x"}']),
    ({"type": "string", "pattern": "^a.b$"}, ['"axb"', '"a\\"b"', '"a\\\\b"'], ['"ab"', '"a"b"', '"a\\b"']),
    ({"type": "string", "pattern": "^[^x]+$", "minLength": 3}, ['"abc"'], ['"ab"', '"axc"']),
    ({"type": "string", "pattern": "^(a|b)$"}, ['"a"', '"b"'], ['"c"', '"ab"']),
    ({"type": "string", "pattern": "a|b"}, ['"xax"', '"b"'], ['"c"']),
    ({"type": "string", "pattern": '^say "hi"$'}, ['"say \\"hi\\""'], ['"say "hi""', '"say hi"']),
    ({"type": "string", "pattern": "^a\\nb$"}, ['"a\\nb"'], ['"a\nb"', '"ab"']),
    ({"type": "string", "pattern": "^\\d\\w\\.\\s?$"}, ['"1a."', '"1_. "'], ['"aa."', '"1a,"']),
    ({"properties": {"a": {"minimum": 3}}}, ['{"a": 3}', '{"a": "x"}'], ['{"a": 2}']),
    ({"items": {}}, ["[1, null]", "5"], ["[1,"]),
    (True, ["1", '{"a": []}'], ["x"]),
    ({"type": "string", "maxLength": 2000}, [f'"{"a" * 2000}"'], [f'"{"a" * 2001}"']),
    ({"type": "integer", "minimum": 3, "maximum": 20, "multipleOf": 2}, ["4", "20"], ["3", "2", "22"]),
    ({"type": "number", "exclusiveMinimum": 0}, ["0.5", "7"], ["0", "-1"]),
    ({"patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False}, ['{"ab": 1}'], ['{"b": 1}']),
    ({"additionalProperties": {"type": "integer"}}, ['{"x": 1}'], ['{"x": "y"}']),
    ({"type": "object", "minProperties": 1, "maxProperties": 1}, ['{"x": 1}'], ["{}", '{"x": 1, "y": 2}']),
    ({"const": {"q": '"\\'}}, ['{"q": "\\"\\\\"}'], ['{"q": ""}']),
    # A name has one spelling, so that it is always that of the listed property.
    (
        {"properties": {"a": {"type": "integer"}, "\n": {"const": 1}}, "additionalProperties": {"type": "string"}},
        ['{"a": 1, "b": "\\t"}', '{"\\n": 1}'],
        ['{"\\u0061": "x"}', '{"a": 1, "\\u0061": "x"}', '{"\\u000a": "x"}', '{"a\\/": "x"}'],
    ),
    ({"type": "string", "format": "date"}, ['"2026-11-28"'], ['"28.11.2026"', '"2026-13-01"']),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ['"a"', "1"], ["null"]),
    # As pydantic writes an optional field, and a model that holds itself.
    (
        {"properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}}},
        ["{}", '{"a": null}'],
        ['{"a": "x"}', '{"b": 1}'],
    ),
    (
        {
            "$defs": {
                "N": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}}
            },
            "$ref": "#/$defs/N",
        },
        ['{"next": {"next": null}}'],
        ['{"next": {"next": 1}}', '{"after": null}'],
    ),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), OBEYED, ids=[json.dumps(each[0])[:60] for each in OBEYED])
def test_a_schema_allows_what_obeys_it(model: Model, schema: Any, right: list[str], wrong: list[str]) -> None:
    guide = schema_guide(json.dumps(schema))
    for text in right:
        jsonschema.validate(json.loads(text), schema)
        assert allows(model, guide, text), text
    for text in wrong:
        assert not allows(model, guide, text), text


REFUSED = [
    ("{", "is not JSON"),
    ("[" * 5000, "is not JSON"),
    ("[1]", "is not an object, true or false"),
    ("false", "no answer obeys"),
    ('{"type": "circle"}', "circle"),
    ('{"$ref": "https://a.b"}', "https://a.b"),
    ('{"properties": {"a": {"type": "array", "uniqueItems": true}}}', "uniqueItems cannot be enforced"),
    ('{"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}}', "not cannot be enforced"),
    ('{"x-guidance": {"lenient": true}, "not": {}}', "not cannot be enforced"),
    ('{"if": {"const": 1}, "then": {"const": 2}}', r"if.* cannot be enforced"),
    ('{"contains": {"const": 1}}', "contains cannot be enforced"),
    ('{"dependentRequired": {"a": ["b"]}}', "dependentRequired cannot be enforced"),
    ('{"oneOf": [{"type": "number"}, {"type": "integer"}]}', "oneOf cannot be enforced"),
    ('{"type": "string", "minLength": 3, "maxLength": 2}', "minLength"),
    ('{"enum": []}', "empty"),
    ('{"properties": {"a": {}}, "required": [["a"]]}', ""),
    ('{"properties": {"a": {}}, "required": [{}]}', ""),
    ('{"allOf": 5}', ""),
    ('{"allOf": null}', ""),
    ('{"type": "integer", "minimum": 1e20}', "minimum"),
    ('{"$ref": "#"}', "no answer obeys it"),
    ('{"type": "string", "format": "horoscope"}', "horoscope"),
    ('{"type": "string", "pattern": "(?=a)b"}', "pattern: look-around"),
    ('{"type": "string", "pattern": "(a"}', "pattern: unclosed group"),
    ('{"items": ' * 300 + "{}" + "}" * 300, "recursion"),
    (json.dumps({"enum": [f"word{i}" for i in range(100_000)]}), "too big"),
    (json.dumps({"properties": {f"p{i}": {"pattern": f"(a|b)*{i}(a|b){{9}}"} for i in range(9000)}}), "simplify it"),
    ('{"type": "integer", "minimum": 1e400}', "is not JSON: .*float"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[each[0][:60] for each in REFUSED])
def test_a_schema_that_cannot_be_obeyed(schema: str, reason: str) -> None:
    with pytest.raises(FileFormatError, match=reason or None) as refused:
        schema_guide(schema)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_listed_properties_are_all_unless_schemas_are_combined(model: Model) -> None:
    """As in llama.cpp's own grammars. A schema that combines others must not be emptied by it."""
    listed = {"properties": {"a": {"const": 1}}}
    assert not allows(model, schema_guide(json.dumps(listed)), '{"b": 1}')
    assert allows(model, schema_guide(json.dumps(listed | {"additionalProperties": True})), '{"b": 1}')
    both = {"allOf": [listed, {"properties": {"b": {"const": 1}}}], "required": ["a", "b"]}
    assert allows(model, schema_guide(json.dumps(both)), '{"a": 1, "b": 1}')
    beside = {"properties": {"b": {"const": 1}}, "anyOf": [listed | {"required": ["a"]}], "required": ["b"]}
    assert allows(model, schema_guide(json.dumps(beside)), '{"b": 1, "a": 1}')
    constant = {"const": {"properties": {"a": 1}}}
    assert allows(model, schema_guide(json.dumps(constant)), '{"properties": {"a": 1}}')


def test_white_space_is_bounded(model: Model) -> None:
    guide = schema_guide('{"properties": {"a": {"type": "integer"}}}')
    assert allows(model, guide, '{\n  "a": 1\n}')
    assert not any(allows(model, guide, text) for text in ('{  "a": 1}', '{"a": 1} ', ' {"a": 1}', '{\n\n\n"a": 1}'))


def test_a_form_in_lark(model: Model) -> None:
    guide = lark_guide('start: "so " call\ncall: %json {"properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    assert allows(model, guide, 'so {"n": 5}')
    assert not allows(model, guide, 'so {"n": "x"}')
    with pytest.raises(FileFormatError, match=r"the form of the answer cannot be obeyed: .*undefined"):
        lark_guide("start: undefined")


def test_drafts_that_may_not_come_are_found_without_moving(model: Model) -> None:
    guide = Guide(model, schema_guide('{"enum": ["tea", "sea"]}'))
    tea, cat = (model.tokenize(f'"{word}"', special=False, add_bos=False) for word in ("tea", "cat"))
    end = next(token for token in range(model.n_vocab) if model.is_end(token))
    assert guide.fitting([*tea, end]) == len(tea) + 1
    assert guide.fitting([*tea, tea[0]]) == len(tea)
    assert guide.fitting(cat) == 1
    assert guide.fitting([]) == 0
    before = guide.allowed(np.arange(model.n_vocab)).copy()
    assert (before == Guide(model, schema_guide('{"enum": ["tea", "sea"]}')).allowed(np.arange(model.n_vocab))).all()
    with pytest.raises(ValueError, match=f"does not allow token {cat[1]}"):
        for token in cat:
            guide.accept(token)


def test_a_complete_answer_allows_only_ends(model: Model) -> None:
    chain = Chain(Sampling(1, 0, 1, 0, guide=schema_guide('{"const": 1}')), [], model)
    logits = np.zeros(model.n_vocab, np.float32)
    chain.accept(int(chain.distribution(logits).ids[0]))
    for _ in range(2):  # also after the end
        ends = chain.distribution(logits).ids.tolist()
        assert ends == [i for i in range(model.n_vocab) if model.is_end(i)]
        chain.accept(ends[0])


def test_a_grammar_and_a_schema_at_once() -> None:
    with pytest.raises(SettingError, match="not both"):
        Sampling(grammar='root ::= "a"', guide=schema_guide("{}"))


CLOSING = (b'"', b"}", b"]", b",", b":", b"0", b"e", b"l")  # what ends an answer soonest comes first


def answer(model: Model, guide: str, seed: int, free: int = 40) -> str | None:
    """A random text that the guide allows: any token while it is short, then what ends it; None if it goes on."""
    rng, noise = np.random.default_rng(seed), Noise(seed)
    chain, said = Chain(Sampling(1.5, 0, 1, 0, guide=guide), [], model), b""
    bias = np.zeros(model.n_vocab, np.float32)
    for token in range(model.n_vocab):
        bias[token] = 200 if model.is_end(token) else 0
        if (piece := model.piece(token)) in CLOSING:
            bias[token] = 100 - 10 * CLOSING.index(piece)
    for position in range(600):
        logits = rng.normal(0, 1, model.n_vocab).astype(np.float32) + (bias if position > free else 0)
        token = chain.distribution(logits).draw(noise, position)
        if model.is_end(token):
            return said.decode()
        chain.accept(token)
        said += model.piece(token)
    return None


def random_schema(rng: np.random.Generator, depth: int = 0) -> Any:
    """A schema in the forms that JSON Schema's own suite of tests has."""

    def some(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def number() -> int:
        return int(rng.integers(-5, 12))

    def name() -> str:
        return str(some("a", "b", "", 'q"', "é", "a b", "$ref", "properties"))

    if depth > 2 or rng.random() < 0.15:
        return some(True, {}, {"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"const": name()})

    def inner() -> Any:
        return random_schema(rng, depth + 1)

    kind = int(rng.integers(11))
    if kind == 0:
        found: dict[str, Any] = {
            "enum": [some(1, "x", None, 2.5, [1], {"a": 'b"\n'}, True) for _ in range(rng.integers(1, 4))]
        }
    elif kind == 1:
        found = {"type": some("string", ["string", "null"])}
        if rng.random() < 0.5:
            found |= {"minLength": int(rng.integers(0, 4)), "maxLength": int(rng.integers(2, 9))}
        if rng.random() < 0.4:
            found["pattern"] = some(
                "^a+$", "^[^x]*$", "b", '^"?\\d{2,3}"?$', "^\\w+\\.\\w*$", "a|b", "^a\\nb", "^(ab|c)?$", "^.$"
            )
        elif rng.random() < 0.2:
            found["format"] = some("date", "time", "ipv4", "uuid", "email")
    elif kind == 2:
        found = {"type": some("integer", "number", ["integer", "string"])}
        for bound in ("minimum", "exclusiveMaximum", "maximum", "exclusiveMinimum"):
            if rng.random() < 0.3:
                found[bound] = number()
        if rng.random() < 0.2:
            found["multipleOf"] = some(1, 2, 3, 5)
    elif kind in (3, 4, 5):
        found = {
            "type": some("object", ["object", "null"]),
            "properties": {name(): inner() for _ in range(rng.integers(0, 4))},
        }
        if rng.random() < 0.6:
            found["required"] = sorted({*list(found["properties"])[:2], *([name()] if rng.random() < 0.3 else [])})
        if rng.random() < 0.4:
            found["additionalProperties"] = some(False, True, inner())
        if rng.random() < 0.15:
            found["patternProperties"] = {some("^a", "b$", "^\\d+$"): inner()}
        if rng.random() < 0.1:
            found[some("minProperties", "maxProperties")] = int(rng.integers(0, 3))
        if rng.random() < 0.05:
            found[some("dependentRequired", "propertyNames", "unevaluatedProperties")] = some({"a": ["b"]}, False)
    elif kind in (6, 7):
        found = {"type": some("array", ["array", "null"])}
        if rng.random() < 0.7:
            found["items"] = inner()
        if rng.random() < 0.3:
            found["prefixItems"] = [inner() for _ in range(rng.integers(1, 3))]
        if rng.random() < 0.5:
            found[some("minItems", "maxItems")] = int(rng.integers(0, 4))
        if rng.random() < 0.05:
            found[some("uniqueItems", "contains")] = some(True, {"type": "integer"})
    elif kind == 8:
        found = {some("anyOf", "oneOf"): [inner() for _ in range(rng.integers(1, 4))]}
    elif kind == 9:
        found = {"allOf": [inner(), inner()]}
    else:
        found = {"$ref": "#/$defs/d", "$defs": {"d": inner()}} if depth == 0 else {"not": inner()}
    if rng.random() < 0.1:
        found |= {"title": name(), "default": 1, "examples": [{"type": "string"}]}
    if depth == 0 and "$ref" in found and rng.random() < 0.5:
        found |= {"type": some("string", "object", "integer"), "maxLength": 3}
    return found


@pytest.mark.parametrize(("n", "answers"), [(60, 4), pytest.param(500, 20, marks=pytest.mark.slow)])
def test_no_answer_breaks_its_schema(model: Model, n: int, answers: int) -> None:
    """Judged by jsonschema, of random schemas and random answers."""
    rng, used, refused, judged = np.random.default_rng(11), 0, 0, 0
    while used < n:
        schema = random_schema(rng)
        try:
            guide = schema_guide(json.dumps(schema))
        except FileFormatError as error:
            assert "cannot be obeyed: " in str(error), error
            refused += 1
            continue
        used += 1
        judge = jsonschema.Draft202012Validator
        validator = judge(schema, format_checker=judge.FORMAT_CHECKER)
        for seed in range(answers):
            if (text := answer(model, guide, seed)) is None:
                continue
            judged += 1
            problems = [problem.message for problem in validator.iter_errors(json.loads(text))]
            assert not problems, (schema, text, problems)
    print(f"{used} schemas used and {refused} refused, {judged} of {used * answers} answers ended and were judged")
    assert judged > 0.9 * n * answers
    assert refused < n


def test_a_schema_that_takes_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """When its time is over; the next one is read."""
    monkeypatch.setattr("llamabase.sampling.worker.SECONDS", 0.2)
    with pytest.raises(FileFormatError, match="takes over 2 s or 500 MB to compile"):
        schema_guide(json.dumps({"properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}))
    monkeypatch.undo()
    assert schema_guide("{}")
