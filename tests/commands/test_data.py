"""``mpo-lightning data`` as users run it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.cli import main
from tests import processes
from tests.conftest import example_rows

Write = Callable[..., str]


def test_check_prints_a_report(
    write_jsonl: Write, tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(example_rows(40))
    out, picture = tmp_path / "check.json", tmp_path / "check.svg"
    args = ["data", "check", path, "--tokenizer", base, "--max_length", "64", "--alpha", "0.5"]
    main([*args, "--json", str(out), "--picture", str(picture), "--alpha_unit", "std"])
    printed = capsys.readouterr().out
    assert "alpha 0.5 (std)" in printed
    assert "response tokens" in printed
    # Piped: no line is cut to a width, and there are no colours.
    assert max(map(len, printed.splitlines())) > 80
    assert "\x1b" not in printed
    read = json.loads(out.read_text(encoding="utf-8"))
    assert read["total"]["read"]["groups"] == 40
    assert read["tokens"]["max_length"] == 64
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


def test_check_fails_on_bad_rows_and_if_strict_on_warnings(
    write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "responses": ["one", "one"], "scores": [1, 2]}]
    path = write_jsonl(rows)
    main(["data", "check", path])
    assert "contradicting-duplicates: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as strict:
        main(["data", "check", path, "--strict"])
    assert strict.value.code == 1
    bad = write_jsonl([*rows, {**rows[0], "scores": [1]}], "bad.jsonl")
    with pytest.raises(SystemExit) as failed:
        main(["data", "check", path, bad])
    assert failed.value.code == 1
    printed = capsys.readouterr().out
    assert f"{bad}:2: scores: found 1 scores for 2 responses" in printed
    assert "total" in printed


def test_a_picture_without_matplotlib_is_an_error_that_says_so(
    write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    path = write_jsonl(example_rows(5))
    with pytest.raises(SystemExit, match=r"error: .*mpo-lightning\[plots\]"):
        main(["data", "check", path, "--picture", str(tmp_path / "check.png")])


def test_convert_and_split(
    write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"p{i}", "responses": ["a", "b"], "scores": [1, 2]} for i in range(60)
    ]
    rows.append({"question": "p", "responses": ["a"], "scores": [1]})
    path = write_jsonl(rows)
    out = str(tmp_path / "out.parquet")
    settings = ["--columns", '{"question": "prompt"}', "--schema", "Canonical"]
    with pytest.raises(SystemExit, match=r"(?s)error: .*:61: responses.*--bad_rows drop"):
        main(["data", "convert", path, "--out", out, *settings])
    main(["data", "convert", path, "--out", out, "--bad_rows", "drop", *settings])
    printed = capsys.readouterr().out
    assert "1 rows cannot be used" in printed
    assert f"Wrote 60 groups to {out}" in printed
    parts = tmp_path / "parts"
    main(["data", "split", out, "--out", str(parts), "--fractions", '{"a": 0.5, "b": 0.5}'])
    printed = capsys.readouterr().out
    assert "(wanted 50.00%)" in printed
    assert sorted(file.name for file in parts.iterdir()) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(SystemExit, match="error: .*exists already"):
        main(["data", "split", out, "--out", str(parts), "--fractions", '{"a": 0.5, "b": 0.5}'])


def test_nothing_in_data_reaches_the_terminal_unescaped(
    write_jsonl: Write, tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\r\x9b31m\u202e"
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"p{evil}{i}",
            "responses": [f"a{evil}", f"b{evil}b", "c"],
            "scores": [1, 2, 3],
            f"m{evil}": [f"x{evil}", "y", "z"],
        }
        for i in range(4)
    ]
    rows += [
        {**rows[0], "scores": [f"bad{evil}", 1, 2]},
        {**rows[0], "prompt": [{"role": evil, "content": "x"}]},
        {"prompt": "p", "responses": [{"role": evil, "content": "x"}, "b"], "scores": [1, 2]},
    ]
    path = write_jsonl(rows)
    said = ""
    for args in (
        ["check", path, "--tokenizer", base, "--show", "2", "--by", json.dumps([f"m{evil}"])],
        ["check", path, "--schema", evil],
        ["check", path, f"--{evil}=1"],
        ["check", path, "--by", json.dumps([f"no{evil}"])],
        ["convert", path, "--out", str(tmp_path / "out.jsonl"), "--bad_rows", "drop"],
        ["convert", path, "--out", str(tmp_path / "other.jsonl")],
    ):
        try:
            main(["data", *args])
        except SystemExit as stopped:
            said += f"{stopped.code}"
        captured = capsys.readouterr()
        said += captured.out + captured.err
    assert said.count("\\x1b]0;owned\\x07\\r\\x9b31m\\u202e") > 10
    assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & set(said)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_full_disk_is_told_in_one_line(write_jsonl: Write, tmp_path: Path, name: str) -> None:
    rows = [
        {"prompt": f"p{n}", "responses": ["a" * 99, "b"], "scores": [n, n + 1]} for n in range(300)
    ]
    for command in ("convert", "split"):
        out = tmp_path / (name if command == "convert" else "parts")
        args = ["data", command, write_jsonl(rows), "--out", str(out)]
        if command == "split":
            args += ["--format", name.removeprefix("x.")]
        result = processes.run(processes.command_line, args, file_size=1000)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {out}")
        assert "File too large" in line
    assert not (tmp_path / name).exists()
    assert not list((tmp_path / "parts").iterdir())


def test_target_below_a_file_is_told_in_one_line(write_jsonl: Write) -> None:
    path = write_jsonl(example_rows(4))
    with pytest.raises(SystemExit) as caught:
        main(["data", "convert", path, "--out", f"{path}/x.jsonl"])
    assert str(caught.value).startswith(f"error: {path}: File exists. Remove the file")
