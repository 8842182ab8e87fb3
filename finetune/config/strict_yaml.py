"""YAML in the one way a configuration needs it: plain data, where each value stands, and all that is wrong with it.

Scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2), not PyYAML's 1.1: 2e-5 is a number; yes, no,
on, off, 1:30 and dates are text. Stricter than either: a key needs a value (`null` says none), no key comes twice,
numbers are decimal and finite, a whole number without a point is an integer (1e5), and there are no tags and no aliases
of sections or lists. PyYAML composes and writes; its constructors, which could build other things, are not used.
ruamel.yaml, which follows 1.2 and knows lines, ends at the first problem of a file, and takes aliases, dates and inf.
"""

import math
import re
from collections.abc import Sequence

import yaml
from pydantic import JsonValue

Path = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"
# Integers of more than 18 digits are left to float, which keeps their size.
_SCALARS = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]{1,18}$"), list("-+0123456789")),
    "float": (re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"), list("-+.0123456789")),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_DEEPEST = 16
_NOTHING = "nothing given (null would say: none)"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's name)


class _Dumper(yaml.SafeDumper):
    """Has the rules of 1.1 as well as ours, and so quotes every text that either would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's line breaks survive as escapes only, and PyYAML would write them as they are.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


class Document:
    """One text, read. `data`: None, bool, int, float, str, list or dict; `problems`: a line for each thing wrong.

    source names the text in them, with the line where count_lines is set: "run.yaml:3".
    """

    def __init__(self, text: str | bytes, source: str, *, count_lines: bool = False) -> None:
        self._source, self._count_lines = source, count_lines
        self.origins: dict[Path, str] = {(): self._origin(0)}
        self.problems: list[str] = []
        self._unread: set[Path] = set()
        self._overrides: set[str] = set()
        self._seen: set[int] = set()
        self.data: JsonValue = None
        try:
            text = text.decode("utf-8") if isinstance(text, bytes) else text
            root = yaml.compose(text, Loader=_Loader)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start)
            self._not_yaml(f"the byte 0x{error.object[error.start]:02x} is not UTF-8", line)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._not_yaml(error.problem or error.context, mark.line if mark else 0)
        except yaml.reader.ReaderError as error:
            self._not_yaml(error.reason, str(text).count("\n", 0, error.position))
        except (ValueError, OverflowError, RecursionError) as error:  # escapes outside of Unicode, brackets without end
            self._not_yaml(error, 0)
        else:
            self.data = self._refuse((), _NOTHING) if root is None else self._plain(root, ())

    def add_problem(self, path: Path, message: str, others: Sequence[Path] = ()) -> None:
        """Note what is wrong with the value at a path, or with its absence, unless it could not be read at all.

        others: paths of values beside which it is wrong. Where one of them is from an override, and the value itself is
        not, the override is named as the place of the problem.
        """
        if not any(path[:length] in self._unread for length in range(len(path) + 1)):
            origins = [self._nearest_origin(one) for one in (path, *others)]
            origin = next((one for one in origins if one in self._overrides), origins[0])
            name = ".".join(map(str, path))
            name = name if name.isprintable() else repr(name)  # a problem is one line
            self.problems.append(f"{origin}: {name}{': ' if path else ''}{message}")

    def override(self, path: tuple[str, ...], value: JsonValue, origin: str) -> None:
        """Set the value at a path of keys, which are numbers in lists; what stood there is replaced, missing sections
        are made.

        Raises:
            ValueError: a list has no such place.
        """
        if not isinstance(self.data, dict):
            return
        section: dict[str, JsonValue] | list[JsonValue] = self.data
        at: Path = ()
        for key in path[:-1]:
            at, inner = within(section, key, at)
            if not isinstance(inner, dict | list):
                inner = {}
                put(section, at[-1], inner)
                self.origins[at] = origin
            section = inner
        at, _ = within(section, path[-1], at)
        put(section, at[-1], value)
        self._overrides.add(origin)
        self.origins = {old: where for old, where in self.origins.items() if old[: len(at)] != at} | {at: origin}

    def _nearest_origin(self, path: Path) -> str:
        """Where a value is from, or that which it would be in."""
        above = (path[:length] for length in range(len(path), -1, -1))
        return next(self.origins[near] for near in above if near in self.origins)

    def _origin(self, line: int) -> str:
        return f"{self._source}:{line + 1}" if self._count_lines else self._source

    def _not_yaml(self, problem: object, line: int) -> None:
        self.origins[()] = self._origin(line)
        self._refuse((), f"not valid YAML: {problem}")

    def _refuse(self, path: Path, message: str) -> JsonValue:
        """Note that the value at a path cannot be read; None stands in."""
        self.add_problem(path, message)
        self._unread.add(path)
        return None

    def _plain(self, node: yaml.Node, path: Path) -> JsonValue:
        self.origins.setdefault(path, self._origin(node.start_mark.line))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._seen or len(path) > _DEEPEST:
            return self._refuse(path, "aliases of sections or lists, and deeper nesting, are not supported")
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._plain(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        return self._refuse(path, f"the tag {node.tag} is not supported")

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, JsonValue]:
        result: dict[str, JsonValue] = {}
        for key_node, value_node in node.value:
            named = isinstance(key_node, yaml.ScalarNode) and not _SURROGATE.search(key_node.value)
            at = (*path, key_node.value if named else "?")
            self.origins[at] = self._origin(key_node.start_mark.line)
            if not named:
                self._refuse(at, "expected a name as key")
                continue
            if key_node.value in result:
                self.add_problem(at, "the key occurs a second time")
            result[key_node.value] = self._plain(value_node, at)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> JsonValue:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "str":
            return self._refuse(path, f"{text!r} holds half a character") if _SURROGATE.search(text) else text
        if kind not in _SCALARS or not _SCALARS[kind][0].match(text):
            return self._refuse(path, f"the tag {node.tag} is not supported for {text!r}")
        if kind == "null":
            return None if text else self._refuse(path, _NOTHING)
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text)
        number = float(text)
        if not math.isfinite(number):
            return text
        return int(number) if "." not in text and number.is_integer() and abs(number) < 2**53 else number


def within(section: dict[str, JsonValue] | list[JsonValue], key: str, at: Path) -> tuple[Path, JsonValue]:
    """The path of a key in what stands at `at`, and its value there, None for what is missing.

    Raises:
        ValueError: a list has no such place.
    """
    if isinstance(section, dict):
        return (*at, key), section.get(key)
    if not key.isdecimal() or int(key) >= len(section):
        name, count = ".".join(map(str, at)), len(section)
        raise ValueError(f"{name} is a list of {count}, and has no {key!r}; expected a number below {count}")
    return (*at, int(key)), section[int(key)]


def put(section: dict[str, JsonValue] | list[JsonValue], key: str | int, value: JsonValue) -> None:
    """Set what `within` found."""
    if isinstance(section, list):
        assert isinstance(key, int), "lists have numbers"
        section[key] = value
    else:
        section[str(key)] = value


def dump(data: JsonValue) -> str:
    """YAML that `Document` reads as the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text
