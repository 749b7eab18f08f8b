"""Scorers: a reward model's scores do not depend on the batch; functions are checked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from mpo_lightning.data.groups import DataError
from mpo_lightning.errors import RolloutError
from mpo_lightning.rollouts.scorers import (
    FunctionScorer,
    RewardModel,
    RewardModelConfig,
    Scorable,
    load_reward_model,
)
from tests.conftest import CHAT_TEMPLATE, make_tokenizer, tiny_config

SMALL: dict[str, Any] = {
    **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
    "pad_token_id": None,
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]
ITEMS = [
    Scorable(
        "Name a fruit.", ["An apple.", "A pear grows on a tree, and so does an apple."], "x:1"
    ),
    Scorable(CHAT, ["One, two, three, four, five. " * 4, "No", "One<|eos|>"], "x:2"),
]
MODELS: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForSequenceClassification, tiny_config(num_labels=1)),
    "llama, padding is the end": (
        LlamaForSequenceClassification,
        tiny_config(num_labels=1, pad_token_id=1),
    ),
    "gpt2": (
        GPT2ForSequenceClassification,
        GPT2Config(
            **{"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "num_labels": 1},
            **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
        ),
    ),
}
PAIR_MODELS = {
    "bert": (BertForSequenceClassification, BertConfig),
    "roberta": (RobertaForSequenceClassification, RobertaConfig),
}


def make_model(kind: type, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.float().eval()


def save(folder: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def alone(model: Any, tokenizer: Any, item: Scorable, response: str) -> float:
    """The oracle: as a model's card says it, one conversation, nothing else."""
    prompt: Any = item.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": response}], return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        return float(model(ids).logits[0, 0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("responses_per_batch", [1, 2, 16])
def test_scores_are_those_of_each_response_alone(
    name: str, responses_per_batch: int, tmp_path: Path
) -> None:
    model, tokenizer = make_model(*MODELS[name]), make_tokenizer()
    path = save(tmp_path, model)
    counts: list[int] = []
    scorer = load_reward_model(
        RewardModelConfig(path=path, responses_per_batch=responses_per_batch)
    )
    scores = scorer(ITEMS, counts.append)
    assert sum(counts) == len(ITEMS)
    expected = [[alone(model, tokenizer, item, r) for r in item.responses] for item in ITEMS]
    for found, wanted in zip(scores, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    # Large enough that another token's score would be seen.
    assert np.std([value for row in expected for value in row]) > 0.05
    assert scorer.model.config.pad_token_id == model.config.pad_token_id


@pytest.mark.parametrize("name", PAIR_MODELS)
def test_pairs_of_texts(name: str, tmp_path: Path) -> None:
    kind, config = PAIR_MODELS[name]
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_labels": 1}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = make_model(kind, config(**sizes, **heads, pad_token_id=5))
    tokenizer = make_tokenizer(chat=False)
    scorer = load_reward_model(RewardModelConfig(path=save(tmp_path, model, tokenizer)))
    assert scorer.max_length == (64 if name == "bert" else 58)
    item = Scorable([{"role": "user", "content": "Why?"}], ["So.", "The dog sleeps", "o" * 80], "x")
    (scores,) = scorer([item])
    with torch.no_grad():
        for response, found in zip(item.responses[:2], scores, strict=False):
            logits = model(**tokenizer("Why?", response, return_tensors="pt")).logits
            assert found == pytest.approx(float(logits), abs=1e-5)
    assert scores[2] is None
    with pytest.raises(DataError, match="x:2: prompt: found 2 messages"):
        scorer(ITEMS)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "nf4"}])
def test_fewer_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(*MODELS["llama"])
    scorer = load_reward_model(RewardModelConfig(path=save(tmp_path, model), **settings))
    if "quantization" in settings:
        assert type(scorer.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        assert type(scorer.model.score) is torch.nn.Linear
    else:
        assert scorer.model.dtype == torch.bfloat16
    batch = scorer(ITEMS)
    singly = RewardModel(scorer.model, scorer.tokenizer, RewardModelConfig(responses_per_batch=1))
    for found, wanted in zip(batch, singly(ITEMS), strict=True):
        assert found == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(
    ("kind", "config", "weights"),
    [
        (LlamaForSequenceClassification, tiny_config(num_labels=1), {}),
        (
            LlamaForSequenceClassification,
            tiny_config(num_labels=2),
            {"LABEL_0": np.float32(0.5), "LABEL_1": -0.25},
        ),
        (Qwen2ForSequenceClassification, Qwen2Config(**SMALL, num_labels=1), {}),
        (Gemma2ForSequenceClassification, Gemma2Config(**SMALL, head_dim=8, num_labels=1), {}),
        (GPT2ForSequenceClassification, MODELS["gpt2"][1], {}),
    ],
)
def test_sixteen_bits_make_no_ties(
    kind: type, config: Any, weights: dict[str, float], tmp_path: Path
) -> None:
    """The head in float32, by the same weights and last hidden states in float64; scores near 20.

    In bfloat16 scores near 20 are multiples of 1/8.
    """
    item = Scorable("Name a fruit.", [f"A fruit is a {word}." for word in "abcdefgh"], "x:1")
    model = make_model(kind, config)
    states = last_states(model, item)
    # Along the mean of the last states, all scores lie together.
    direction = states.mean(0)
    with torch.no_grad():
        model.score.weight += 20 * direction / direction.square().sum()
    path = save(tmp_path, model.bfloat16())
    # Beside others a state is rounded otherwise.
    config = RewardModelConfig(path=path, weights=weights, responses_per_batch=1)
    scorer = load_reward_model(config)
    assert scorer.model.dtype == torch.bfloat16
    (scores,) = scorer([item])
    with torch.no_grad():
        logits = last_states(scorer.model, item).double() @ model.score.weight.double().T
    by_hand = (logits @ scorer.weights.double()).tolist()
    assert scores == pytest.approx(by_hand, abs=1e-4)
    assert len({round(score, 4) for score in map(float, scores)}) == 8
    assert min(map(abs, by_hand)) > 3
    # In 16 bits they would not be these.
    assert max(abs(float(torch.tensor(score).bfloat16()) - score) for score in by_hand) > 0.005


def last_states(model: Any, item: Scorable) -> torch.Tensor:
    """Last hidden state of each response's last token, float32 (N, hidden)."""
    found = []
    for response in item.responses:
        ids = make_tokenizer().apply_chat_template(
            [
                {"role": "user", "content": item.prompt},
                {"role": "assistant", "content": response},
            ],
            return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            found.append(model.base_model(ids).last_hidden_state[0, -1].float())
    return torch.stack(found)


def test_a_head_that_is_not_known_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(*MODELS["llama"]).bfloat16()
    model.HEAD = model.score
    del model.score
    RewardModel(model, make_tokenizer(), RewardModelConfig())
    assert capsys.readouterr().out == (
        "LlamaForSequenceClassification computes scores in bfloat16: near 20 they are multiples of "
        "0.125, and differences below that become ties. Set reward_model.dtype: float32.\n"
    )


def test_weights_of_labels(tmp_path: Path) -> None:
    labels = {0: "helpful", 1: "brief", 2: "kind"}
    config = tiny_config(id2label=labels, label2id={v: k for k, v in labels.items()})
    model = make_model(LlamaForSequenceClassification, config)
    path = save(tmp_path, model)
    weights = {"helpful": 0.5, "kind": -2.0}
    scores = load_reward_model(RewardModelConfig(path=path, weights=weights))(ITEMS[:1])
    ids = make_tokenizer().apply_chat_template(
        [
            {"role": "user", "content": ITEMS[0].prompt},
            {"role": "assistant", "content": ITEMS[0].responses[0]},
        ],
        return_tensors="pt",
    )["input_ids"]
    logits = model(ids).logits[0].tolist()
    assert scores[0][0] == pytest.approx(0.5 * logits[0] - 2.0 * logits[2], abs=1e-5)
    with pytest.raises(RolloutError, match=r"labels helpful, brief, kind; none is named"):
        load_reward_model(RewardModelConfig(path=path))
    with pytest.raises(RolloutError, match=r"unknown are \['funny'\]"):
        load_reward_model(RewardModelConfig(path=path, weights={"funny": 1.0}))


def test_a_language_model_is_no_reward_model(base: str, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"lacks score\.weight, so its scores would be random"):
        load_reward_model(RewardModelConfig(path=base))
    with pytest.raises(RolloutError, match="cannot be loaded as a sequence classifier"):
        load_reward_model(RewardModelConfig(path=str(tmp_path)))


def test_a_batch_that_changes_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that reads its last column, whatever stands there."""

    def careless(self: Any, input_ids: Any, **_: Any) -> Any:
        class Output:
            logits = input_ids[:, -1:].float()

        return Output()

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", careless)
    model = make_model(*MODELS["llama"])
    with pytest.raises(RolloutError, match=r"alone and .* beside longer ones"):
        RewardModel(model, make_tokenizer(), RewardModelConfig())(ITEMS)


def test_scores_that_are_no_numbers() -> None:
    model = make_model(*MODELS["llama"])
    model.score.weight.data[:] = torch.nan
    with pytest.raises(RolloutError, match=r"x:1: responses\[0\]: the reward model gives nan"):
        RewardModel(model, make_tokenizer(), RewardModelConfig(responses_per_batch=1))(ITEMS)


def test_input_format() -> None:
    model = make_model(*MODELS["llama"])
    with pytest.raises(RolloutError, match="no chat template"):
        RewardModel(model, make_tokenizer(chat=False), RewardModelConfig(input_format="chat"))
    refused = Scorable([{"role": "tool", "content": "3"}], ["a", "b"], "x:9")
    with pytest.raises(DataError, match=r"x:9: prompt: .*template refuses it"):
        RewardModel(model, make_tokenizer(), RewardModelConfig())([refused])


# ------------------------------------------------------------------------------------ functions


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the user's with functions that score."""
    name = f"scorers_{tmp_path.name.replace('-', '_')}"
    path = tmp_path / f"{name}.py"
    path.write_text(
        "import numpy, torch\n"
        "def lengths(prompt, responses): return [len(r) for r in responses]\n"
        "def array(prompt, responses): return numpy.array([len(r) for r in responses])\n"
        "def tensor(prompt, responses): return torch.tensor([len(r) / 2 for r in responses])\n"
        "def column(prompt, responses): return numpy.array([[len(r)] for r in responses])\n"
        "def halves(prompt, responses): return [numpy.float16(len(r)) for r in responses]\n"
        "def truths(prompt, responses): return [numpy.bool_(len(r) > 9) for r in responses]\n"
        "def sixteen(prompt, responses): return torch.ones(len(responses)).bfloat16()\n"
        "def unknown(prompt, responses): return numpy.full(len(responses), numpy.nan)\n"
        "def fewer(prompt, responses): return [1.0]\n"
        "def endless(prompt, responses): return [float('inf')] * len(responses)\n"
        "def nothing(prompt, responses): return [None] * len(responses)\n"
        "def words(prompt, responses): return ['1'] * len(responses)\n"
        "def broken(prompt, responses): return prompt['no']\n"
        "class Scale:\n"
        "    def __call__(self, prompt, responses): return [2 * len(r) for r in responses]\n"
        "scale = Scale()\n"
        "number = 3\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lengths", [9.0, 45.0]),
        ("array", [9.0, 45.0]),
        ("tensor", [4.5, 22.5]),
        ("scale", [18.0, 90.0]),
        ("column", [9.0, 45.0]),
        ("halves", [9.0, 45.0]),
        ("truths", [0.0, 1.0]),
        ("sixteen", [1.0, 1.0]),
    ],
)
def test_functions(scorers: Path, name: str, expected: list[float]) -> None:
    scorer = FunctionScorer(f"{scorers.stem}:{name}")
    assert scorer(ITEMS[:1]) == [expected]
    assert all(type(value) is float for value in scorer(ITEMS[:1])[0])
    before = scorer.identity()
    scorers.write_text(scorers.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert scorer.identity()["function_file"] != before["function_file"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fewer", "gave 1 scores for 2 responses"),
        ("endless", r"responses\[0\]: .* gave inf"),
        ("nothing", "gave None"),
        ("unknown", "gave nan"),
        ("words", "gave '1'"),
    ],
)
def test_what_a_function_must_give(scorers: Path, name: str, found: str) -> None:
    with pytest.raises(RolloutError, match=f"x:1: .*{found}"):
        FunctionScorer(f"{scorers.stem}:{name}")(ITEMS)


def test_a_broken_function_is_shown_as_it_is(scorers: Path) -> None:
    with pytest.raises(TypeError) as caught:
        FunctionScorer(f"{scorers.stem}:broken")(ITEMS)
    assert caught.value.__notes__ == [f"{scorers.stem}:broken was given x:1."]


def test_function_s_name(scorers: Path) -> None:
    for path, found in {
        "lengths": "name it as module:function",
        f"{scorers.stem}:none": "has no function none",
        f"{scorers.stem}:number": "has no function number",
        "no_such_module:f": "there is no module no_such_module",
    }.items():
        with pytest.raises(RolloutError, match=found):
            FunctionScorer(path)
    other = scorers.with_name("imports_in_vain.py")
    other.write_text("import no_such_module_either\n", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_either"):
        FunctionScorer("imports_in_vain:f")


# ---------------------------------------------------------------- the reward model's chat template


def scorer_with(template: str, **settings: Any) -> RewardModel:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    model = make_model(*MODELS["llama"])
    return RewardModel(model, tokenizer, RewardModelConfig(path="x", **settings))


THOUGHT = Scorable("Why?", ["<think>hm</think>So.", "No."], "x:1")


def test_reward_model_s_template_that_leaves_out_reasoning() -> None:
    template = CHAT_TEMPLATE.replace("content }}", "content.split('</think>')[-1] }}")
    with pytest.raises(
        DataError, match=r"^x:1: responses\[0\]: .*reward_model.response_text: keep"
    ):
        scorer_with(template)([THOUGHT])
    scorer = scorer_with(template, response_text="keep")
    (scores,) = scorer([THOUGHT])
    # It is scored by what is left, and noted.
    assert scores == scorer([Scorable("Why?", ["So.", "No."], "x:1")])[0]
    reason = "responses whose text the chat template leaves out or changes, for the reward model"
    assert scorer.noted == [(f"{reason} (reward_model.response_text)", "x:1", 1)]


def test_reward_model_s_template_gets_tools_and_reasoning() -> None:
    template = "{{ tools and tools[0].name }}" + CHAT_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.reasoning_content }}{{ message.content }}"
    )
    answer = {"role": "assistant", "content": "So.", "reasoning_content": "hm"}
    item = Scorable("Why?", [answer, "No."], "x:1", {"tools": [{"name": "calc"}]})
    scorer = scorer_with(template)
    (scores,) = scorer([item])
    assert scorer.noted == []
    rendered = [
        f"calc<|bos|><|user|>\nWhy?<|eos|>\n<|assistant|>\n{text}<|eos|>\n"
        for text in ("hmSo.", "No.")
    ]
    ids = [scorer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    with torch.no_grad():
        expected = [scorer.model(torch.tensor([row])).logits.item() for row in ids]
    assert scores == pytest.approx(expected, rel=1e-5)


def test_date_of_the_reward_model_s_template() -> None:
    template = "{{ strftime_now('%d %b') }}" + CHAT_TEMPLATE
    of_dates = [
        scorer_with(template, date=date)([THOUGHT]) for date in ("2026-01-31", "2026-02-01")
    ]
    assert of_dates[0] != of_dates[1]
    assert scorer_with(template, date="2026-01-31")([THOUGHT]) == of_dates[0]


def test_a_limit_beyond_the_models_own_is_the_models_own(tmp_path: Path) -> None:
    model = make_model(*MODELS["gpt2"])
    path = save(tmp_path, model)
    for given, expected in ((None, 1024), (5000, 1024), (100, 100)):
        assert (
            load_reward_model(RewardModelConfig(path=path, max_length=given)).max_length == expected
        )
