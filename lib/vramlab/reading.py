"""Files that others wrote, read within bounds or refused by name.

Every reader here ends in the content or in one error that begins with the file's path: `BadFile`,
or Python's own `OSError` where the file does not exist or may not be read. Pipes, devices and
folders are refused before they are opened, since reading one may never end. Sizes are limited, and
so is the size of a YAML file with its aliases written out.

A type is an annotation (`int`, `Mapping[str, Any]`, `tuple[str, ...]`, `Literal["a", "b"]`,
`Annotated[int, limits]` with `limits.least` and `limits.most`), or plain data: {field: type} is a
mapping that has at least these fields, [type] a list, and a tuple the values that are allowed.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
import stat
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow
import yaml

MOST_TEXT_BYTES, MOST_YAML_BYTES, MOST_YAML_VALUES = 1 << 28, 1 << 19, 100_000
FILE_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Mapping: "a mapping",
}
"""Type -> its values, in words."""


class BadFile(ValueError):
    """A file that cannot be what it is read as. The message names the file, the cause and, where
    there is one, the way out."""


def regular_file(path: Path | str) -> Path:
    """The path, if it is a plain file. Raises: OSError, if it cannot be read; BadFile, for another
    kind, such as a folder or a pipe."""
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = FILE_KINDS.get(stat.S_IFMT(mode), "a device or socket")
        raise BadFile(f"{path} is {kind}: give a file")
    return path


def read_text(path: Path | str, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """A file's text, without a byte order mark. Raises: OSError; BadFile, for a file that is too
    large, or not UTF-8, with the line."""
    if (size := regular_file(path).stat().st_size) > most_bytes:
        raise BadFile(f"{path} has {size:,} bytes: at most {most_bytes:,} are read")
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadFile(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8 text"
        ) from None


def read_json(path: Path | str) -> dict:
    """The object in a JSON file. Raises: OSError; BadFile."""
    try:
        content = json.loads(read_text(path))
    except BadFile:
        raise
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError too
        raise BadFile(f"{path} is not JSON: {error}") from None
    return checked(content, {}, str(path), others=True)


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        counts = Counter(key.value for key, _ in node.value)
        if twice := [key for key, _ in node.value if counts[key.value] > 1]:
            raise yaml.MarkedYAMLError(
                problem=f"{twice[-1].value!r:.80} stands twice", problem_mark=twice[-1].start_mark
            )
        return node


# YAML 1.2 reads 1e-3 as a number; YAML 1.1, without a point, as text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path | str) -> dict:
    """The mapping of plain data in a YAML file. Raises: OSError; BadFile, also for a repeated key,
    with its line."""
    text = read_text(path, MOST_YAML_BYTES)
    try:
        content = yaml.load(text, _Loader)
        _check_plain(content, [MOST_YAML_VALUES])
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,  # `!!bool 3`
        RecursionError,
    ) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        cause = str(getattr(error, "problem", None) or error).partition("\n")[0]
        raise BadFile(f"{path}{line} is not YAML of plain data: {cause}") from None
    return checked(content, {}, str(path), others=True)


def _check_plain(value: Any, left: list[int]) -> None:
    """Raises: ValueError, for a date, a set or bytes, for keys that are not text or whole numbers,
    and for more than `left[0]` values, each alias written out: a few lines of aliases of aliases
    are billions."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {MOST_YAML_VALUES:,} values once its aliases are written out")
    if isinstance(value, int) and value.bit_length() > 14_000:  # Python does not print these
        raise ValueError("a whole number of thousands of digits")
    keys = [key for key in value if type(key) not in (str, int)] if isinstance(value, dict) else []
    if keys or not isinstance(value, str | int | float | dict | list | None):
        raise ValueError(
            f"{reprlib.repr(keys[0] if keys else value)} is neither text nor a number: put it in"
            " quotes"
        )
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_plain(part, left)


def read_table(path: Path | str) -> pd.DataFrame:
    """The table in a parquet file whose checksums match. Raises: OSError, if it cannot be read;
    BadFile."""
    regular_file(path)
    try:
        return pd.read_parquet(path, page_checksum_verification=True)
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise BadFile(f"{path} is not a whole parquet file: {error}") from None


def typed(kind: type, content: Any, where: str, **more) -> Any:
    """The dataclass `kind` from plain data, lists as tuples. `more`: fields that `content` does not
    hold. Raises: BadFile, as `checked`."""
    known = {field.name: field for field in fields(kind) if field.name not in more}
    needed = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING
    ]
    hints = typing.get_type_hints(kind, include_extras=True)
    content = checked(content, {name: hints[name] for name in known}, where, needed)
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    try:
        return kind(**values, **more)
    except ValueError as error:  # a value that the dataclass itself excludes
        raise BadFile(f"{where}: {error}") from None


def checked(
    content: Any,
    hints: Mapping[str, Any],
    where: str,
    needed: Sequence[str] = (),
    others: bool = False,
) -> dict:
    """`content`, if it is a mapping whose fields have the types in `hints`.

    Raises: BadFile, with every field that is needed and missing, of another type or, unless
    `others` are allowed, unknown.
    """
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise BadFile(
            f"{where}: its whole content is {quoted(content)}: use a mapping from names to values"
        )
    reasons = [f"no {name}, which it needs" for name in needed if name not in content]
    reasons += [] if others else unknown(content, list(hints), "it")
    reasons += faults(content, hints)
    if reasons:
        raise BadFile(f"{where}: {'; '.join(reasons)}")
    return dict(content)


def unknown(names: Iterable[Any], known: Sequence[str], owner: str) -> list[str]:
    """One sentence for each of `names` that `owner` does not have, with the nearest name that it
    has, or all of them."""
    return [
        f"{owner} has no {quoted(name)}: use"
        f" {', '.join(difflib.get_close_matches(str(name)[:80], known, 1) or known) or 'no fields'}"
        for name in names
        if name not in known
    ]


def faults(content: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One sentence for each value of `content` that is not of its type in `hints`."""
    return [
        f"{prefix}{name} is {quoted(content[name])}: use {usable(hint)}"
        for name, hint in hints.items()
        if name in content and not matches(content[name], hint)
    ]


def quoted(value: Any) -> str:
    """The value as Python writes it, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def usable(hint: Any) -> str:
    """The values of the type `hint`, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint) or hint
    if origin is Annotated:
        return f"{usable(args[0])}, {args[1]}"
    if origin is Literal or isinstance(hint, tuple):
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple or isinstance(hint, list):
        return f"a list, each item {usable(args[0])}"
    if isinstance(hint, dict):
        return f"a mapping with {', '.join(hint)}"
    return WORDS.get(origin or hint, str(hint))


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        return matches(value, args[0]) and args[1].least <= value <= args[1].most
    if isinstance(hint, dict):
        return isinstance(value, Mapping) and all(
            name in value and matches(value[name], kind) for name, kind in hint.items()
        )
    if isinstance(hint, tuple) or origin is Literal:
        return value in (args or hint)
    if isinstance(hint, list) or origin in (tuple, Sequence):
        kinds = (args or hint)[:1] * len(value) if isinstance(value, list | tuple) else ()
        fixed = origin is tuple and args[-1] is not ...
        return (
            isinstance(value, list | tuple)
            and (not fixed or len(value) == len(args))
            and all(map(matches, value, kinds))
        )
    if origin in (types.UnionType, typing.Union):
        return any(matches(value, kind) for kind in args)
    if origin is Mapping or is_dataclass(origin):  # a dataclass checks its fields when it is made
        return isinstance(value, Mapping) and all(
            matches(key, args[0]) and matches(part, args[1]) for key, part in value.items() if args
        )
    if origin in (int, float):
        return (
            isinstance(value, int | origin)
            and not isinstance(value, bool)
            and -math.inf < value < math.inf
        )
    return hint is Any or isinstance(value, origin)


def plain_name(name: str) -> bool:
    """Whether `name` can be the name of one folder, so that a path built from it stays where it
    belongs."""
    return (
        Path(name).name == name and name not in ("", "..") and "\0" not in name and len(name) < 200
    )


def nearest(name: Any, known: Iterable[str]) -> str:
    """` (did you mean lora?)`, or nothing if no known name is near: for errors about one name out
    of a set."""
    near = difflib.get_close_matches(str(name)[:80], list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""
