"""Rows survive a kill, and belong to one set of settings."""

import pytest
from echo_infinity.evaluation.journal import Journal, read_rows, read_settings


def test_rows_are_read_back_in_order_and_the_last_of_a_key_wins(tmp_path):
    journal = Journal(tmp_path / "run" / "recall.jsonl", {"seed": 1, "steps": (1, 2)})
    journal.append([{"number": 10, "right": False}, {"number": 2, "right": True}])
    again = Journal(journal.path, {"seed": 1, "steps": (1, 2)})
    again.append([{"number": 10, "right": True}])
    assert read_rows(journal.path) == again.rows
    assert again.latest("number") == [{"number": 10, "right": True}, {"number": 2, "right": True}]
    assert read_settings(journal.path) == {"seed": 1, "steps": [1, 2]}


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path):
    journal = Journal(tmp_path / "recall.jsonl", {})
    journal.append([{"number": 0}, {"number": 1}])
    data = journal.path.read_bytes()
    journal.path.write_bytes(data[:-4])
    again = Journal(journal.path, {})
    assert again.rows == [{"number": 0}]
    again.append([{"number": 1}])
    assert journal.path.read_bytes() == data


def test_other_settings_are_refused_with_both_values(tmp_path):
    Journal(tmp_path / "recall.jsonl", {"seed": 1, "sight": 2})
    with pytest.raises(ValueError, match=r"seed \(then 1, now 4\); give another --out or --name, or --restart"):
        Journal(tmp_path / "recall.jsonl", {"seed": 4, "sight": 2})


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"number": 0}\n')
    (tmp_path / "b.jsonl").write_text("settings\n")
    with pytest.raises(ValueError, match="no journal of an evaluation"):
        Journal(tmp_path / "a.jsonl", {})
    with pytest.raises(ValueError, match="a line that is no JSON"):
        Journal(tmp_path / "b.jsonl", {})
    assert read_rows(tmp_path / "missing.jsonl") == []
