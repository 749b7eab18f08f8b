"""The command `study`: what it refuses."""

from pathlib import Path

import pytest

from mpo_lightning.cli import main
from mpo_lightning.commands import study as command


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        main(["study", "nothing", "--out", str(tmp_path)])
    for option in ("--seeds=0", "--workers=0"):
        with pytest.raises(SystemExit, match="at least 1, got 0"):
            main(["study", "skew", "--out", str(tmp_path), option])
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit, match="is a file"):
        main(["study", "skew", "--out", str(file)])
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(SystemExit, match="another program"):
        main(["study", "skew", "--out", str(tmp_path)])
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(SystemExit, match=r"need scipy: pip install 'mpo-lightning\[studies\]'"):
        main(["study", "skew", "--out", str(tmp_path / "new")])
