"""A pickle read as plain data, without trusting the file.

A pickle is a program. Before it runs, its bytes are walked once: only the instructions that build a
snapshot's plain data (dicts, lists, strings, numbers, pairs of numbers) are let through, no length
or memo index may point beyond the file, and no number is wider than it must be: wide numbers, and
pairs of them, include so many with equal hashes that a dict of them takes quadratic time. The
program that then runs can name no global, and its memory is bounded by a small multiple of the
file's size.
"""

from __future__ import annotations

import io
import pickle
import re

DUMP = (
    "torch.cuda.memory._record_memory_history(max_entries=200_000, stacks='python') and"
    " torch.cuda.memory._dump_snapshot"
)
CONTAINER_BYTES = 8
"""A snapshot takes at least so many bytes, on average, for each list or dict."""

_SHORT = rb"K.|M..|J.{4}"
_BELOW_2_TO_64 = (
    _SHORT
    + rb"|\x8a(?:\x01.|\x02..|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{8}\0)"
)
# One instruction of fixed length, or a pair of short numbers. A longer tuple could be a key whose
# hash takes forever.
_PLAIN = re.compile(
    rb"(?s:(?:"
    + _SHORT
    + rb"){2}\x86|h.|\x94|j.{4}|"
    + _BELOW_2_TO_64
    + rb"|[N()}\]aesu\x88\x89]|q.|G.{8}|\x95.{8})*+"
)
_STRINGS = {0x8C: 1, 0x58: 4, 0x8D: 8}  # instruction -> width of the length before its bytes
_LONG_PUT, _STOP, _PROTOCOL = 0x72, 0x2E, 0x80
# behind a pickle that was cut out of a page of memory_viz
_PADDING = (b"", b"\0", b"\0\0", b"\0\0\0")
# instructions in the middle of which a file can end, and the bytes of the longest
_LONG, _LONGEST_BYTES = b"KMJGhjqr\x8a\x95", 10
_MISTAKEN = {  # the beginnings of files that are mistaken for snapshots
    b"\x1f\x8b": "this is gzip: gunzip it first",
    b"version https://git-lfs": "this is a Git LFS pointer, a note in place of the snapshot: fetch"
    " the file with git lfs pull",
    b"<": "this is a web page, as memory_viz writes with a snapshot inside: replay the .pickle that"
    " the page was made from",
    b"PK": "this is a zip archive, as torch.save writes: torch.load it and write it again with"
    " pickle.dump",
    b"{": f"this is JSON, not a pickle: record one with {DUMP}",
    b"[": f"this is JSON, not a pickle: record one with {DUMP}",
}


def load_plain(data: bytes):
    """The plain data that a pickle's bytes hold. Raises: ValueError, with what is wrong and the way
    out."""
    _check_size(data)
    _check_instructions(data)
    try:
        return _DataOnly(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(
            f"the pickle is damaged ({type(error).__name__}: {error}): record it again with {DUMP}"
        ) from None


class _DataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _check_size(data: bytes) -> None:
    if not data:
        raise ValueError(f"the file is empty: its dump did not finish; record it again with {DUMP}")
    if data.count(b"]") + data.count(b"}") > 100 + len(data) // CONTAINER_BYTES:
        raise ValueError(
            f"more lists and dicts than {len(data)} bytes of a snapshot have: this is not what"
            f" _dump_snapshot writes; record one with {DUMP}"
        )
    for beginning, explanation in _MISTAKEN.items():
        if data[:64].lstrip().startswith(beginning):
            raise ValueError(explanation)


def _check_instructions(data: bytes) -> None:
    """Walk the instructions without running them. Raises: ValueError."""
    at = 2 if data[0] == _PROTOCOL else 0
    while True:
        at = _PLAIN.match(data, min(at, len(data))).end()  # type: ignore[union-attr]  # never None
        op = data[at] if at < len(data) else None
        if op in _STRINGS:
            width = _STRINGS[op]
            at += 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")
        elif op == _LONG_PUT and int.from_bytes(data[at + 1 : at + 5], "little") < len(data):
            at += 5
        elif op == _STOP and data[at + 1 :] in _PADDING:
            return
        elif op is None or (op in _LONG and len(data) - at <= _LONGEST_BYTES):
            raise ValueError(
                "the file ends in the middle: its dump or its copy did not finish; record it again"
                f" with {DUMP}"
            )
        else:
            raise ValueError(
                f"byte {at} is {op:#04x}, which no snapshot has: this is not what _dump_snapshot"
                f" writes, and it was not run; record one with {DUMP}"
            )
