"""YAML is read as plain data by the rules of 1.2, all that is wrong is named with its place, and writing reads back."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from finetune.config.strict_yaml import Document, dump


def read(text: str) -> Any:
    document = Document(text, "test")
    assert document.problems == []
    return document.data


def problems(text: str | bytes) -> list[str]:
    return Document(text, "run.yaml", count_lines=True).problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),  # text to YAML 1.1, as it has no point
        ("2.5E+3", 2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e5", 100_000),  # whole and without a point: an integer
        ("1.0e5", 100_000.0),
        ("1e16", 1e16),  # beyond 2^53 a float does not say which integer
        ("-7", -7),
        ("+7", 7),
        ("007", 7),
        ("123456789012345678", 123456789012345678),
        ("9" * 400, "9" * 400),  # larger than every float
        ("1e999", "1e999"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("null", None),
        ("~", None),
        ("'null'", "null"),
        ('""', ""),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("answer en {question}", "answer en {question}"),
        ("[a, 1, [true]]", ["a", 1, [True]]),
        ("{a: {b: 1}, 5: x, yes: no}", {"a": {"b": 1}, "5": "x", "yes": "no"}),
        ("x: &a 1\ny: *a", {"x": 1, "y": 1}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    data = read(text)
    assert data == value
    assert type(data) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", ["run.yaml:3: a: the key occurs a second time"]),
        ("a:\n  b: 1\n  b: 2\nc:\n", ["run.yaml:3: a.b: the key occurs a second time", "run.yaml:4: c: nothing given"]),
        ("", ["run.yaml:1: nothing given"]),
        ("# only a remark\n", ["run.yaml:1: nothing given"]),
        ("a: 1\nb: [1,\n", ["run.yaml:3: not valid YAML"]),
        ("a: 1\n\tb: 2", ["run.yaml:2: not valid YAML"]),
        ("a: 1\n---\nb: 2", ["run.yaml:2: not valid YAML"]),
        ("a: 1\nb: *c", ["run.yaml:2: not valid YAML: found undefined alias"]),
        ("a: 1\nb: '\x01'", ["run.yaml:2: not valid YAML"]),
        (b"a: 1\nb: \xff", ["run.yaml:2: not valid YAML: the byte 0xff is not UTF-8"]),
        ('a: 1\nb: "\\UFFFFFFFF"', ["run.yaml:1: not valid YAML"]),
        ('a: 1\nb: "\\U00110000"', ["run.yaml:1: not valid YAML"]),
        ('a: 1\nb: "\\ud800"', ["run.yaml:2: b: '\\ud800' holds half a character"]),
        ('a: 1\n"\\ud800": 2', ["run.yaml:2: ?: expected a name as key"]),
        ("a: 1\n? [b]\n: 2", ["run.yaml:2: ?: expected a name as key"]),
        ('"a\\nb":\n', ["run.yaml:1: 'a\\nb': nothing given"]),
        ("a: &s {b: 1}\nc: *s", ["run.yaml:2: c: aliases of sections or lists"]),
        ("a: &a [*a]", ["run.yaml:1: a.0: aliases of sections or lists"]),
        (
            "a: " + "[" * 30 + "]" * 30,
            ["run.yaml:1: a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0: aliases of sections or lists, and deep"],
        ),
        ("[" * 600, ["run.yaml:1: not valid YAML: maximum recursion"]),
        ("a: !!python/object/apply:os.abort []", ["run.yaml:1: a: the tag"]),
        ("a: 1\nb: !local x", ["run.yaml:2: b: the tag !local"]),
        ("a: !!int x", ["run.yaml:1: a: the tag tag:yaml.org,2002:int is not supported for 'x'"]),
        ("a: !!set {b}", ["run.yaml:1: a: the tag"]),
        ("a: !!binary aGk=", ["run.yaml:1: a: the tag"]),
    ],
)
def test_every_problem_is_named_with_its_line(text: str | bytes, expected: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_a_byte_order_mark_is_not_part_of_the_first_key() -> None:
    assert Document(b"\xef\xbb\xbfa: 1", "test").data == {"a": 1}


def test_aliases_cannot_make_a_small_text_large() -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    assert len(str(Document(text, "test").data)) < 10_000


def test_a_value_laid_over_replaces_what_stood_there_and_its_place() -> None:
    document = Document("a: {b: {c: 1}, d: 2}\ne: 5", "run.yaml", count_lines=True)
    document.override(("a", "b"), 3, "override 'a.b=3'")
    document.override(("e", "f", "g"), 4, "override 'e.f.g=4'")
    assert document.data == {"a": {"b": 3, "d": 2}, "e": {"f": {"g": 4}}}
    document.add_problem(("a", "b", "c"), "one")
    document.add_problem(("e", "f"), "two")
    document.add_problem(("a", "x"), "three")
    document.add_problem(("y",), "four")
    assert document.problems == [
        "override 'a.b=3': a.b.c: one",
        "override 'e.f.g=4': e.f: two",
        "run.yaml:1: a.x: three",
        "run.yaml:1: y: four",
    ]


def test_what_could_not_be_read_is_complained_about_once() -> None:
    document = Document("a:\nb: 1", "test")
    document.add_problem(("a", "b"), "expected a number")
    document.add_problem(("b",), "expected text")
    assert document.problems == ["test: a: nothing given (null would say: none)", "test: b: expected text"]


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and list(left) == list(right) and all(same(left[key], right[key]) for key in left)
        )
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@settings(deadline=None)
@given(data=st.dictionaries(st.text(), PLAIN, min_size=1, max_size=4))
def test_what_is_written_reads_back_as_it_was(data: dict[str, Any]) -> None:
    assert same(read(dump(data)), data)


def test_shared_lists_are_written_out_where_they_stand() -> None:
    shared: list[JsonValue] = [1, 2]
    assert read(dump({"a": shared, "b": shared})) == {"a": shared, "b": shared}


@settings(deadline=None)
@given(
    text=st.sampled_from(["off", "yes", "no", "1e5", "2e-5", "1:30", "2020-01-01", "null", "~", "", "0x1f", "=", "<<"])
)
def test_written_text_is_text_to_readers_of_yaml_1_1_too(text: str) -> None:
    assert yaml.safe_load(dump({"key": text})) == {"key": text}
    assert read(dump({"key": text})) == {"key": text}


@settings(deadline=None)
@given(
    content=st.binary() | st.text().map(str.encode) | st.text(alphabet=" \n\t:-[]{},&*!|>'\"#%@`?a1.e~", max_size=60)
)
def test_any_content_is_data_or_problems_and_nothing_else(content: bytes | str) -> None:
    document = Document(content, "test")
    assert document.problems or same(read(dump(document.data)), document.data)
    assert all(math.isfinite(value) for value in [document.data] if isinstance(value, float))
