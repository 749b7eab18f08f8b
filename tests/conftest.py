"""Small real models, tokenizers and data, made here: nothing is downloaded."""

import os
import shutil
import tempfile

# Before the libraries are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models this small gain nothing from threads, and two processes share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing that an earlier run has left behind is read.
_CACHE = tempfile.TemporaryDirectory(prefix="mpo-lightning-cache-")
os.environ["MPO_LIGHTNING_CACHE"] = _CACHE.name

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.sources import open_source
from mpo_lightning.model.loading import auto_class

# Machines that are busy are slow, and what was found once should be found again.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Name a fruit that grows on trees. An apple grows on a tree; so does a pear.",
    "Count to five: one, two, three, four, five. Why is the sky blue? It scatters light.",
    "Write a short poem about rain. Rain falls softly on the roof and sings me to sleep.",
]


def read_rows(data: str, *, default_split: str = "train") -> Iterator[tuple[str, Any]]:
    """All rows of a source with their names; the first that cannot be read is raised."""
    source = open_source(data, default_split=default_split)
    for name, row in source.rows(0, len(source)):
        if isinstance(row, DataError):
            raise row
        yield name, row


def make_tokenizer(*, chat: bool = True, bos: bool = True, vocab_size: int = 384) -> Any:
    """A byte-level BPE tokenizer trained on a few sentences; unpadded, with EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>" if bos else None,
        eos_token="<|eos|>",
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_model(config: Any = None) -> Any:
    """A causal language model with random weights, large enough that log-probs differ clearly."""
    config = config or tiny_config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class(config).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.float().eval()


# Lightning sets these for a strategy of several processes, and leaves them to whatever comes next.
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_rendezvous_is_left() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with its tokenizer, as a user has one."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def example_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged groups with chat and text prompts, ties among scores, and other columns."""
    generator = torch.Generator().manual_seed(seed)
    words = " ".join(CORPUS).split()

    def draw(upper: int) -> int:
        return int(torch.randint(upper, (1,), generator=generator))

    def text(longest: int) -> str:
        return " ".join(words[draw(len(words))] for _ in range(1 + draw(longest)))

    rows = []
    for number in range(count):
        n = 2 + draw(4)
        scores = [float(draw(10)) for _ in range(n)]
        scores[0] = scores[1] + 1.5
        prompt: Any = text(8)
        if number % 2:
            prompt = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": prompt},
            ]
        responses = [f"{text(9)} {index}" for index in range(n)]
        rows.append(
            {"prompt": prompt, "responses": responses, "scores": scores, "prompt_id": f"p{number}"}
        )
    return rows


def write_rows(path: Path, rows: list[Any]) -> str:
    """A JSON Lines file of rows (or raw lines); gives its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (or raw lines) to a JSON Lines file of the test's own and gives its path."""

    def write(rows: list[Any], name: str = "groups.jsonl") -> str:
        return write_rows(tmp_path / name, rows)

    return write


def random_groups(
    shape: list[tuple[int, list[int]]], *, vocab_size: int = 384, seed: int = 0
) -> list[TokenGroup]:
    """Groups of random tokens: for each, the prompt's length and the responses' lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(2, vocab_size, (length,), generator=generator)

    return [
        TokenGroup(
            prompt=ids(prompt),
            responses=tuple(ids(length) for length in lengths),
            scores=tuple(torch.rand(len(lengths), generator=generator).tolist()),
            source=f"random:{number}",
        )
        for number, (prompt, lengths) in enumerate(shape, start=1)
    ]


@pytest.fixture
def ragged_batch() -> GroupBatch:
    """Three groups with unequal prompts, numbers of responses and response lengths."""
    return GroupBatch.from_groups(
        random_groups([(11, [3, 1, 9]), (4, [20, 2, 7, 5]), (17, [6, 6])])
    )


def plain_logps(model: Any, batch: GroupBatch) -> torch.Tensor:
    """The oracle: each response alone behind its prompt, through ``model(input_ids).logits``."""
    result = []
    for number in range(len(batch)):
        group = batch.select(number)
        prompt, rest = group.tokens.split([group.prompt_lengths[0], sum(group.response_lengths[0])])
        sums = []
        for response in rest.split(group.response_lengths[0]):
            ids = torch.cat([prompt, response])
            logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
            logps = logits.double().log_softmax(-1)
            sums.append(logps.gather(1, response[:, None]).sum())
        sums += [logps.new_zeros(())] * (batch.slots - len(sums))
        result.append(torch.stack(sums))
    return torch.stack(result)


class StopAfterFirstEpoch(Callback):
    """Ends a run after its first epoch as an interruption would, its schedule unchanged."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all test processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's world, built once."""
    from mpo_lightning.toy.world import build

    root = shared_folder(tmp_path_factory, "toy")
    folder = root / "quickstart"
    with FileLock(root / "lock"):
        if not folder.is_dir():
            build(root / "building", seed=0)
            (root / "building").rename(folder)
    return folder


@pytest.fixture(scope="session")
def study_worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the studies' worlds, with that of seed 0 in it."""
    from mpo_lightning.studies.world.world import load_world

    root = shared_folder(tmp_path_factory, "studies")
    with FileLock(root / "lock"):
        load_world(root / "worlds", 0)
    # Tests add to it.
    return Path(shutil.copytree(root / "worlds", tmp_path_factory.mktemp("studies") / "worlds"))
