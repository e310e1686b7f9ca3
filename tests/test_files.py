"""Files that are whole or not there, folders that notice damage, and readers that name what they cannot read."""

from __future__ import annotations

import pytest

from vramlab.files import SEAL, intact, seal


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
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        assert not intact(sealed), at
        path.write_bytes(whole[:at])
        assert not intact(sealed), at
    path.write_bytes(whole)
    assert intact(sealed)
    path.unlink()
    assert not intact(sealed)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "3", '{"weights": 3}', '{"": ""}', "\0" * 20])
def test_a_seal_that_says_nothing_seals_nothing(sealed, content):
    (sealed / SEAL).write_text(content)
    assert not intact(sealed)


def test_only_the_named_files_are_sealed_where_there_are_names(sealed):
    seal(sealed, "weights")
    (sealed / "inner" / "notes").write_text("changed")
    assert intact(sealed)
    (sealed / "weights").write_text("changed")
    assert not intact(sealed)
