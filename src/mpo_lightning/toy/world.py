"""Build the offline world: tokenizer, taught base model, and scored groups of its own responses.

`build` writes, under one folder,

- `base/`: a Llama model of about 1.8 million parameters that was taught the toy language, and its
  tokenizer with a chat template; both load with `AutoModelForCausalLM` and `AutoTokenizer`;
- `train.jsonl`, `val.jsonl`, `test.jsonl`: one group a line, a prompt with responses sampled from
  that model and their gold scores;
- `world.json`: the settings, their fingerprint, and statistics of the model and its responses.

On one machine the same seed gives the same world. Between machines, floating-point differences
can change the weights and with them the samples.
"""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from mpo_lightning.toy import language

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WORLD_VERSION: Final = 1
"""Part of the fingerprint; raise it when a change of this code changes the worlds it builds."""

BOS: Final = "<|begin|>"
END: Final = "<|end|>"
PAD: Final = "<|pad|>"
ROLES: Final = ("system", "user", "assistant")
CHAT_TEMPLATE: Final = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
SPLITS: Final = ("train", "val", "test")
IGNORED_LABEL: Final = -100
GRAMMAR_PARTS: Final = (
    *("TOPICS", "ASPECTS", "REQUESTS", "POSITIVE", "NEUTRAL", "NEGATIVE", "MOOD_WEIGHTS"),
    *("OFF_TOPIC", "REPETITIVE", "GRAMMAR", "TENSES", "LOWER_CASE_START", "FUNCTION_WORDS"),
)


@dataclass(frozen=True)
class Settings:
    """Sizes of a world; the defaults are those of the quick start."""

    train_prompts: int = 256
    val_prompts: int = 32
    test_prompts: int = 64
    responses_per_prompt: int = 8
    max_new_tokens: int = 64
    vocab_size: int = 576
    tokenizer_texts: int = 4000
    hidden_size: int = 256
    intermediate_size: int = 640
    layers: int = 2
    heads: int = 4
    # Larger than the usual 0.02: copying the topic out of the prompt is then learned much sooner.
    initializer_range: float = 0.05
    teaching_steps: int = 300
    teaching_batch: int = 32
    teaching_lr: float = 3e-3


@dataclass(frozen=True)
class ToyWorld:
    """A complete world.

    Attributes:
        path: Its folder.
        fingerprint: Its `fingerprint`.
        reused: Whether it was there before it was asked for.
    """

    path: Path
    fingerprint: str
    reused: bool

    @property
    def base(self) -> Path:
        """The folder of the base model and its tokenizer."""
        return self.path / "base"

    def split(self, name: str) -> Path:
        """Return the JSONL file of a split, "train", "val" or "test"."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; there are {', '.join(SPLITS)}")
        return self.path / f"{name}.jsonl"


def fingerprint(seed: int = 0, settings: Settings | None = None) -> str:
    """Return a digest of everything a world depends on: version, grammar, settings and seed."""
    parts = {
        "version": WORLD_VERSION,
        "seed": seed,
        "settings": asdict(settings or Settings()),
        "template": CHAT_TEMPLATE,
        "grammar": {name: getattr(language, name) for name in GRAMMAR_PARTS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def find_world(path: Path, expected: str) -> ToyWorld | None:
    """Return the world in a folder.

    Args:
        path: Folder to look at.
        expected: Fingerprint that the world must have.

    Returns:
        The world, or None if the folder holds none, a partial one, or one of other settings.
    """
    try:
        found = json.loads((path / "world.json").read_text(encoding="utf-8"))["fingerprint"]
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return None
    world = ToyWorld(path, expected, reused=True)
    needed = [world.split(name) for name in SPLITS]
    needed += [world.base / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
    return world if found == expected and all(map(Path.is_file, needed)) else None


def build(out: str | Path, seed: int = 0, settings: Settings | None = None) -> ToyWorld:
    """Build the world under `out`, or reuse the one that is there if its fingerprint is the same.

    A world is written to a temporary folder next to `out` and renamed when it is complete, so
    that an interrupted build leaves nothing that could be taken for a world.

    Args:
        out: Folder of the world. If it holds anything but a world, it is left alone.
        seed: Seed of the prompts, the model and the samples.
        settings: Sizes. Defaults to those of the quick start.

    Returns:
        The world, with `reused` set if nothing had to be built.

    Raises:
        FileExistsError: If `out` holds files that are not part of a world.
    """
    settings = settings or Settings()
    mark = fingerprint(seed, settings)
    path = Path(out).resolve()
    world = find_world(path, mark)
    if world is not None:
        print(f"Reusing the world in {out} (fingerprint {mark})")
        return world
    _refuse_foreign_files(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        _write_world(unfinished, seed, settings, mark)
        _refuse_foreign_files(path)
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Built the world in {out} (fingerprint {mark})")
    return ToyWorld(path, mark, reused=False)


def _refuse_foreign_files(path: Path) -> None:
    """Raise an error if a path is not a folder that holds at most a world."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder for the world")
    ours = {"base", "world.json", *(f"{name}.jsonl" for name in SPLITS)}
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in ours)
    if foreign:
        raise FileExistsError(
            f"{path} holds no world of these settings but other files ({', '.join(foreign[:5])}); "
            "name another folder or move them away"
        )


def _write_world(path: Path, seed: int, settings: Settings, mark: str) -> None:
    started = time.monotonic()
    rng = random.Random(seed)
    *splits, pool = language.split_prompts(
        rng, settings.train_prompts, settings.val_prompts, settings.test_prompts
    )
    tokenizer = make_tokenizer(pool, rng, settings)
    model = make_model(tokenizer, seed, settings)
    loss = _teach(model, tokenizer, pool, rng, settings)
    model.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")

    measured: dict[str, float] = {"teaching_loss": loss}
    pairs: list[tuple[str, str]] = []
    resampled = 0
    for number, (name, split) in enumerate(zip(SPLITS, splits, strict=True)):
        groups, again = _sample_groups(
            model, tokenizer, split, seed=seed * 3 + number, settings=settings
        )
        resampled += again
        lines = []
        for index, (prompt, group) in enumerate(zip(split, groups, strict=True)):
            pairs += [(prompt, response) for response in group]
            scores = language.gold_scores(prompt, group)
            record = {"prompt": prompt, "responses": group, "scores": scores}
            lines.append(json.dumps({**record, "prompt_id": f"{name}-{index}"}) + "\n")
        (path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    measured |= {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "mean_gold": sum(language.gold_score(*pair) for pair in pairs) / len(pairs),
        "grammatical": sum(language.is_grammatical(r) for _, r in pairs) / len(pairs),
        "on_topic": sum(language.topic_of(p) in language.words(r) for p, r in pairs) / len(pairs),
        "distinct": len({response for _, response in pairs}) / len(pairs),
        "responses": len(pairs),
        "resampled": resampled,
    }
    description = {
        "fingerprint": mark,
        "version": WORLD_VERSION,
        "seed": seed,
        "settings": asdict(settings),
        "measured": measured,
    }
    (path / "world.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    print(
        f"Sampled {len(pairs)} responses ({resampled} drawn again because they were cut or empty): "
        f"{measured['grammatical']:.0%} grammatical, {measured['on_topic']:.0%} on topic, "
        f"{measured['distinct']:.0%} distinct, mean gold {measured['mean_gold']:.2f}; "
        f"{time.monotonic() - started:.0f} s in all"
    )


def make_tokenizer(
    pool: Sequence[str], rng: random.Random, settings: Settings
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer on requests and answers, and give it the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    asked = rng.choices(pool, k=settings.tokenizer_texts)
    corpus = [text for prompt in asked for text in (prompt, language.write_answer(prompt, rng))]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[BOS, END, PAD, *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    # There is no post-processor: the template alone writes the begin token, exactly once.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@contextmanager
def seeded(seed: int) -> "Iterator[None]":
    """Seed the CPU generator inside the block only."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def make_model(
    tokenizer: "PreTrainedTokenizerFast", seed: int, settings: Settings
) -> "PreTrainedModel":
    """Make a small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=settings.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with seeded(seed):
        return LlamaForCausalLM(config).float()


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> list[int]:
    """Return the tokens of a request with the generation prompt, by the chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _teach(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    pool: Sequence[str],
    rng: random.Random,
    settings: Settings,
) -> float:
    """Teach the grammar by maximum likelihood of fresh answers, and return the last mean loss."""
    requests = {prompt: prompt_ids(tokenizer, prompt) for prompt in pool}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.teaching_lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    steps = settings.teaching_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.teaching_lr, total_steps=steps, pct_start=0.1
    )
    recent: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        asked = rng.choices(pool, k=settings.teaching_batch)
        answers = [language.write_answer(prompt, rng) for prompt in asked]
        rows, labels = [], []
        for prompt, answer in zip(asked, tokenizer(answers)["input_ids"], strict=True):
            target = [*answer, tokenizer.eos_token_id]
            rows.append(torch.tensor(requests[prompt] + target))
            labels.append(torch.tensor([IGNORED_LABEL] * len(requests[prompt]) + target))
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, True, IGNORED_LABEL)
        # Padding is on the right, so causal attention never sees it and needs no mask.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=IGNORED_LABEL
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-19:], loss.item()]
        if step % 50 == 0 or step == steps:
            mean = sum(recent) / len(recent)
            spent = time.monotonic() - started
            print(f"Teaching: step {step}/{steps}, loss {mean:.3f}, {spent:.0f} s", flush=True)
    model.eval()
    return sum(recent) / len(recent)


def sample_responses(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[str],
    count: int,
    *,
    seed: int,
    max_new_tokens: int,
    rows: int = 512,
) -> list[list[list[int]]]:
    """Sample responses at temperature 1 from the full distribution.

    Args:
        model: A causal language model (a PEFT model counts as one).
        tokenizer: Its tokenizer.
        prompts: Requests.
        count: Number of responses for each request.
        seed: Seed of the draws; the global generator is left as it was.
        max_new_tokens: Token limit of a response.
        rows: Number of responses that are sampled at once.

    Returns:
        For each prompt, the tokens of its samples, each with the end-of-turn token if the model
        wrote one.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    step = max(1, rows // count)
    result = []
    with seeded(seed), torch.inference_mode():
        for start in range(0, len(encoded), step):
            chunk = encoded[start : start + step]
            width = max(map(len, chunk))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in chunk])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chunk])
            drawn = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=count,
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=pad,
            )[:, width:].tolist()
            samples = [row[: row.index(end) + 1] if end in row else row for row in drawn]
            result += [samples[i : i + count] for i in range(0, len(samples), count)]
    return result


def _sample_groups(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[str],
    *,
    seed: int,
    settings: Settings,
    rounds: int = 20,
) -> tuple[list[list[str]], int]:
    """Sample a full group for each prompt, and count the responses that were drawn again.

    A response is drawn again if it is cut, empty, or has special tokens before its end.
    """
    count = settings.responses_per_prompt
    special = set(tokenizer.all_special_ids)
    groups: list[list[str]] = [[] for _ in prompts]
    rejected = 0
    for number in range(rounds):
        open_groups = [index for index, group in enumerate(groups) if len(group) < count]
        if not open_groups:
            return groups, rejected
        drawn = sample_responses(
            model,
            tokenizer,
            [prompts[index] for index in open_groups],
            count,
            seed=seed * rounds + number,
            max_new_tokens=settings.max_new_tokens,
        )
        for index, samples in zip(open_groups, drawn, strict=True):
            # Look at no more samples than are missing, so that `rejected` counts real failures.
            for ids in samples[: count - len(groups[index])]:
                text = tokenizer.decode(ids, skip_special_tokens=True)
                ended = ids[-1] == tokenizer.eos_token_id
                if ended and special.isdisjoint(ids[:-1]) and text.strip():
                    groups[index].append(text)
                else:
                    rejected += 1
    raise RuntimeError(
        f"after {rounds} rounds some prompts have fewer than {count} whole responses; "
        "the model was not taught long enough"
    )
