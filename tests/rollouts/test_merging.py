"""Merging: the merged model is the policy, written whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tokenizer, tiny_model
from mpo_lightning.cli import main
from mpo_lightning.loading import LoRA, PolicyConfig, build_policy
from mpo_lightning.policy import PolicyError
from mpo_lightning.rollouts import merging
from mpo_lightning.rollouts.merging import merge
from mpo_lightning.rollouts.parts import RolloutError

IDS = torch.arange(2, 40)[None]


def make_adapter(folder: Path, base: str, **lora: Any) -> str:
    policy = build_policy(PolicyConfig(base=base, lora=LoRA(r=4, **lora)), "auto")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    policy.save_adapter(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits.float()
    return result


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merged_model_is_the_policy(base: str, tmp_path: Path, lora: dict[str, bool]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    out = tmp_path / "merged"
    main(["merge", "--adapter", adapter, "--out", str(out)])
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - found).abs().max() > 0.1
    torch.testing.assert_close(
        found, logits(PeftModel.from_pretrained(plain, adapter)), atol=1e-4, rtol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    # It is a base like any other.
    assert build_policy(PolicyConfig(base=str(out)), "auto").is_fresh()


def test_sixteen_bits(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged in float32 and rounded once; what that loses is said."""
    half = tmp_path / "half"
    model = tiny_model().to(torch.bfloat16)
    model.config.attention_dropout = 0.25
    model.save_pretrained(half)
    make_tokenizer().save_pretrained(half)
    adapter = make_adapter(tmp_path / "adapter", str(half))
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, str(tmp_path / "a")))
    shown = capsys.readouterr().out
    assert merged.dtype == torch.bfloat16
    assert merged.config.attention_dropout == 0.25
    exact = AutoModelForCausalLM.from_pretrained(
        merge(adapter, str(tmp_path / "b"), dtype="float32")
    )
    assert "rounded away" not in capsys.readouterr().out
    assert exact.dtype == torch.float32
    update = lost = torch.zeros((), dtype=torch.float64)
    original = dict(AutoModelForCausalLM.from_pretrained(half).named_parameters())
    whole = dict(exact.named_parameters())
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, whole[name].to(torch.bfloat16))
        update = update + (whole[name] - original[name]).detach().double().square().sum()
        lost = lost + (whole[name] - weight).detach().double().square().sum()
    share = float((lost / update).sqrt())
    assert 0 < share < 1
    assert f"; {share:.1%} of the update is rounded away in bfloat16" in shown


def test_a_finished_merge_is_not_repeated(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = make_adapter(tmp_path / "adapter", base), tmp_path / "merged"
    merge(adapter, str(out))
    before = (out / "model.safetensors").stat().st_mtime_ns
    merge(adapter, str(out))
    assert "holds this merge already" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RolloutError, match="holds another merge: dtype differ"):
        merge(adapter, str(out), dtype="bfloat16")
    with pytest.raises(RolloutError, match="holds something else"):
        merge(adapter, str(tmp_path))


def test_an_interrupted_merge_leaves_nothing(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(merging.os, "fsync", full)
    with pytest.raises(RolloutError, match="merged cannot be written: No space"):
        merge(adapter, str(tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_cannot_be_merged(base: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    quantised = tmp_path / "quantised"
    tiny_model().save_pretrained(quantised)
    make_tokenizer().save_pretrained(quantised)
    config = json.loads((quantised / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config), encoding="utf-8")
    out = str(tmp_path / "merged")
    with pytest.raises(RolloutError, match=r"base: the weights of .*quantised are quantised"):
        merge(adapter, out, base=str(quantised))
    with pytest.raises(RolloutError, match=r"no adapter_config\.json"):
        merge(base, out)
    with pytest.raises((RolloutError, PolicyError), match="base: "):
        merge(adapter, out, base=str(tmp_path / "nowhere"))
    assert not (tmp_path / "merged").exists()


def test_weights_that_are_no_numbers(base: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tmp_path / "adapter", base)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, path)
    with pytest.raises(RolloutError, match="cannot be merged"):
        merge(adapter, str(tmp_path / "merged"))
