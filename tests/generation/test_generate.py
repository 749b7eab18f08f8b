"""Generation: the same tokens as the model's own logits give, prompts computed once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.prompts import request
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.tokens import GroupTokenizer
from mpo_lightning.errors import RolloutError
from mpo_lightning.files import adapter_folder
from mpo_lightning.generation import generate as generation
from mpo_lightning.generation.generate import ModelSampler, Sampling
from mpo_lightning.generation.model import ModelConfig, load_sampler, model_identity
from mpo_lightning.model.loading import LoRA, PolicyConfig, build_policy
from mpo_lightning.model.policy import PolicyError
from tests.conftest import make_tokenizer, tiny_config, tiny_model
from tests.model.architectures import multimodal_config

PROMPTS = ["Name a fruit.", "Why is the sky blue? The dog does not mind, and sleeps at last.", "Hi"]
SIZES = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1}
LLAMA_LIKE: dict[str, Any] = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
OLD: dict[str, Any] = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2}
CONFIGS = {
    "llama": tiny_config(),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "mistral with a window": MistralConfig(**LLAMA_LIKE, sliding_window=8),
    "gemma2": Gemma2Config(**LLAMA_LIKE, head_dim=8, sliding_window=8),
    "gpt2": GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4),
    "opt": OPTConfig(**OLD, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(**OLD, num_attention_heads=4),
    "mamba": MambaConfig(**OLD, state_size=8),
    "gemma3, a wrapper": multimodal_config("gemma3"),
}


def by_rules_of_training(tokenizer: Any) -> GroupTokenizer:
    return GroupTokenizer(
        tokenizer,
        max_length=10_000,
        over_long="error",
        prompt_format="auto",
        boundary="strict",
    )


def make_sampler(model: Any, responses_per_batch: int = 64, **settings: Any) -> ModelSampler:
    sampling = Sampling(**{"n": 3, "max_new_tokens": 10, "seed": 1, **settings})
    return ModelSampler(
        model,
        by_rules_of_training(make_tokenizer()),
        sampling,
        responses_per_batch=responses_per_batch,
    )


def one_by_one(
    sampler: ModelSampler, prompt: str, slot: int, limit: int | None = None
) -> tuple[int, ...]:
    """The oracle: a response alone, from the full logits of all tokens so far, in float64."""
    sampling, item = sampler.sampling, request(prompt)
    numbers = generation._uniforms(sampling.seed, item.key, slot, sampling.max_new_tokens)
    ids = sampler.tokenizer.prompt_ids(prompt, "prompt")
    start = len(ids)
    for number in numbers.tolist()[:limit]:
        with torch.no_grad():
            logits = sampler.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            logits /= sampling.temperature
            order = logits.argsort(descending=True)
            if sampling.top_k:
                logits[order[sampling.top_k :]] = -torch.inf
            mass = logits.softmax(-1)[order].cumsum(-1)
            # The least set that has the mass: a token stays while those before it have not.
            logits[order[1:][mass[:-1] >= sampling.top_p]] = -torch.inf
            ends = logits.softmax(-1).cumsum(-1)
            token = int((ends <= number * ends[-1]).sum())
        ids.append(token)
        if token in sampler.stops:
            break
    return tuple(ids[start:])


def assert_as_one_by_one(sampler: ModelSampler) -> None:
    answers = sampler([request(prompt) for prompt in PROMPTS])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.samples) == sampler.sampling.n
        for slot, sample in enumerate(answer.samples):
            assert sample.ids == one_by_one(sampler, prompt, slot)
            assert (sample.finish == "stop") == (sample.ids[-1] in sampler.stops)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_tokens_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unequal lengths in one batch, their keys and values shared where that can be.

    In several rounds, after each of which the responses that have ended leave.
    """
    monkeypatch.setattr(generation, "ROUND", 3)
    shared = []
    computed = ModelSampler._computed_prompts

    def noted(self: Any, *args: Any) -> Any:
        cache = computed(self, *args)
        shared.append(cache is not None)
        return cache

    monkeypatch.setattr(ModelSampler, "_computed_prompts", noted)
    sampler = make_sampler(tiny_model(CONFIGS[name]))
    # One token of eight ends a response.
    sampler.stops = list(range(0, 384, 8))
    assert_as_one_by_one(sampler)
    assert shared == [name != "mamba"]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0, "n": 1},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 5},
        {"top_k": 20, "top_p": 0.5},
        # One prompt's responses in several passes.
        {"n": 5, "responses_per_batch": 2},
    ],
)
def test_settings(settings: dict[str, Any]) -> None:
    assert_as_one_by_one(make_sampler(tiny_model(), **settings))


def test_greedy_as_transformers_generates() -> None:
    model = tiny_model()
    sampler = make_sampler(model, n=1, temperature=0)
    for prompt, answer in zip(PROMPTS, sampler([request(p) for p in PROMPTS]), strict=True):
        ids = torch.tensor([sampler.tokenizer.prompt_ids(prompt, "prompt")])
        plain = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=1)
        assert answer.samples[0].ids == tuple(plain[0, ids.shape[1] :].tolist())


def test_frequencies_are_the_probabilities() -> None:
    """First tokens of 4000 responses: chi-square against the model's own distribution."""
    sampler = make_sampler(tiny_model(), n=4000, max_new_tokens=1, responses_per_batch=4000)
    (answer,) = sampler([request("Hi")])
    ids = torch.tensor([sampler.tokenizer.prompt_ids("Hi", "prompt")])
    expected = 4000 * sampler.model(ids).logits[0, -1].detach().double().softmax(-1)
    drawn = torch.tensor([sample.ids[0] for sample in answer.samples])
    found = torch.bincount(drawn, minlength=384)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    # 383 degrees of freedom: mean 383, standard deviation 28.
    assert 383 - 5 * 28 < chi_square < 383 + 5 * 28


def test_a_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    sampler = make_sampler(model, n=8, max_new_tokens=4)
    prompt = " ".join(PROMPTS * 5)
    length = len(sampler.tokenizer.prompt_ids(prompt, "prompt"))
    tokens = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    sampler([request(prompt)])
    # All but the last of the prompt once, then one token a step of each response.
    assert tokens == [length - 1, 8, 8, 8, 8]


def test_ended_responses_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rounds of three tokens, the same responses of fewer tokens computed."""
    model = tiny_model()
    sampler = make_sampler(model, n=8, max_new_tokens=12)
    # One token of eight ends a response.
    sampler.stops = list(range(0, 384, 8))
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    together = sampler([request(prompt) for prompt in PROMPTS])
    assert set(rows[1:]) == {8 * len(PROMPTS)}
    rows.clear()
    monkeypatch.setattr(generation, "ROUND", 3)
    assert sampler([request(prompt) for prompt in PROMPTS]) == together
    lengths = [len(sample.ids) for answer in together for sample in answer.samples]
    # Rows go on to the end of the round in which they end, and stop with the last of all.
    assert rows[1:] == [
        sum(length > step // 3 * 3 for length in lengths) for step in range(max(lengths))
    ]
    assert len(set(rows[1:])) > 2


def test_numbers_depend_on_prompt_and_seed_alone() -> None:
    model = tiny_model()
    sampler = make_sampler(model)
    together = sampler([request(p) for p in PROMPTS])
    assert sampler([request(p) for p in reversed(PROMPTS)]) == together[::-1]
    assert [sampler([request(p)])[0] for p in PROMPTS] == together
    # More responses: the first are the same.
    assert make_sampler(model, n=5)([request("Hi")])[0].samples[:3] == together[2].samples
    texts = {sample.text for sample in together[2].samples}
    for other in (
        make_sampler(model, seed=2)([request("Hi")]),
        sampler([request("Hi", occurrence=1)]),
    ):
        assert texts.isdisjoint(sample.text for sample in other[0].samples)


def test_what_a_model_brings_along_is_left_out() -> None:
    model = tiny_model()
    expected = make_sampler(model)([request("Hi")])
    model.generation_config.update(temperature=0.1, top_k=1, do_sample=True)
    model.generation_config.update(repetition_penalty=9.0, min_new_tokens=5)
    brought = model.generation_config
    assert make_sampler(model)([request("Hi")]) == expected
    assert model.generation_config is brought


def test_every_end_is_an_end() -> None:
    """A model may name more ends of turn than its tokenizer: each ends a response."""
    model = tiny_model()
    ids = make_sampler(model)([request("Hi")])[0].samples[0].ids
    model.generation_config.eos_token_id = [1, ids[4]]
    sample = make_sampler(model)([request("Hi")])[0].samples[0]
    assert sample.ids == ids[: ids.index(ids[4]) + 1]
    assert sample.finish == "stop"


def test_end_of_turn_ends_a_response() -> None:
    """Where the template ends a turn with another token than the tokenizer's end of sequence."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<|system|>")
    rules = by_rules_of_training(tokenizer)
    assert rules.end_of_turn == tokenizer.convert_tokens_to_ids("<|system|>")
    assert ModelSampler(tiny_model(), rules, Sampling()).stops == [1, rules.end_of_turn]


def test_text_of_a_cut_response() -> None:
    sampler = make_sampler(tiny_model())
    tokenizer = sampler.tokenizer.tokenizer
    ids = tokenizer("a ü", add_special_tokens=False)["input_ids"]
    # The letter takes two bytes, here two tokens: half of it is no text.
    cut = sampler._sample(ids[:-1], [])
    assert (cut.text, cut.finish, cut.special_tokens) == ("a ", "length", 0)
    whole = sampler._sample([*ids, 1, 1], [])
    assert (whole.text, whole.finish, whole.ids) == ("a ü", "stop", (*ids, 1))
    odd = sampler._sample([*ids, 3, *ids, 1], [])
    assert (odd.text, odd.special_tokens, odd.message) == ("a üa ü", 1, None)


# Tokenizers that parse their own responses: GPT-OSS's channels, thinking of several kinds.
TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<|system|>", "close": "<|user|>"},
        "content": {"close": "<|eos|>"},
    },
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|system|>a b<|user|>c", {"role": "assistant", "thinking": "a b", "content": "c"}),
        ("<|system|><|user|>c", "c"),
        ("no tokens", "no tokens"),
        # Nothing after the reasoning: no answer.
        ("<|system|>a b", {"role": "assistant", "thinking": "a b", "content": ""}),
        ("a <|assistant|>b", None),
        # A token in a field's midst, which the template does not know.
        ("<|system|>a b<|user|>c<|bos|>d", None),
    ],
)
def test_a_tokenizer_may_say_how_responses_are_parsed(text: str, expected: Any) -> None:
    sampler = make_sampler(tiny_model())
    tokenizer = sampler.tokenizer.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = sampler.tokenizer.prompt_ids("Hi", "x")
    tokenizer.response_template = TEMPLATE
    found = sampler._sample([*ids, 1], prompt)
    if expected is None:
        assert (found.message, found.special_tokens) == (None, text.count("<|"))
    else:
        assert (found.response, found.special_tokens) == (expected, 0)
    assert found.empty == (found.text == "")
    tokenizer.response_template = None
    plain = sampler._sample([*ids, 1], prompt)
    assert (plain.message, plain.special_tokens) == (None, text.count("<|"))


def test_prompt_tokens_are_those_of_training() -> None:
    rules = by_rules_of_training(make_tokenizer())
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Two?"},
    ]
    group = PreferenceGroup(prompt, ["Two.", "No."], [1.0, 0.0], "x:1", {})
    tokens = rules(group, DataReport("x"))
    assert tokens is not None
    assert rules.prompt_ids(prompt, "x:1") == tokens.prompt.tolist()
    with pytest.raises(DataError, match=r"x:1: prompt.*template refuses it"):
        rules.prompt_ids([{"role": "tool", "content": "3"}], "x:1")


def test_plain_text() -> None:
    """Without a template, prompt and response are one text."""
    rules = by_rules_of_training(make_tokenizer(chat=False))
    group = PreferenceGroup("Name a fruit:", [" Apple.", " Pear."], [1.0, 0.0], "x:1", {})
    tokens = rules(group, DataReport("x"))
    assert tokens is not None
    assert rules.prompt_ids("Name a fruit:", "x:1") == tokens.prompt.tolist()
    sampler = ModelSampler(tiny_model(), rules, Sampling(n=1, max_new_tokens=5))
    conversation = request([{"role": "user", "content": "Hi"}], "x:2")
    other = request([{"role": "user", "content": "Ho"}], "x:3")
    with pytest.raises(DataError, match=r"2 rows cannot be used:\s+x:2: prompt: found a conv"):
        sampler([request("Hi"), conversation, other])
    assert sampler([request("Hi")])[0].samples[0].ids == one_by_one(sampler, "Hi", 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_use_what_the_context_leaves(name: str) -> None:
    """GPT-2 has no position beyond its context; the others of a batch do not matter."""
    size = {"n_positions": 40} if name == "gpt2" else {"max_position_embeddings": 40}
    model = tiny_model(type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), **size}))
    sampler = make_sampler(model, max_new_tokens=30)
    prompts = ["Hi", "Ho", "Name a fruit.", "Why is it blue?", "Why? " * 40, "Hi there"]
    lengths = [len(sampler.tokenizer.prompt_ids(prompt, "x")) for prompt in prompts]
    answers = sampler([request(prompt) for prompt in prompts])
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        if length >= 40:
            assert answer.refused == "with a prompt that leaves no room to answer"
            continue
        assert answer.limit == min(30, 40 - length)
        for slot, sample in enumerate(answer.samples):
            whole = one_by_one(sampler, prompt, slot, answer.limit)
            assert sample.ids == whole
    assert {answer.limit for answer in answers} > {30, None}
    (alone,) = sampler([request(prompts[3])])
    assert alone == answers[3]


def test_logits_that_are_no_numbers() -> None:
    model = tiny_model()
    model.lm_head.weight.data[7] = torch.nan
    for settings in ({}, {"temperature": 0, "n": 1}):
        with pytest.raises(RolloutError, match="not numbers"):
            make_sampler(model, **settings)([request("Hi")])


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"temperature": 0.0, "n": 2},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(RolloutError, match=next(iter(wrong))):
        Sampling(**wrong)


# ------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter as a run leaves it, which does something."""
    policy = build_policy(PolicyConfig(base=base, lora=LoRA(r=4)), "auto")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    folder = adapter_folder(tmp_path_factory.mktemp("run") / "last.ckpt")
    policy.save_adapter(folder)
    return str(folder)


def test_adapter(base: str, adapter: str) -> None:
    from peft import PeftModel

    sampling = Sampling(n=2, max_new_tokens=8)
    sampler = load_sampler(ModelConfig(base=base, adapter=adapter), sampling)
    assert not sampler.model.training
    merged = PeftModel.from_pretrained(tiny_model(), adapter).merge_and_unload()
    found = sampler([request("Hi")])
    plain = ModelSampler(merged, sampler.tokenizer, sampling)
    assert found == plain([request("Hi")])
    assert found != load_sampler(ModelConfig(base=base), sampling)([request("Hi")])
    # The adapter knows its base.
    assert load_sampler(ModelConfig(adapter=adapter), sampling)([request("Hi")]) == found


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised(base: str, adapter: str, quantization: Any) -> None:
    """The policy that training sees in so many bits is the one that answers."""
    config = ModelConfig(base=base, adapter=adapter, quantization=quantization)
    sampler = load_sampler(config, Sampling(n=2, max_new_tokens=8))
    layer = sampler.model.model.layers[0].mlp.up_proj
    assert (
        type(layer.base_layer).__name__
        == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]
    )
    for slot, sample in enumerate(sampler([request("Hi")])[0].samples):
        assert sample.ids == one_by_one(sampler, "Hi", slot)


def test_an_adapter_s_other_base_is_told(
    base: str, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_sampler(ModelConfig(base=base, adapter=adapter), Sampling())
    assert "names" not in capsys.readouterr().out
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    load_sampler(ModelConfig(base=str(moved), adapter=adapter), Sampling())
    assert f"names {base} as its base; it is loaded on {moved}" in capsys.readouterr().out


def test_what_cannot_be_loaded(base: str, adapter: str, tmp_path: Path) -> None:
    sampling = Sampling()
    with pytest.raises(PolicyError, match=r"^model\.base: .*mpo-lightning export --merged"):
        load_sampler(ModelConfig(base=adapter), sampling)
    with pytest.raises(PolicyError, match=r"model\.adapter: .*no adapter_config"):
        load_sampler(ModelConfig(base=base, adapter=str(tmp_path)), sampling)
    with pytest.raises(RolloutError, match=r"model\.base: name"):
        load_sampler(ModelConfig(), sampling)
    with pytest.raises(DataError, match=r"^model\.tokenizer: "):
        load_sampler(ModelConfig(base=base, tokenizer=str(tmp_path)), sampling)
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    with pytest.raises(PolicyError, match=r"Pickled weights .* are not loaded"):
        load_sampler(ModelConfig(base=base, adapter=str(pickled)), sampling)
    other = tmp_path / "wider"
    tiny_model(tiny_config(hidden_size=64)).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(PolicyError, match=r"model\.adapter: .* does not fit"):
        load_sampler(ModelConfig(base=str(other), adapter=adapter), sampling)


def test_adapter_for_more_layers(adapter: str, tmp_path: Path) -> None:
    tiny_model(tiny_config(num_hidden_layers=1)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"does not fit .* in one of the two only, such as"):
        load_sampler(ModelConfig(base=str(tmp_path), adapter=adapter), Sampling())


def test_identity_knows_the_weights(base: str, adapter: str, tmp_path: Path) -> None:
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    config = ModelConfig(base=base, adapter=str(copied))
    before = model_identity(config)
    assert before["adapter_files"] == model_identity(ModelConfig(adapter=adapter))["adapter_files"]
    weights = copied / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = model_identity(config)
    assert [name for name in after if after[name] != before[name]] == ["adapter_files"]
