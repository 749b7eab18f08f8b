"""Token ids of groups, against texts rendered and parts encoded by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mpo_lightning.batch import TokenGroup
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.rows import check_row
from mpo_lightning.data.tokens import GroupTokenizer, load_tokenizer
from tests.conftest import CHAT_TEMPLATE, CORPUS, example_rows, make_tokenizer

BOS, EOS = 0, 1
ANSWER = "<|assistant|>\n"


def bos_adding_tokenizer() -> Any:
    """A tokenizer without chat template that writes BOS itself, as Llama's does."""
    tokenizer = make_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def tokenize(
    tokenizer: Any, *rows: dict[str, Any], **settings: Any
) -> tuple[list[TokenGroup], DataReport]:
    """Tokenise rows of a file "x"; rows without scores get 0, 1, 2 ..."""
    defaults = {
        "max_length": 10_000,
        "over_long": "error",
        "prompt_format": "auto",
        "boundary": "auto",
    }
    scored = [{"scores": list(range(len(row["responses"]))), **row} for row in rows]
    tokenize = GroupTokenizer(tokenizer, **{**defaults, **settings})
    report = DataReport("x", groups=len(rows))
    groups = []
    for number, row in enumerate(scored, start=1):
        group = check_row(row, f"x:{number}")
        try:
            tokens = tokenize(group, report)
        except DataError as error:
            report.fail(error)
            continue
        if tokens is not None:
            groups.append(tokens)
    report.check()
    return groups, report


def tokenize_one(tokenizer: Any, prompt: Any, responses: list[str], **settings: Any) -> TokenGroup:
    (group,), _ = tokenize(tokenizer, {"prompt": prompt, "responses": responses}, **settings)
    return group


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids from the Rust tokenizer itself, past everything that transformers puts around it."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def user(text: str) -> str:
    return f"<|user|>\n{text}<|eos|>\n"


def with_template(template: str, **changes: Any) -> Any:
    tokenizer = make_tokenizer(**changes)
    tokenizer.chat_template = template
    return tokenizer


# ------------------------------------------------------------------------------------- the ids


@pytest.mark.parametrize("boundary", ["strict", "separate"])
@pytest.mark.parametrize("bos", [True, False])
def test_chat_ids_are_those_of_the_template_by_hand(bos: bool, boundary: str) -> None:
    tokenizer = make_tokenizer(bos=bos)
    rows = example_rows(20)
    groups, _ = tokenize(tokenizer, *rows, boundary=boundary)
    for row, group in zip(rows, groups, strict=True):
        prompt = "<|bos|>" if bos else ""
        if isinstance(row["prompt"], str):
            prompt += user(row["prompt"])
        else:
            prompt += f"<|system|>\nBe brief.<|eos|>\n{user(row['prompt'][1]['content'])}"
        prompt += ANSWER
        assert group.prompt.tolist() == encode(tokenizer, prompt)
        assert tokenizer.decode(group.prompt) == prompt
        for text, ids in zip(row["responses"], group.responses, strict=True):
            # The whole, encoded at once, less the line end that the template writes last.
            whole = encode(tokenizer, f"{prompt}{text}<|eos|>\n")
            assert [*group.prompt.tolist(), *ids.tolist()] == whole[:-1]
            assert tokenizer.decode(ids) == f"{text}<|eos|>"
        assert group.scores == tuple(row["scores"])
    assert [group.source for group in groups] == [f"x:{number}" for number in range(1, 21)]


@pytest.mark.parametrize("boundary", ["strict", "separate"])
@pytest.mark.parametrize("kind", ["bos", "no bos", "adds bos"])
def test_text_ids_are_prompt_and_response_by_hand(kind: str, boundary: str) -> None:
    adds = kind == "adds bos"
    tokenizer = bos_adding_tokenizer() if adds else make_tokenizer(chat=False, bos=kind == "bos")
    rows = [row for row in example_rows(40) if isinstance(row["prompt"], str)]
    rows = [{**row, "responses": [f" {text}" for text in row["responses"]]} for row in rows]
    groups, _ = tokenize(tokenizer, *rows, boundary=boundary)
    for row, group in zip(rows, groups, strict=True):
        start = [BOS] if adds else []
        assert group.prompt.tolist() == start + encode(tokenizer, row["prompt"])
        for text, ids in zip(row["responses"], group.responses, strict=True):
            whole = encode(tokenizer, row["prompt"] + text)
            assert [*group.prompt.tolist(), *ids.tolist()] == [*start, *whole, EOS]
            assert tokenizer.decode(ids) == f"{text}<|eos|>"


def test_conversation_of_several_turns() -> None:
    tokenizer = make_tokenizer()
    conversation = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "Another?"},
    ]
    group = tokenize_one(tokenizer, conversation, ["A pear.", "Rain."])
    # Earlier answers are context: the response begins after the last header.
    assert tokenizer.decode(group.prompt) == (
        f"<|bos|>{user('Name a fruit.')}{ANSWER}An apple.<|eos|>\n{user('Another?')}{ANSWER}"
    )
    assert [tokenizer.decode(ids) for ids in group.responses] == ["A pear.<|eos|>", "Rain.<|eos|>"]


def test_text_format_leaves_the_template_aside() -> None:
    tokenizer = make_tokenizer()
    group = tokenize_one(tokenizer, "Why?", [" So.", " Rain."], prompt_format="text")
    assert tokenizer.decode(group.prompt) == "Why?"


def test_what_a_tokenizer_file_says_of_length_and_padding_is_ignored() -> None:
    tokenizer = make_tokenizer()
    expected = tokenize_one(tokenizer, "Why is the sky blue?", ["Rain.", "The sky is blue."])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(pad_id=EOS, pad_token="<|eos|>", length=64)
    tokenizer.model_max_length = 4
    group = tokenize_one(tokenizer, "Why is the sky blue?", ["Rain.", "The sky is blue."])
    assert group.prompt.tolist() == expected.prompt.tolist()
    assert [r.tolist() for r in group.responses] == [r.tolist() for r in expected.responses]


@pytest.mark.parametrize("pad", [None, "<|eos|>", "<|bos|>"])
@pytest.mark.parametrize("chat", [True, False])
def test_pad_token_has_no_say(chat: bool, pad: str | None) -> None:
    plain, padded = make_tokenizer(chat=chat), make_tokenizer(chat=chat)
    assert plain.pad_token_id is None
    if pad is not None:
        padded.pad_token = pad
    expected = tokenize_one(plain, "Why?", [" So.", " Rain falls softly."])
    group = tokenize_one(padded, "Why?", [" So.", " Rain falls softly."])
    assert group.prompt.tolist() == expected.prompt.tolist()
    assert [r.tolist() for r in group.responses] == [r.tolist() for r in expected.responses]
    assert all(ids[-1] == EOS for ids in group.responses)


# ------------------------------------------------------------------------------ start of sequence


def chat_and_adding() -> Any:
    tokenizer = bos_adding_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("boundary", ["strict", "separate"])
@pytest.mark.parametrize(
    ("make", "prompt", "count"),
    [
        pytest.param(make_tokenizer, "Why?", 1, id="template writes it"),
        pytest.param(chat_and_adding, "Why?", 1, id="template and tokenizer write it"),
        pytest.param(bos_adding_tokenizer, "Why?", 1, id="tokenizer writes it"),
        pytest.param(bos_adding_tokenizer, "<|bos|>Why?", 1, id="text and tokenizer write it"),
        pytest.param(
            lambda: make_tokenizer(chat=False), "<|bos|>Why?", 1, id="only the text writes it"
        ),
        pytest.param(lambda: make_tokenizer(chat=False), "Why?", 0, id="nobody writes it"),
        pytest.param(lambda: make_tokenizer(bos=False), "Why?", 0, id="there is none"),
    ],
)
def test_one_beginning_of_sequence(make: Any, prompt: str, count: int, boundary: str) -> None:
    group = tokenize_one(make(), prompt, [" So.", " Rain."], boundary=boundary)
    places = [place for place, token in enumerate(group.prompt.tolist()) if token == BOS]
    assert places == [0] * count
    assert not any(BOS in ids for ids in group.responses)


@pytest.mark.parametrize(
    ("make", "prompt"),
    [
        pytest.param(bos_adding_tokenizer, "<|bos|><|bos|>Why?", id="text"),
        pytest.param(
            lambda: with_template(
                "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
            ),
            "<|bos|>Why?",
            id="template and text",
        ),
    ],
)
def test_two_beginnings_of_sequence_are_an_error(make: Any, prompt: str) -> None:
    with pytest.raises(DataError, match=r"^x:1: prompt: found two beginning-of-sequence tokens"):
        tokenize_one(make(), prompt, [" So.", " Rain."])


# ------------------------------------------------------------------------------------ end of turn


TURNS = (
    "{{% for m in messages %}}<|{{{{ m.role }}}}|>{{{{ m.content }}}}{end}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)


@pytest.mark.parametrize("boundary", ["strict", "separate"])
@pytest.mark.parametrize(
    ("template", "response"),
    [
        pytest.param(TURNS.format(end="<|eos|>"), "So.<|eos|>", id="EOS"),
        pytest.param(TURNS.format(end="<|end|>\n"), "So.<|end|>", id="its own token and a line"),
        pytest.param(TURNS.format(end="\n<|end|>"), "So.\n<|end|>", id="a line and its own token"),
        # A turn's end and the sequence's: only the first is what a sampler stops at.
        pytest.param(TURNS.format(end="<|end|>\n<|eos|>"), "So.<|end|>", id="two tokens"),
        pytest.param(TURNS.format(end=""), "So.<|eos|>", id="nothing"),
        pytest.param(TURNS.format(end="\n"), "So.\n<|eos|>", id="only a line"),
    ],
)
def test_response_ends_with_what_ends_the_turn(template: str, response: str, boundary: str) -> None:
    tokenizer = with_template(template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    group = tokenize_one(tokenizer, "Why?", ["So.", "Rain."], boundary=boundary)
    assert tokenizer.decode(group.responses[0]) == response
    assert group.responses[0].tolist() == encode(tokenizer, response)


def test_template_that_ends_one_answer_in_another_way_is_an_error() -> None:
    tokenizer = with_template(
        TURNS.format(end="{% if m.content != 'Rain.' %}<|eos|>{% endif %}<|system|>")
    )
    with pytest.raises(DataError, match=r"^x:1: responses\[1\]: .*end-of-turn token <\|eos\|>"):
        tokenize_one(tokenizer, "Why?", ["So.", "Rain."])


# Responses exported with their end-of-sequence text, as samplers write them.
def test_text_that_already_ends_gets_no_second_end() -> None:
    tokenizer = make_tokenizer(chat=False)
    group = tokenize_one(tokenizer, "Why?", [" So.<|eos|>", " Rain."])
    assert [tokenizer.decode(r) for r in group.responses] == [" So.<|eos|>", " Rain.<|eos|>"]


@pytest.mark.parametrize(
    ("chat", "response"), [(True, "So.<|eos|>"), (False, " So.<|eos|><|eos|>")]
)
def test_two_ends_of_turn_are_an_error(chat: bool, response: str) -> None:
    with pytest.raises(DataError, match=r"^x:1: responses\[1\]: found two end-of-turn tokens"):
        tokenize_one(make_tokenizer(chat=chat), "Why?", [" Rain.", response])


# ------------------------------------------------------------------------------------- boundary


def test_space_at_the_end_of_a_text_prompt_is_an_error_naming_the_row() -> None:
    good = {"prompt": "Why? ", "responses": ["1", "2"]}
    trap = {"prompt": "Name a dog: ", "responses": ["1", "dog"]}
    tokenizer = make_tokenizer(chat=False)
    # The trap is one: " dog" is one token, which the prompt's last space would have become.
    assert len(encode(tokenizer, " dog")) == 1
    with pytest.raises(DataError) as caught:
        tokenize(tokenizer, good, trap, boundary="strict")
    message = str(caught.value)
    assert message.startswith("x:2: responses[1]: found the prompt's tokens change")
    assert "['Ġ'] become ['Ġdog']" in message
    assert "data.boundary: auto" in message


def test_response_that_would_join_the_prompt_is_tokenised_by_itself_and_counted() -> None:
    tokenizer = make_tokenizer(chat=False)
    trap = {"prompt": "Name a dog: ", "responses": ["1", "dog"]}
    (group,), report = tokenize(tokenizer, trap)
    (same,), _ = tokenize(tokenizer, trap, boundary="separate")
    assert group.prompt.tolist() == encode(tokenizer, "Name a dog: ")
    assert [ids.tolist() for ids in group.responses] == [ids.tolist() for ids in same.responses]
    reason = "whose beginning would join the prompt's end, tokenised by themselves"
    assert report.changed == {reason: 1}


def test_response_that_reads_otherwise_by_itself_is_an_error() -> None:
    """As with tokenizers that put a space before every text."""
    spaced = Tokenizer(models.BPE())
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    spaced.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spaced, eos_token="</s>")
    row = {"prompt": "The lazy do", "responses": ["g", " and the dog"]}
    with pytest.raises(DataError, match=r"responses\[0\]: .* change once .*boundary: separate"):
        tokenize(tokenizer, row)


def test_separate_boundary_keeps_prompt_and_response_as_they_are() -> None:
    tokenizer = make_tokenizer(chat=False)
    group = tokenize_one(tokenizer, "Name a dog: ", ["dog", "cat"], boundary="separate")
    assert group.prompt.tolist() == encode(tokenizer, "Name a dog: ")
    assert [ids.tolist() for ids in group.responses] == [
        [*encode(tokenizer, text), EOS] for text in ("dog", "cat")
    ]


@pytest.mark.parametrize("boundary", ["strict", "separate"])
def test_generation_prompt_that_answers_lack_is_an_error(boundary: str) -> None:
    tokenizer = with_template(CHAT_TEMPLATE.replace(f"%}}{ANSWER}", f"%}}{ANSWER}<think>\n"))
    assert tokenizer.chat_template != CHAT_TEMPLATE
    with pytest.raises(DataError) as caught:
        tokenize_one(tokenizer, "Why?", ["So.", "Rain."], boundary=boundary)
    message = str(caught.value)
    assert message.startswith("x:1: responses[0]: found 'So.<|eos|>")
    assert r"prompt has '<think>\n'" in message
    assert "template for training" in message
    # Advice that does not help here.
    assert "data.boundary" not in message


# --------------------------------------------------------------------------------------- length


# A prompt of 6 tokens, responses of 2, 4 and 7 with their end.
PROMPT = "<|user|>" * 6
SHORT, MIDDLE, LONG = ("<|system|>" * count for count in (1, 3, 6))


def sized(
    *responses: str, prompt: str = PROMPT, scores: list[float] | None = None
) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt, "responses": list(responses)}
    return row if scores is None else {**row, "scores": scores}


def lengths(group: TokenGroup) -> list[int]:
    return [len(ids) for ids in group.responses]


@pytest.mark.parametrize("over_long", ["drop_group", "drop_response", "cut", "error"])
def test_nothing_is_done_at_the_limit(over_long: str) -> None:
    row = sized(SHORT, MIDDLE, LONG)
    (group,), report = tokenize(
        make_tokenizer(chat=False), row, max_length=6 + 7, over_long=over_long
    )
    assert len(group.prompt) == 6
    assert lengths(group) == [2, 4, 7]
    assert (report.kept, report.responses) == (1, 3)
    assert not report.dropped
    assert not report.changed


def test_cut_is_of_each_response_alone() -> None:
    row = sized(SHORT, MIDDLE, LONG)
    whole = tokenize_one(make_tokenizer(chat=False), row["prompt"], row["responses"])
    (group,), report = tokenize(make_tokenizer(chat=False), row, max_length=6 + 4, over_long="cut")
    assert group.prompt.tolist() == whole.prompt.tolist()
    # What fits is untouched, up to its end; what does not is the first tokens and has no end.
    assert [ids.tolist() for ids in group.responses] == [
        whole.responses[0].tolist(),
        whole.responses[1].tolist(),
        whole.responses[2][:4].tolist(),
    ]
    assert [int(ids[-1]) == EOS for ids in group.responses] == [True, True, False]
    assert group.scores == (0.0, 1.0, 2.0)
    assert report.changed == {"cut to max_length": 1}
    assert (report.kept, report.responses) == (1, 3)


def test_cut_one_below_the_end_loses_only_the_end() -> None:
    group = tokenize_one(
        make_tokenizer(chat=False), PROMPT, [SHORT, LONG], max_length=6 + 6, over_long="cut"
    )
    assert lengths(group) == [2, 6]
    assert EOS not in group.responses[1]


def test_cut_counts_the_start_of_sequence() -> None:
    group = tokenize_one(
        bos_adding_tokenizer(), PROMPT, [SHORT, LONG], max_length=12, over_long="cut"
    )
    assert len(group.prompt) == 7
    assert lengths(group) == [2, 5]


def test_cut_in_a_chat() -> None:
    tokenizer = make_tokenizer()
    whole = tokenize_one(tokenizer, "Why?", ["So.", "Rain falls softly on the roof."])
    budget = len(whole.responses[0])
    group = tokenize_one(
        tokenizer,
        "Why?",
        ["So.", "Rain falls softly on the roof."],
        max_length=len(whole.prompt) + budget,
        over_long="cut",
    )
    assert group.responses[0].tolist() == whole.responses[0].tolist()
    assert group.responses[1].tolist() == whole.responses[1][:budget].tolist()
    assert EOS not in group.responses[1]


def test_drop_group() -> None:
    rows = [sized(SHORT, MIDDLE), sized(LONG, SHORT, LONG + "a"), sized(SHORT, SHORT + SHORT)]
    groups, report = tokenize(
        make_tokenizer(chat=False), *rows, max_length=10, over_long="drop_group"
    )
    assert [group.source for group in groups] == ["x:1", "x:3"]
    # Once for the group, however many of its responses are too long.
    assert report.dropped == {"with a response beyond max_length": 1}
    assert report.examples == {"with a response beyond max_length": ["x:2"]}
    assert (report.groups, report.kept, report.responses) == (3, 2, 4)


def test_drop_response() -> None:
    rows = [sized(SHORT, LONG, MIDDLE, LONG + "a"), sized(SHORT, MIDDLE)]
    groups, report = tokenize(
        make_tokenizer(chat=False), *rows, max_length=10, over_long="drop_response"
    )
    assert [lengths(group) for group in groups] == [[2, 4], [2, 4]]
    # Each that stays keeps its own score.
    assert groups[0].scores == (0.0, 2.0)
    assert report.changed == {"beyond max_length dropped": 2}
    assert (report.groups, report.kept, report.responses) == (2, 2, 4)


@pytest.mark.parametrize("row", [sized(SHORT, LONG), sized(LONG, LONG + "a")], ids=["one", "none"])
def test_drop_response_that_leaves_too_few_drops_the_group(row: dict[str, Any]) -> None:
    groups, report = tokenize(
        make_tokenizer(chat=False),
        row,
        sized(SHORT, MIDDLE),
        max_length=10,
        over_long="drop_response",
    )
    assert [group.source for group in groups] == ["x:2"]
    assert report.dropped == {"with too few responses left": 1}
    assert report.kept == 1


def test_without_need_of_contrast_one_response_is_a_group() -> None:
    (group,), _ = tokenize(
        make_tokenizer(chat=False),
        sized(LONG, SHORT),
        max_length=10,
        over_long="drop_response",
        min_responses=1,
    )
    assert (lengths(group), group.scores) == ([2], (1.0,))


@pytest.mark.parametrize(
    ("keep", "indices"), [("first", (0, 1, 2)), ("balanced", (0, 2, 4)), ("extremes", (2, 3, 4))]
)
def test_responses_that_are_kept_keep_their_scores_and_places(
    keep: str, indices: tuple[int, ...]
) -> None:
    texts = ["one", "two", "three", "four", "five"]
    row = {"prompt": "Why?", "responses": texts, "scores": [2, 3, 4, 1, 5]}
    groups, report = tokenize(
        make_tokenizer(),
        row,
        {"prompt": "Why?", "responses": ["a", "b"]},
        max_responses=3,
        keep_responses=keep,
    )
    tokenizer = make_tokenizer()
    assert groups[0].indices == indices
    assert groups[0].scores == tuple(row["scores"][index] for index in indices)
    assert [tokenizer.decode(ids[:-1]) for ids in groups[0].responses] == [
        texts[index] for index in indices
    ]
    assert report.changed == {"beyond max_responses left out": 2}
    assert report.responses == 5


@pytest.mark.parametrize("chat", [True, False])
def test_response_that_generation_cut_has_no_end(chat: bool) -> None:
    tokenizer = make_tokenizer(chat=chat)
    row = {"prompt": PROMPT, "responses": ["It scatters", "Blue"], "truncated": [True, False]}
    (group,), _ = tokenize(tokenizer, row)
    assert group.responses[0].tolist() == encode(tokenizer, "It scatters")
    assert group.responses[1].tolist() == [*encode(tokenizer, "Blue"), EOS]


def test_over_long_error() -> None:
    with pytest.raises(DataError) as caught:
        tokenize(
            make_tokenizer(chat=False),
            sized(SHORT, MIDDLE),
            sized(SHORT, LONG),
            max_length=10,
            over_long="error",
        )
    message = str(caught.value)
    assert message.startswith("x:2: responses[1]: found 6 + 7 tokens; expected at most 10")
    assert "data.over_long" in message


@pytest.mark.parametrize("length", [10, 11, 30])
@pytest.mark.parametrize("over_long", ["drop_group", "drop_response", "cut", "error"])
def test_prompt_beyond_the_limit(over_long: str, length: int) -> None:
    rows = [sized(SHORT, MIDDLE, prompt="<|user|>" * length), sized(SHORT, MIDDLE)]
    tokenizer = make_tokenizer(chat=False)
    if over_long == "error":
        with pytest.raises(DataError, match=rf"^x:1: prompt: found {length} tokens; .* than 10"):
            tokenize(tokenizer, *rows, max_length=10, over_long=over_long)
        return
    groups, report = tokenize(tokenizer, *rows, max_length=10, over_long=over_long)
    assert [group.source for group in groups] == ["x:2"]
    assert report.dropped == {"with a prompt beyond max_length": 1}
    assert (report.groups, report.kept, report.responses) == (2, 1, 2)


def test_prompt_one_below_the_limit_leaves_room_for_one_token() -> None:
    row = sized(SHORT, LONG, scores=[1, 1])
    (group,), _ = tokenize(make_tokenizer(chat=False), row, max_length=7, over_long="cut")
    assert lengths(group) == [1, 1]


# ------------------------------------------------------------------------------ scores and report


def test_repeated_responses_are_counted_and_kept() -> None:
    groups, report = tokenize(
        make_tokenizer(),
        {"prompt": "Why?", "responses": ["a", "b", "a", "a", "b"], "scores": [1, 0, 1, 1, 0]},
        {"prompt": "Why?", "responses": ["a", "b"]},
        {"prompt": "Why?", "responses": ["a", "a"], "scores": [1, 1]},
    )
    assert [len(group.responses) for group in groups] == [5, 2, 2]
    assert report.changed == {"repeat another response of their group": 4}
    assert report.examples == {"repeat another response of their group": ["x:1", "x:3"]}


def test_report_as_text() -> None:
    rows = [sized(SHORT, LONG)] * 5 + [sized(SHORT, MIDDLE, SHORT, scores=[1, 0, 1])]
    _, report = tokenize(make_tokenizer(chat=False), *rows, max_length=10, over_long="drop_group")
    assert str(report).splitlines() == [
        "x: 1 of 6 groups, 3.0 responses each",
        "  groups dropped: 5 with a response beyond max_length (first: x:1, x:2, x:3)",
        "  responses: 1 repeat another response of their group (first: x:6)",
    ]


def test_nothing_left_is_an_error_with_the_report() -> None:
    with pytest.raises(DataError) as caught:
        tokenize(
            make_tokenizer(chat=False),
            sized(SHORT, LONG),
            {"prompt": PROMPT * 9, "responses": [SHORT, MIDDLE]},
            max_length=10,
            over_long="drop_group",
        )
    message = str(caught.value)
    assert "No group of x can be used" in message
    assert "0 of 2 groups" in message
    assert "1 with a response beyond max_length (first: x:1)" in message
    assert "1 with a prompt beyond max_length (first: x:2)" in message


def test_all_rows_that_cannot_be_tokenised_are_reported_together() -> None:
    trap = {"prompt": "Name a dog: ", "responses": ["dog", "cat"]}
    rows = [trap, sized(SHORT, MIDDLE)] * 12
    with pytest.raises(DataError) as caught:
        tokenize(make_tokenizer(chat=False), *rows, boundary="strict")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("12 rows")
    assert [line.split(": ", 1)[0] for line in lines[1:11]] == [
        f"  x:{2 * n + 1}" for n in range(10)
    ]
    assert lines[11:] == ["  ... and 2 more"]


# ------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("boundary", ["strict", "separate"])
def test_role_that_the_template_refuses(boundary: str) -> None:
    good = {"prompt": "Why?", "responses": ["a", "b"]}
    bad = {"prompt": [{"role": "tool", "content": "42"}], "responses": ["a", "b"]}
    with pytest.raises(DataError, match=r"^x:2: prompt: found .* refuses it \(unknown role tool\)"):
        tokenize(make_tokenizer(), good, bad, boundary=boundary)


@pytest.mark.parametrize(("chat", "prompt_format"), [(False, "auto"), (True, "text")])
def test_conversation_without_template(chat: bool, prompt_format: str) -> None:
    bad = {"prompt": [{"role": "user", "content": "Why?"}], "responses": ["a", "b"]}
    good = {"prompt": "Why?", "responses": [" a", " b"]}
    with pytest.raises(DataError, match=r"^x:2: prompt: found a conversation; .*chat template"):
        tokenize(make_tokenizer(chat=chat), good, bad, prompt_format=prompt_format)


def test_chat_format_without_template() -> None:
    with pytest.raises(DataError, match=r"^prompt_format: .* no chat template"):
        tokenize_one(make_tokenizer(chat=False), "Why?", [" a", " b"], prompt_format="chat")


# ---------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("make", [make_tokenizer, bos_adding_tokenizer])
def test_loaded_tokenizer_gives_the_same_ids(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    expected = tokenize_one(make(), "Why?", [" So.", " Rain."])
    group = tokenize_one(load_tokenizer(str(tmp_path)), "Why?", [" So.", " Rain."])
    assert group.prompt.tolist() == expected.prompt.tolist()
    assert group.prompt[0] == BOS
    assert torch.equal(torch.cat(group.responses), torch.cat(expected.responses))


def test_tokenizer_without_end_of_sequence_is_an_error(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"no end-of-sequence token.*eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [{}, {"tokenizer.json": "{"}])
def test_folder_without_tokenizer_is_an_error(content: dict[str, str], tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"^tokenizer: no tokenizer can be loaded from {tmp_path}"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^tokenizer: no tokenizer can be loaded from no/such"):
        load_tokenizer("no/such")


def test_template_that_refuses_a_plain_chat_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only tools here') }}"
    with pytest.raises(DataError, match=r"^tokenizer: .*only tools here.*prompt_format: text"):
        tokenize(tokenizer)
