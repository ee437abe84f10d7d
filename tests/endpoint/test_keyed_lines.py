"""The file that remembers what was sent: what is kept after a kill, what is refused."""

import json
import threading
from pathlib import Path

import pytest

import tl_latentlens as tll
from tl_latentlens.endpoint.keyed_lines import LineKind, append_lines, read_lines

NUMBER = LineKind("a number of ours", ("number",))


def test_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_lines(path, NUMBER).by_key == {}
    with append_lines(path, NUMBER) as (writer, stored):
        assert stored.by_key == {}
        for key, number in (("a", 1), ("b", 2), ("a", 3)):
            writer.append(key, {"number": number, "more": "ü"})
    with append_lines(path, NUMBER) as (_, stored):
        assert stored.by_key == {"a": {"number": 3}, "b": {"number": 2}}
    assert len(path.read_bytes().splitlines()) == 3


def test_wherever_a_kill_cuts_the_file_whole_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with append_lines(path, NUMBER) as (writer, _):
        for number in range(3):
            writer.append(f"key {number}", {"number": number})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        n_lines = whole[:length].count(b"\n")
        with append_lines(path, NUMBER) as (writer, stored):
            assert len(stored.by_key) == n_lines
            writer.append("new", {"number": 9})
        assert path.read_bytes().count(b"\n") == n_lines + 1
        assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("content", [b"notes", b"notes\n", b"[]\n", b'{"key": "a"}\n', b'{"number": 1}\n', b"\xff\n", b"{}\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(tll.InvalidInputError, match=r"line 1 of .* is not a number of ours"), append_lines(path, NUMBER):
        pass
    assert path.read_bytes() == content


def test_one_process_writes_and_its_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with append_lines(path, NUMBER) as (writer, _):
        with pytest.raises(tll.InvalidInputError, match="is being written by another process"), append_lines(path, NUMBER):
            pass
        threads = [
            threading.Thread(target=lambda n=n: [writer.append(f"{n} {i}", {"number": i}) for i in range(20)]) for n in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_lines(path, NUMBER).by_key) == 100
