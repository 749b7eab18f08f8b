"""Time and resident memory of preparing many groups, and of finding them again.

    python -m benchmarks.data                  # 1,000,000 groups of 5 responses
    python -m benchmarks.data --groups 20000   # smaller

Groups are made of random words: prompts of 4 to 16, responses of 4 to 28, one in 100 of 200.
A byte-level BPE tokenizer with a chat template is trained on such text.
`PreferenceDataModule.setup` is called in a process of its own, twice with the same cache, and then
the first batches are made; memory is the sum over that process and its children, sampled from
/proc, so Linux only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = 4000
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _words(generator: random.Random) -> list[str]:
    letters = "etaoinshrdlucmfwyp"
    return ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(WORDS)]


def write_rows(path: Path, groups: int, responses: int, seed: int = 0) -> None:
    """Write canonical rows of random words."""
    generator = random.Random(seed)
    words = _words(generator)

    def text(low: int, high: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(low, high)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(groups):
            texts = [
                text(200, 200) if generator.random() < 0.01 else text(4, 28)
                for _ in range(responses)
            ]
            scores = [round(generator.gauss(5, 2), 1) for _ in texts]
            row = {"prompt": text(4, 16), "responses": texts, "scores": scores}
            file.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path, seed: int = 0) -> None:
    """Write a byte-level BPE tokenizer of 8000 tokens, trained on the rows' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(_words(random.Random(seed)))], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)


def _setup(arguments: argparse.Namespace) -> None:
    """What is measured, in a process of its own."""
    start = time.perf_counter()
    from mpo_lightning import PreferenceDataModule
    from mpo_lightning.data.sampler import GroupSampler

    imported = time.perf_counter()
    data = PreferenceDataModule(
        tokenizer=str(arguments.folder / "tokenizer"),
        train=str(arguments.folder / "rows.jsonl"),
        cache=str(arguments.folder / "cache"),
        tokens_per_batch=4096,
    )
    data.setup("fit")
    ready = time.perf_counter()
    dataset = data.datasets["train"]
    sampler = GroupSampler(
        dataset.sizes, tokens_per_batch=4096, shuffle=True, seed=0, num_replicas=1, rank=0
    )
    steps = iter(sampler)
    tokens = sum(len(dataset[next(steps)].tokens) for _ in range(200))
    batches = time.perf_counter()
    digest = dataset.digest
    result = {
        "import_s": imported - start,
        "setup_s": ready - imported,
        "plan_and_200_batches_s": batches - ready,
        "digest_s": time.perf_counter() - batches,
        "groups": len(dataset),
        "tokens": int(dataset.sizes.sum()),
        "tokens_of_200_batches": tokens,
        "digest": digest,
    }
    print(json.dumps(result))


def _resident(process: int) -> int:
    """Bytes that a process and its children hold, pages that they share counted in each."""
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            fields = Path(f"/proc/{number}/statm").read_text().split()
            tasks = Path(f"/proc/{number}/task").iterdir()
            waiting += [
                int(child) for task in tasks for child in (task / "children").read_text().split()
            ]
        except (FileNotFoundError, ProcessLookupError):
            # It has ended in between.
            continue
        total += int(fields[1]) * os.sysconf("SC_PAGESIZE")
    return total


def measure(folder: Path) -> dict[str, object]:
    """Run the set-up once and sample its memory."""
    command = [sys.executable, "-m", "benchmarks.data", "--setup", "--folder", str(folder)]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"The set-up failed with status {process.returncode}.")
    result = json.loads((folder / "said.txt").read_text().splitlines()[-1])
    return {**result, "peak_resident_gib": round(peak / 2**30, 2)}


def main() -> None:
    """Write the data, set it up twice, and print what it took as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--setup", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.setup:
        _setup(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", arguments.groups, arguments.responses)
        write_tokenizer(folder / "tokenizer")
        size = (folder / "rows.jsonl").stat().st_size
        first, second = measure(folder), measure(folder)
        if first["digest"] != second["digest"]:
            raise SystemExit("The second run found other groups than the first made.")
        report = {"file_gib": round(size / 2**30, 2), "first_run": first, "second_run": second}
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
