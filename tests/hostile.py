"""Input that readers meet in the world: damaged bytes, YAML of the wrong type, things that are no
files."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from vramlab.reading import BadFile

BOMB = "a0: &a0 [1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(12)
)
YAML = [
    b"",
    b"~",
    b"[]",
    b"- a\n- b",
    b"3",
    b"text",
    b"a: 1\na: 2",
    b"{a: 1, a: 1}",
    b"1: 2",
    b"? [a]\n: b",
    b"a: [",
    b"a: 'b",
    b"a: 2026-02-30",
    b"name: 2026-01-01",
    b"a: !!binary zzz",
    b"name: !!binary aGk=",
    b"name: !!set {a}",
    b"a: !!bool 3",
    b"a: !!int x",
    b"a: !!timestamp x",
    b"a: !!python/object/apply:os.system [ls]",
    b"a: *nobody",
    b"a: &a [*a]",
    b"a: &a {b: *a}",
    BOMB.encode(),
    b"[" * 5000,
    b"a: " + b"{b: " * 3000,
    b"a: " + b"9" * 6000,
    b"\x00",
    b"a: \xff",
    b"\xef\xbb\xbf",
    b"--- 1\n--- 2",
    b'a: "\\uD800"',
    b"a: 1\n" * 3000,
    b"<<: 3",
    b"<<: [*x]",
    b"\t- a",
    b"a: b: c",
    b"%YAML 9.9\n---\na: 1",
    b"x" * (1 << 20),
]
"""Files of YAML that are not what any reader takes."""

SCALARS = [
    None,
    True,
    False,
    0,
    -1,
    3,
    10**30,
    0.5,
    -0.0,
    math.nan,
    math.inf,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "é" * 300,
    "<!--<script>",
    [],
    {},
    [None],
    ["x"],
    [[1]],
    {"x": 1},
    {"": None},
    [{"x": []}],
    {"x": {"y": "z"}},
]
"""Values in place of others."""


def ends(does: Callable[[], Any], within_s: float = 120.0) -> Any:
    """What `does` returns, or the error it raises. Fails when it is at work for longer: a pipe that
    nobody writes to never ends."""
    box: list = []

    def run():
        try:
            box.append(does())
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(within_s)
    assert box, f"no end within {within_s} s"
    return box[0]


def refused(found: Any, path: Path) -> bool:
    """Whether it is one error of our own, or of the file system, that names the file, in a line
    that can be read."""
    assert not isinstance(found, Exception) or isinstance(found, BadFile | OSError), repr(found)
    if isinstance(found, BadFile):
        assert str(path) in str(found) and len(str(found)) < 2000, found
    return isinstance(found, Exception)


def no_files(folder: Path, suffix: str) -> list[Path]:
    """A pipe, a folder, a link to nowhere, a link to itself, a device and nothing at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        kind: folder / f"{kind}{suffix}"
        for kind in ("pipe", "folder", "nowhere", "itself", "device", "nothing")
    }
    os.mkfifo(paths["pipe"])
    paths["folder"].mkdir()
    paths["nowhere"].symlink_to(folder / "not there")
    paths["itself"].symlink_to(paths["itself"])
    paths["device"].symlink_to("/dev/zero")
    return [*paths.values()]


@st.composite
def changed(draw, content: Any, keep: tuple[str, ...] = ()) -> Any:
    """`content` with one value, at any depth outside the fields `keep`, replaced, removed or joined
    by another."""
    if isinstance(content, dict) and content and draw(st.integers(0, 3)):
        names = [name for name in content if name not in keep]
        if names:
            name = draw(st.sampled_from(names))
            return {**content, name: draw(changed(content[name], keep))}
    if isinstance(content, list) and content and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(content) - 1))
        return [*content[:at], draw(changed(content[at], keep)), *content[at + 1 :]]
    if isinstance(content, dict) and content and draw(st.booleans()):
        return {
            name: value
            for name, value in content.items()
            if name != draw(st.shared(st.sampled_from([*content])))
        }
    return draw(st.sampled_from(SCALARS))


def damages(content: bytes) -> dict[str, bytes]:
    """A file's content as a crash, a bad disk or a wrong copy leaves it."""
    half = len(content) // 2
    return {
        "empty": b"",
        "cut": content[:half],
        "without its end": content[:-1],
        "a flipped bit": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "zeros": bytes(len(content)),
        "another file": b"version https://git-lfs\n",
        "null": b"null",
        "a list": b"[]",
        "an empty object": b"{}",
        "not UTF-8": b"\xff\xfe" + content,
    }
