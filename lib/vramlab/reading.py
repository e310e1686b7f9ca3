"""Files of settings that people write, read so that every fault names its file and its value, in bounded time and memory.

    rows = read_mapping("params/regimes.yml")
    check_type("beta1", rows["full"]["rule"]["adamw"]["beta1"], "float")

A fault is a ValueError. What YAML or JSON would read as something else than was meant is a fault too: a key that stands twice,
a key that is not text, a number that is not finite.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

LIMIT_BYTES = 1 << 18
"""Largest file that is read: twenty times the longest one in `params`."""
MOST = 2**53
"""Largest number that is taken: beyond it a float no longer tells two whole numbers apart."""
TYPES = {"int": (int, f"a whole number, at most {MOST}"), "float": ((int, float), f"a number such as 1.0e-3, at most {MOST}"),
         "bool": (bool, "true or false"), "str": (str, "text"), "tuple[str, ...]": ((list, tuple), "a list of text"),
         "dict": (dict, "keys with values")}
"""A field's annotation -> what a file may have for it."""

TEXT = "tag:yaml.org,2002:str"


class _Strict(yaml.SafeLoader):
    def compose_node(self, parent, index):
        """Refuses aliases, with which a short file can hold millions of values."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"alias *{event.anchor}: write the value out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            fault = "is not text: put it in quotes" if key.tag != TEXT else "stands twice: keep one" if key.value in keys else ""
            if fault:
                raise yaml.MarkedYAMLError(problem=f"key {short(key.value)} {fault}", problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path | str) -> dict[str, Any]:
    """The mapping that a YAML file holds, or a JSON file, by its suffix.

    Raises: FileNotFoundError; ValueError, naming the file, and the line and the key where there is one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        content = file.read(LIMIT_BYTES + 1)
    if len(content) > LIMIT_BYTES:
        raise ValueError(f"{path} has more than {LIMIT_BYTES} bytes: it is no file of settings")
    try:
        content = _parse(content.decode("utf-8-sig"), path.suffix == ".json")
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a tag such as !!int x
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} {'is empty' if content is None else f'holds {short(content)}'}: it takes keys with values")
    return content


def _parse(text: str, as_json: bool) -> Any:
    return json.loads(text, object_pairs_hook=_pairs) if as_json else yaml.load(text, _Strict)  # noqa: S506, a SafeLoader


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {short(next(name for name in names if names.count(name) > 1))} stands twice: keep one")
    return found


def check_type(name: str, value: Any, kind: str) -> None:
    """Raises: ValueError, where `value` is none that a field annotated as `kind` takes; `kind` is a key of `TYPES`, with
    " | None" where it may be missing. A field of any other kind takes everything."""
    if kind.removesuffix(" | None") not in TYPES or (value is None and kind.endswith(" | None")):
        return
    types, words = TYPES[kind.removesuffix(" | None")]
    right = isinstance(value, types) and (types is bool or not isinstance(value, bool))
    if right and isinstance(value, int | float):
        right = abs(value) <= MOST  # which neither NaN nor infinity is
    if right and isinstance(value, list | tuple):
        right = all(isinstance(item, str) for item in value)
    if not right:
        raise ValueError(f"{name} is {short(value)}: use {words}")


def unknown(names: Iterable[str], known: Collection[str]) -> str:
    """`names` as text, each with the nearest of `known` where one is near: "betta1 (beta1?)"."""
    nearest = {name: difflib.get_close_matches(name[:100], known, 1) for name in sorted(names)}
    return ", ".join(short(name).strip("'\"") + (f" ({match[0]}?)" if match else "") for name, match in nearest.items())


def short(value: Any) -> str:
    """A value as an error shows it, never longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"a {type(value).__name__} too long to write"
    return text if len(text) <= 100 else f"{text[:97]}..."
