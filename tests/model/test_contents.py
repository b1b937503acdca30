"""Hashes of files: of all they hold, remembered only while nobody touches them."""

import hashlib
import os

import pytest
from echo_infinity import contents
from echo_infinity.contents import content_hash


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (1 << 13))
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change(path, at=1 << 20):
    """Another byte in the middle, at once: the size stays."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_in_the_middle_is_noticed(large, tmp_path):
    before = content_hash(large, tmp_path / "memo")
    assert before == sha256(large)
    change(large)
    os.utime(large, ns=(1, 1))
    assert content_hash(large, tmp_path / "memo") == sha256(large) != before


def test_a_large_file_is_read_once_and_a_small_one_leaves_no_note(large, tmp_path, monkeypatch):
    (tmp_path / "small").write_bytes(b"small")
    assert content_hash(tmp_path / "small", tmp_path / "memo") == sha256(tmp_path / "small")
    assert not (tmp_path / "memo").exists()
    first = content_hash(large, tmp_path / "memo")
    monkeypatch.setattr(contents, "_PIECE", "not read again")
    assert content_hash(large, tmp_path / "memo") == first
    assert len(list((tmp_path / "memo").iterdir())) == 1


def test_a_broken_note_and_a_memo_that_cannot_be_written_cost_nothing_but_time(large, tmp_path):
    content_hash(large, tmp_path / "memo")
    (note,) = (tmp_path / "memo").iterdir()
    note.write_text("no hash")
    assert content_hash(large, tmp_path / "memo") == sha256(large)
    assert content_hash(large, large / "memo") == sha256(large)
