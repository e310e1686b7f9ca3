"""Files that are whole or not there, folders that notice damage, and readers that name what they
cannot read."""

from __future__ import annotations

import os
import time

import pytest

from vramlab.files import SEAL, intact, remove_stale, seal, write_whole


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "inner" / "notes").write_text("made once")
    seal(tmp_path)
    return tmp_path


def test_a_sealed_folder_is_intact_and_may_get_more_files(sealed):
    assert intact(sealed)
    (sealed / "later").write_text("came after the seal")
    assert intact(sealed)


@pytest.mark.parametrize("name", ["weights", "inner/notes", SEAL])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_noticed(sealed, name):
    path, whole = sealed / name, (sealed / name).read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not intact(sealed), at
        path.write_bytes(whole[:at])
        assert not intact(sealed), at
    path.write_bytes(whole)
    assert intact(sealed)
    path.unlink()
    assert not intact(sealed)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", "3", '{"weights": 3}', '{"": ""}', "\0" * 20]
)
def test_a_seal_that_says_nothing_seals_nothing(sealed, content):
    (sealed / SEAL).write_text(content)
    assert not intact(sealed)


def test_only_the_named_files_are_sealed_where_there_are_names(sealed):
    seal(sealed, "weights")
    (sealed / "inner" / "notes").write_text("changed")
    assert intact(sealed)
    (sealed / "weights").write_text("changed")
    assert not intact(sealed)


def test_parts_that_a_killed_process_left_go_and_those_being_written_stay(tmp_path):
    old, young = tmp_path / "a.json.11.part", tmp_path / "a.json.12.part"
    half = tmp_path / ".base-x"
    half.mkdir()
    (half / "weights").write_text("half")
    for path in (old, young):
        path.write_text("half")
    for path in (old, half):
        os.utime(path, (time.time() - 90_000,) * 2)
    write_whole(tmp_path / "a.json", "{}")
    remove_stale(tmp_path, ".base-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.json.12.part"]
