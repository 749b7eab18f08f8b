"""Compare a trained adapter with its base on held-out prompts of the toy world.

Every number is measured on freshly sampled responses: nothing of the training data is used.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from mpo_lightning.toy import language
from mpo_lightning.toy.world import Sample, find_world, prompt_ids, sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESAMPLES: Final = 2000
SHOWN_PROMPTS: Final = 4
SHOWN_RESPONSES: Final = 2
CURVES: Final = (
    ("Loss", ("train/loss", "val/loss")),
    ("Reward margin (nats)", ("train/rewards/margin", "val/rewards/margin")),
    ("Reward accuracy", ("train/rewards/accuracy", "val/rewards/accuracy")),
    # The logged estimate is over the responses in the data, which the reference wrote.
    ("KL(reference || policy) on the data (nats)", ("train/kl", "val/kl")),
)
"""Panels of the picture and the columns of a CSVLogger's metrics.csv that they show."""

Samples = list[list[Sample]]
Measure = Callable[[str, Sample], float]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Shift:
    """A mean before (base) and after (policy)."""

    before: float
    after: float


@dataclass(frozen=True)
class Example:
    """Some sampled responses to one held-out prompt, with their gold scores."""

    prompt: str
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]


@dataclass(frozen=True)
class Report:
    """What changed from the base to the policy, on held-out prompts.

    Attributes:
        world: Folder of the world.
        adapter: Folder of the adapter.
        seed: Seed of the samples and of the bootstrap.
        prompts: Number of held-out prompts.
        samples_per_prompt: Number of responses of each model to each prompt.
        gold: Mean gold score.
        gold_gain: Mean gold score of the policy minus that of the base.
        win_rate: Share of (policy, base) pairs of responses to the same prompt in which the policy
            scores higher; ties count half.
        kl: KL(policy || reference) in nats per response, estimated on the policy's samples.
        length: Mean response length in tokens, with the end-of-turn token.
        cut: Share of responses that ran into the token limit.
        grammatical: Share of responses that the grammar can write.
        on_topic: Share of responses that name the topic of the prompt.
        attributes: Mean of each nuisance attribute.
        gold_scores: All gold scores before and after, for the histogram.
        examples: A few responses.
    """

    world: str
    adapter: str
    seed: int
    prompts: int
    samples_per_prompt: int
    gold: Shift
    gold_gain: Estimate
    win_rate: Estimate
    kl: Estimate
    length: Shift
    cut: Shift
    grammatical: Shift
    on_topic: Shift
    attributes: dict[str, Shift]
    gold_scores: tuple[list[float], list[float]]
    examples: list[Example]


def evaluate(
    world_dir: str | Path,
    adapter_dir: str | Path,
    *,
    samples_per_prompt: int = 8,
    seed: int = 0,
) -> Report:
    """Sample from the base and from base plus adapter on the held-out prompts, and compare.

    Args:
        world_dir: Folder of a built world.
        adapter_dir: Folder of a PEFT adapter trained on that world's base.
        samples_per_prompt: Responses of each model to each prompt, at temperature 1.
        seed: Seed of the samples and of the bootstrap.

    Returns:
        The measurements.

    Raises:
        FileNotFoundError: If there is no complete world or no adapter.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = find_world(world_dir)
    if world is None:
        raise FileNotFoundError(f"{world_dir} holds no complete world; build one there first")
    adapter = Path(adapter_dir)
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no PEFT adapter (adapter_config.json is missing)")
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt must be at least 1, not {samples_per_prompt}")
    description = json.loads((world.path / "world.json").read_text(encoding="utf-8"))
    with world.split("test").open(encoding="utf-8") as lines:
        prompts = [str(json.loads(line)["prompt"]) for line in lines]

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32).eval()

    def draw(stream: int) -> Samples:
        return sample_responses(
            model,
            tokenizer,
            prompts,
            samples_per_prompt,
            seed=2 * seed + stream,
            max_new_tokens=description["settings"]["max_new_tokens"],
        )

    before = draw(0)
    model = PeftModel.from_pretrained(model, adapter).eval()
    after = draw(1)
    policy = response_logps(model, tokenizer, prompts, after)
    with model.disable_adapter():
        reference = response_logps(model, tokenizer, prompts, after)

    def values(drawn: Samples, measure: Measure) -> Tensor:
        rows = [[measure(p, s) for s in group] for p, group in zip(prompts, drawn, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def shift(measure: Measure) -> Shift:
        return Shift(*(float(values(drawn, measure).mean()) for drawn in (before, after)))

    def attribute(measure: Callable[[str], float]) -> Shift:
        return shift(lambda _, sample: measure(sample.text))

    old, new = (values(drawn, _gold) for drawn in (before, after))
    generator = torch.Generator().manual_seed(seed)
    shown = torch.linspace(0, len(prompts) - 1, min(SHOWN_PROMPTS, len(prompts))).long().tolist()
    return Report(
        world=str(world.path.resolve()),
        adapter=str(adapter.resolve()),
        seed=seed,
        prompts=len(prompts),
        samples_per_prompt=samples_per_prompt,
        gold=Shift(float(old.mean()), float(new.mean())),
        gold_gain=bootstrap(new.mean(1) - old.mean(1), generator),
        win_rate=bootstrap(win_rates(new, old), generator),
        kl=bootstrap((policy - reference).mean(1), generator),
        length=shift(lambda _, sample: float(len(sample.ids))),
        cut=shift(lambda _, sample: float(not sample.ended)),
        grammatical=attribute(lambda text: float(language.is_grammatical(text))),
        on_topic=shift(lambda p, s: float(language.topic_of(p) in language.words(s.text))),
        attributes={name: attribute(f) for name, f in language.ATTRIBUTES.items()},
        gold_scores=(old.flatten().tolist(), new.flatten().tolist()),
        examples=[
            Example(
                prompts[i],
                *(
                    [(s.text, _gold(prompts[i], s)) for s in drawn[i][:SHOWN_RESPONSES]]
                    for drawn in (before, after)
                ),
            )
            for i in shown
        ],
    )


def _gold(prompt: str, sample: Sample) -> float:
    return language.gold_score(prompt, sample.text)


def win_rates(policy: Tensor, base: Tensor) -> Tensor:
    """Per prompt, how often the policy's sample scores higher over all m x m pairs, ties half.

    Args:
        policy: Scores of the policy's samples, (prompts, m).
        base: Scores of the base's samples, (prompts, m).

    Returns:
        One rate per prompt, (prompts,).
    """
    margins = policy[:, :, None] - base[:, None, :]
    return ((margins.sign() + 1) / 2).mean((1, 2))


def bootstrap(per_prompt: Tensor, generator: torch.Generator) -> Estimate:
    """Mean over prompts and the percentile interval (95%) of means over resampled prompts."""
    count = len(per_prompt)
    picks = torch.randint(count, (RESAMPLES, count), generator=generator)
    means = per_prompt.double()[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(per_prompt.double().mean()), low, high)


@torch.no_grad()
def response_logps(
    model: Any, tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[str], drawn: Samples
) -> Tensor:
    """Log-probability of each sampled response, in nats, from the model's plain fp32 logits.

    Returns:
        One value per sample, (prompts, samples of each).
    """
    rows = []
    for prompt, group in zip(prompts, drawn, strict=True):
        start = prompt_ids(tokenizer, prompt)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(start + list(sample.ids)) for sample in group],
            batch_first=True,
            padding_value=tokenizer.pad_token_id,
        )
        lengths = torch.tensor([len(sample.ids) for sample in group])
        # Padding is on the right, where causal attention does not look back from.
        logps = model(input_ids=ids).logits[:, len(start) - 1 : -1].float().log_softmax(-1)
        of_tokens = logps.gather(-1, ids[:, len(start) :, None]).squeeze(-1)
        is_token = torch.arange(of_tokens.shape[1]) < lengths[:, None]
        rows.append(torch.where(is_token, of_tokens, 0.0).double().sum(1))
    return torch.stack(rows)


def read_curves(metrics_csv: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Read a Lightning CSVLogger's metrics.csv: for each column, its (step, value) pairs.

    Lightning writes training and validation values of one step in separate rows with empty cells,
    and adds "_step" to a name that is also averaged over epochs.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    with Path(metrics_csv).open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if reader.fieldnames is None or "step" not in reader.fieldnames:
            raise ValueError(f"{metrics_csv} has no column 'step'; is it a CSVLogger's file?")
        known = {column for _, columns in CURVES for column in columns}
        for row in reader:
            for name, cell in row.items():
                column = name.removesuffix("_step")
                if column in known and cell:
                    curves.setdefault(column, []).append((float(row["step"]), float(cell)))
    if not curves:
        raise ValueError(f"{metrics_csv} has none of the columns {', '.join(sorted(known))}")
    return curves


def write_report(report: Report, out: str | Path, metrics_csv: str | Path | None = None) -> None:
    """Print the report; write `report.json` and the picture `quickstart.png` under `out`.

    Args:
        report: The measurements.
        out: Folder to write to.
        metrics_csv: A Lightning CSVLogger's metrics.csv, for training curves.

    Raises:
        ImportError: If matplotlib is missing (after the table and `report.json`).
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    print(format_report(report))
    numbers, picture = folder / "report.json", folder / "quickstart.png"
    numbers.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    draw_picture(report, picture, read_curves(metrics_csv) if metrics_csv is not None else {})
    print(f"\npicture  {picture.resolve()}")
    print(f"report   {numbers.resolve()}")
    print(f"adapter  {report.adapter}")


def format_report(report: Report) -> str:
    """The report as a readable text table with the sampled responses."""
    rows = {
        "mean gold score": report.gold,
        "response length (tokens)": report.length,
        "cut by the token limit": report.cut,
        "grammatical": report.grammatical,
        "on topic": report.on_topic,
    }
    count = report.samples_per_prompt
    text = [
        f"Held-out prompts: {report.prompts}, {count} fresh responses of each model to each",
        "",
        f"{'':<28}{'before':>9}{'after':>9}",
        *(_table_row(name, shift) for name, shift in rows.items()),
        "",
        f"gold gain                   {report.gold_gain}",
        f"win rate against the base   {report.win_rate}",
        f"KL(policy || base), nats    {report.kl}",
        "(mean and 95% bootstrap interval over prompts)",
        "",
        f"{'nuisance attributes':<28}{'before':>9}{'after':>9}",
        *(_table_row(name, shift) for name, shift in report.attributes.items()),
    ]
    for example in report.examples:
        text += ["", f"> {example.prompt}"]
        for when, responses in (("before", example.before), ("after", example.after)):
            text += [f"  {when:<7}{score:+5.1f}  {response}" for response, score in responses]
    return "\n".join(text)


def _table_row(name: str, shift: Shift) -> str:
    return f"{name:<28}{shift.before:>9.3f}{shift.after:>9.3f}"


def draw_picture(
    report: Report, path: str | Path, curves: Mapping[str, list[tuple[float, float]]]
) -> None:
    """Draw the training curves, where there are any, and the gold scores before and after."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install 'mpo-lightning[plots]'"
        ) from error

    panels = [(title, columns) for title, columns in CURVES if any(c in curves for c in columns)]
    # A figure of its own on the Agg canvas: pyplot's global backend is not touched.
    columns_of_grid = min(3, len(panels) + 1)
    rows_of_grid = -(-(len(panels) + 1) // columns_of_grid)
    size = (4.5 * columns_of_grid, 3.4 * rows_of_grid)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [
        figure.add_subplot(rows_of_grid, columns_of_grid, i + 1) for i in range(len(panels) + 1)
    ]
    for axis, (title, columns) in zip(axes, panels, strict=False):
        for column in columns:
            if column in curves:
                steps, values = zip(*curves[column], strict=True)
                axis.plot(steps, values, label=column, marker="o" if len(steps) < 8 else None)
        axis.set(title=title, xlabel="step")
        axis.legend()
    old, new = report.gold_scores
    # Gold scores are whole numbers, so each gets a bin of its own.
    low, high = int(min(old + new)), int(max(old + new))
    edges = [value - 0.5 for value in range(low, high + 2)]
    for scores, shift, label in (
        (old, report.gold.before, "before"),
        (new, report.gold.after, "after"),
    ):
        axes[-1].hist(scores, bins=edges, alpha=0.6, label=f"{label} (mean {shift:.2f})")
    axes[-1].set(title="Gold score on held-out prompts", xlabel="gold score", ylabel="responses")
    axes[-1].legend()
    figure.savefig(path, dpi=120)
