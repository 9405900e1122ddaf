"""Readers name the file and the line; writers leave the old file or the whole new one."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routewright.errors import UserError
from routewright.textfiles import check_keys, read_jsonl, read_yaml, write_atomic, write_json, write_jsonl

GOOD = '{"a": 1}\n'


@pytest.mark.parametrize("data, line, message", [
    (b"", None, "the file is empty"),
    (b"\n\n", None, "the file is empty"),
    (b'{"a": 1}\n{"a": ', 2, "cut off"),
    (b'{"a": 1}\n{"a" 2}\n{"a": 3}\n', 2, "not JSON"),
    (b'[1, 2]\n', 1, "expected a JSON object, got list"),
    (b'7\n', 1, "expected a JSON object, got int"),
    (b'null\n', 1, "expected a JSON object, got NoneType"),
    (b'{"a": NaN}\n', 1, "NaN is no JSON number"),
    (b'{"a": -Infinity}\n', 1, "-Infinity is no JSON number"),
    (b'{"a": 1, "a": 2}\n', 1, "key 'a' stands twice"),
    (b'{"a": "\xff"}\n', 1, "not valid UTF-8"),
    (b"[" * 100_000 + b"\n", 1, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}\n", 1, "not readable"),
])
def test_damaged_rows_are_named(data, line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}:" if line else f"{path}:")


def test_byte_order_mark_blank_lines_and_gzip_are_read(tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\n" + GOOD.encode())
    packed.write_bytes(gzip.compress(GOOD.encode()))
    assert [n for n, _ in read_jsonl(plain)] == [1, 3]
    assert list(read_jsonl(packed)) == [(1, {"a": 1})]


def test_cut_gzip_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    with pytest.raises(UserError, match="damaged or cut short"):
        list(read_jsonl(path))


def test_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "outcomes.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="did you mean 'outcomes.jsonl'"):
        list(read_jsonl(tmp_path / "outcome.jsonl"))


@given(st.lists(st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(), st.text(),
                                                    st.floats(allow_nan=False, allow_infinity=False))), min_size=1))
def test_rows_come_back_as_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_jsonl(folder / name, rows)
        assert [row for _, row in read_jsonl(folder / name)] == rows


def test_equal_rows_give_equal_bytes(tmp_path):
    one = write_jsonl(tmp_path / "1.jsonl.gz", [{"a": 1}]).read_bytes()
    two = write_jsonl(tmp_path / "2.jsonl.gz", [{"a": 1}]).read_bytes()
    assert one == two


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def broken(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomic(path, broken)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})


def test_yaml_numbers_and_mistakes(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-5\nbig: 2.5E+3\nname: e5\n")
    assert read_yaml(path) == {"lr": 1e-5, "big": 2500.0, "name": "e5"}
    path.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(UserError, match=r"c.yaml:3: key 'a' stands twice"):
        read_yaml(path)
    path.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not YAML"):
        read_yaml(path)
    with pytest.raises(UserError, match=r"unknown key 'lrr' \(did you mean 'lr'\?\)"):
        check_keys({"lrr": 1}, (), ("lr",), "x.yaml")


def test_gzip_damaged_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, [{"a": str(hash((i, "x")))} for i in range(5000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(UserError, match="the gzip file is damaged|not JSON|not valid UTF-8"):
        list(read_jsonl(path))
    path.write_bytes(data[:10] + b"\xff" * 100)  # no deflate stream at all
    with pytest.raises(UserError, match="the gzip file is damaged"):
        list(read_jsonl(path))


def test_half_a_surrogate_pair_survives_a_file(tmp_path):
    row = {"a": "cut \ud83d"}
    assert [found for _, found in read_jsonl(write_jsonl(tmp_path / "a.jsonl", [row]))] == [row]


@pytest.mark.parametrize(("text", "said"), [
    ("", "the file is empty"), ("- 1\n", "expected a mapping"), ("? [a]\n: 1\n", "c.yaml:1: a list cannot be a key"),
    ("a: 2026-13-45\n", "not YAML"), ("a: " + "[" * 5000, "not YAML"),
])
def test_yaml_that_is_no_mapping_of_names(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_yaml(path)


def test_a_bad_line_is_named_exactly_and_may_be_passed_over(tmp_path):
    """Five lines in one block of the file: the line of the bad bytes is named, not the line read so far."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() * 2 + b'{"a": "\xff"}\n' + b"not json\n" + GOOD.encode())
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not valid UTF-8"):
        list(read_jsonl(path))
    bad: list[UserError] = []
    assert [number for number, _ in read_jsonl(path, bad.append)] == [1, 2, 5]
    assert [str(error).split(": ")[0] for error in bad] == [f"{path}:3", f"{path}:4"]
