"""Evaluation by lm-evaluation-harness, on a tiny model."""

import json
from math import log
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_lightning.showcase import harness
from mpo_lightning.showcase.__main__ import main
from mpo_lightning.showcase.constraints import score
from mpo_lightning.showcase.prompts import write_prompts
from tests.conftest import CORPUS, make_tokenizer, tiny_model
from tests.showcase.test_constraints import has_their_checkers


@pytest.fixture
def command(base: str, tmp_path: Path) -> list[str]:
    """The command, on a base and on another model."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(3):
        (pages / f"{number}.md").write_text(" ".join(CORPUS[number:]), encoding="utf-8")
    where = {"base": base, "prompts": tmp_path / "prompts", "text": pages}
    where |= {"tuned": tmp_path / "tuned", "out": tmp_path / "out.json"}
    return ["harness", *(f"--{name}={path}" for name, path in where.items())]


def bits_per_byte(folder: str | Path, text: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    begun = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
    with torch.no_grad():
        logps = model(begun[:, :-1]).logits.double().log_softmax(-1)
    value: float = logps.gather(2, ids[..., None]).sum().item()
    return -value / len(text.encode()) / log(2)


def test_likelihood_of_pages(
    command: list[str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--tasks", "text", "--limit", "2"])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]["text"]
    of = found["bits a byte"]
    pages = [" ".join(CORPUS), " ".join(CORPUS[1:])]
    for name, folder in (("base", base), ("tuned", tmp_path / "tuned")):
        values = [bits_per_byte(folder, page) for page in pages]
        assert of[name]["mean"] == pytest.approx(sum(values) / 2, abs=1e-3)
    gap = of["tuned"]["mean"] - of["base"]["mean"]
    assert of["difference"]["mean"] == pytest.approx(gap)
    assert abs(gap) > 0.01
    assert "| text | bits a byte |" in capsys.readouterr().out


@pytest.mark.skipif(not has_their_checkers(), reason="needs lm_eval[ifeval] and nltk's punkt_tab")
@pytest.mark.filterwarnings("ignore")
def test_their_checkers(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prompts(tmp_path / "prompts")
    monkeypatch.setattr(harness, "NEW_TOKENS", 12)
    answered: list[tuple[str, str]] = []
    measured = harness._measured

    def watched(sample: dict[str, object]) -> dict[str, float]:
        answered.append((str(sample["doc"]["prompt"]), str(sample["resps"][0][0])))  # type: ignore[index]
        return measured(sample)

    monkeypatch.setattr(harness, "_measured", watched)
    main([*command, "--tasks", "constraints", "--limit", "4"])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    ours = [score(prompt, [text])[0] for prompt, text in answered]
    strict = [
        found[split]["share met, strict"][name]["mean"]
        for name in ("base", "tuned")
        for split in ("test", "other-kinds")
    ]
    assert strict == [sum(ours[at : at + 4]) / 4 for at in (0, 4, 8, 12)]
    assert max(strict) > 0


@pytest.mark.skipif(has_their_checkers(), reason="they are there")
def test_missing_checkers_are_named(command: list[str]) -> None:
    with pytest.raises(SystemExit, match="error: IFEval's checkers need langdetect"):
        main(command)


def test_missing_pages_are_named(command: list[str], tmp_path: Path) -> None:
    for page in (tmp_path / "pages").iterdir():
        page.unlink()
    with pytest.raises(SystemExit, match="error: --text: .* has no pages"):
        main([*command, "--tasks", "text"])
