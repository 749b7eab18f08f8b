"""The benchmark's arithmetic, its data, and one tiny run of its processes; TRL is not needed."""

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoTokenizer

# The benchmarks lie beside the package, not in it.
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import compute, step_profile
from benchmarks import real as real_work
from benchmarks.flops import causal_pairs, step_flops
from benchmarks.report import markdown, spread, step_seconds, summarise, summarise_sweep
from benchmarks.workloads import (
    HybridShape,
    Shape,
    Workload,
    all_pairs,
    build_base,
    disjoint_pairs,
    make_rows,
    ragged_lengths,
    read_in_training_order,
    write_rows,
)

from mpo_lightning import LoRA, PolicyConfig, PreferenceDataModule
from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.cli import main as command_line
from mpo_lightning.model.loading import build_policy

TINY = Shape(layers=2, hidden=32, intermediate=88, heads=2, vocabulary=200, rank=4)


@pytest.fixture(scope="module")
def bench_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "base"
    build_base(folder, TINY)
    return folder


# ------------------------------------------------------------------------------------ the numbers


def measured_example() -> dict[str, Any]:
    """Two counted rounds with round numbers; 8 responses."""

    def one(seconds: list[float], peak: list[float], resident: float) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "optimizer_seconds": [0.2] * len(seconds),
            "peak": peak,
            "resident": resident,
            "setup_seconds": 1.0,
            "computed": 64,
        }

    return {
        "trl": one([6.0, 9.0, 8.0], [1000, 1200, 1100], 600),
        "trl-precomputed": one([4.0, 6.0, 5.0], [1000, 1000, 1000], 600),
        "trl-all-pairs": one([2.0], [1100], 600),
        "separate": one([4.0, 4.0, 4.0], [900, 900, 900], 500),
        "shared": one([3.0, 3.0, 2.0], [700, 660, 600], 500),
        "shared-cached": one([2.0, 2.0, 1.0], [700, 700, 700], 500),
        "matmul": {"seconds": [0.5, 0.5, 1.0], "operations": 10**9},
    }


def test_speedups_are_medians_of_the_rounds_own() -> None:
    workload = Workload.even(8, 16, 8, "2:1", rounds=3)
    row = summarise(workload, TINY, measured_example())
    # 6/3, 9/3, 8/2
    assert row["speedup_vs_trl"] == 3.0
    assert row["speedup_vs_trl_range"] == [2.0, 4.0]
    # 4/2, 6/2, 5/1
    assert row["speedup_vs_trl_precomputed"] == 3.0
    # 4/3, 4/3, 4/2
    assert row["speedup_vs_separate"] == 1.33
    assert row["seconds"]["trl"] == {"median": 8.0, "min": 6.0, "max": 9.0, "rounds": 3}
    assert "speedup_vs_trl_scored_only" not in row


def test_memory_is_compared_by_median_peaks_with_and_without_what_was_there_before() -> None:
    row = summarise(Workload.even(8, 16, 8, "2:1", rounds=3), TINY, measured_example())
    assert row["memory_vs_trl"] == 0.6
    # 660 - 500 over 1100 - 600
    assert row["above_start_vs_trl"] == 0.32


def test_all_pairs_are_scaled_by_micro_batches_with_one_optimizer_step() -> None:
    measured = measured_example()
    # 64 tokens a pair: (2 - 0.2) for each of the 4 micro-batches, and 0.2 once.
    assert step_seconds("trl-all-pairs", measured["trl-all-pairs"], 8) == pytest.approx([7.4])
    row = summarise(Workload.even(8, 16, 8, "2:1", rounds=3), TINY, measured)
    assert row["scaled"] == ["trl-all-pairs"]
    assert row["speedup_vs_trl_all_pairs"] == round(7.4 / 3, 2)


def test_share_is_needed_arithmetic_over_what_bare_products_would_do_in_that_time() -> None:
    groups = ((16, (8,) * 8), (10, (8,) * 8), (12, (8,) * 8), (14, (8,) * 8))
    workload = Workload(name="x", groups=groups, ratio="ragged", rounds=3)
    row = summarise(workload, TINY, measured_example())
    needed = [step_flops(TINY, *group).total for group in groups]
    # Rates 2, 2 and 1 GFLOP/s; the first group is the warm-up's.
    shares = [needed[1] / 4e9, needed[2] / 4e9, needed[3] / 1e9]
    assert row["share_of_matmul_rate"] == spread(shares, 3)
    assert row["matmul_gflops"]["median"] == 2.0


def test_sweep_gathers_the_steps_of_each_n() -> None:
    passes = {"n": [2, 2, 2, 8], "seconds": [3, 1, 2, 9], "peak": [50, 70, 60, 99], "resident": 10}
    at_once = {"n": [2], "seconds": [4], "peak": [80], "resident": 10}
    rows = summarise_sweep({"passes": passes, "at-once": at_once})
    assert [row["n"] for row in rows] == [2, 8]
    assert rows[0]["passes"]["seconds"]["median"] == 2
    assert rows[0]["passes"]["above_start_mib"] == {"median": 50, "min": 40, "max": 60, "rounds": 3}
    assert rows[0]["at-once"]["peak_mib"]["median"] == 80
    assert "at-once" not in rows[1]


# --------------------------------------------------------------------------------- the arithmetic


def group_of(prompt: int, responses: tuple[int, ...]) -> GroupBatch:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(2, TINY.vocabulary, (length,), generator=generator)

    scores = tuple(float(i) for i in range(len(responses)))
    group = TokenGroup(ids(prompt), tuple(ids(r) for r in responses), scores, "test:1", {})
    return GroupBatch.from_groups([group])


def test_causal_pairs_are_those_of_the_mask() -> None:
    prompt, responses = 5, (3, 1, 4)
    # Position by position: who belongs to which response, 0 being the prompt.
    owner = torch.tensor([0] * prompt + [i for i, r in enumerate(responses, 1) for _ in range(r)])
    order = torch.arange(len(owner))
    may = (order[None] <= order[:, None]) & ((owner[None] == 0) | (owner[None] == owner[:, None]))
    assert causal_pairs(prompt, responses) == int(may.sum())


class CountedFlops(TorchDispatchMode):
    """Torch's own count; its FlopCounterMode cannot follow a gradient taken in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result


def test_flops_are_those_that_torch_counts(
    bench_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The counter knows PyTorch's own products and attention only.
    monkeypatch.setattr("mpo_lightning.model.attention.kernels_for", lambda *_: None)
    prompt, responses = 12, (6, 6, 6, 6)
    batch = group_of(prompt, responses)
    config = PolicyConfig(base=str(bench_base), lora=LoRA(r=TINY.rank), fast_linear=False)

    def count() -> int:
        policy = build_policy(config, "shared")
        with CountedFlops() as counter:
            policy(batch).sum().backward()
        return counter.total

    need = step_flops(TINY, prompt, responses)
    # On a CPU torch does not count the fused attention kernels.
    counted = count()
    # The head may be computed a second time in the backward pass, which is not needed.
    assert counted - need.base - need.adapters in {need.head, need.head * 3 // 2}
    with sdpa_kernel(SDPBackend.MATH):
        attention = count() - counted
    # As plain products attention computes whole rectangles, masked or not.
    rectangles = prompt * prompt + sum(r * (prompt + r) for r in responses)
    assert need.attention * rectangles == attention * causal_pairs(prompt, responses)


# ---------------------------------------------------------------------------------------- the data


def lengths_in_training(base: Path, rows: Path, count: int) -> list[tuple[int, list[int]]]:
    """Prompt and response lengths of the batches that training walks through."""
    data = PreferenceDataModule(
        tokenizer=str(base), train=str(rows), groups_per_batch=1, max_length=4096
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer = trainer
    data.setup("fit")
    assert str(data.reports[0]).startswith(f"{rows}: {count} of {count} groups")
    return [(b.prompt_lengths[0], b.response_lengths[0]) for b in data.train_dataloader()]


@pytest.mark.parametrize("ragged", [False, True])
def test_groups_have_exactly_the_tokens_asked_for_in_the_order_asked_for(
    bench_base: Path, tmp_path: Path, ragged: bool
) -> None:
    groups = ragged_lengths(7, 4) if ragged else Workload.even(8, 25, 6, "", rounds=1).groups
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, make_rows(groups, TINY.vocabulary))
    found = lengths_in_training(bench_base, rows, len(groups))
    assert found == [(prompt, list(responses)) for prompt, responses in groups]
    # The pairs as TRL tokenises them: prompt + response, the end of sequence as text.
    tokenizer = AutoTokenizer.from_pretrained(bench_base)
    for (prompt, responses), row in zip(groups, read_in_training_order(rows), strict=True):
        assert len(tokenizer(row["prompt"])["input_ids"]) == prompt
        texts = [row["prompt"] + response + tokenizer.eos_token for response in row["responses"]]
        ids = tokenizer(texts)["input_ids"]
        assert [len(i) - prompt for i in ids] == list(responses)
        assert all(i.count(tokenizer.eos_token_id) == 1 for i in ids)


def test_pairs_hold_each_response_once_or_all_combinations() -> None:
    (row,) = make_rows(((3, (4, 5, 6, 7, 8, 9)),), 200)
    score = dict(zip(row["responses"], row["scores"], strict=True))
    once, combinations = disjoint_pairs(row), all_pairs(row)
    assert sorted(text for p in once for text in (p["chosen"], p["rejected"])) == sorted(score)
    assert len(once) == 3
    assert len({(p["chosen"], p["rejected"]) for p in combinations}) == len(combinations) == 9
    for pair in once + combinations:
        assert score[pair["chosen"]] > 2.5 > score[pair["rejected"]]
        assert pair["prompt"] == row["prompt"]


def test_plan_covers_what_it_says() -> None:
    plan = compute.full_plan()
    even = [w for w in plan.workloads if w.ratio != "ragged"]
    ratios = ("4:1", "1:1", "1:4")
    assert {(w.n, w.ratio) for w in even} == {(n, r) for n in (4, 8, 32) for r in ratios}
    assert [(w.n, w.ratio) for w in plan.hybrids] == [(8, r) for r in ratios]
    kinds = plan.hybrid.config().layer_types
    assert kinds == [*["linear_attention"] * 3, "full_attention"] * 2
    for workload in [*even, *plan.hybrids]:
        prompt, responses = workload.groups[0]
        p, r = (int(part) for part in workload.ratio.split(":"))
        assert len(set(responses)) == 1
        assert prompt * r == responses[0] * p
    names = [w.name for w in (*plan.workloads, *plan.hybrids)]
    assert len(set(names)) == len(names)
    (ragged,) = [w for w in plan.workloads if w.ratio == "ragged"]
    # The warm-up, and the step that waits at the end.
    assert len(ragged.groups) == 2 + ragged.rounds
    assert [n for n, _ in plan.sweep.steps] == [2, 8, 32, 128, 512]
    assert plan.work("real") == 0 < min(map(plan.work, [*names, "sweep"]))


# ------------------------------------------------------------------------------------- a tiny run


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> Callable[[], compute.Plan]:
    """A plan of our own methods that takes seconds."""
    # The test run may have no threads to spare.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(compute, "SWEEP", {"passes": compute.SWEEP["passes"]})

    def plan() -> compute.Plan:
        groups = ((9, (5, 3)), (7, (4, 6)))
        workload = Workload(name="tiny", groups=groups, ratio="ragged", rounds=1)
        sweep = compute.Sweep(6, 4, ((2, 1), (3, 1)), 0)
        hybrid = HybridShape(**{**asdict(TINY), "layers": 4})
        hybrids = (replace(workload, name="hybrid-tiny"),)
        return compute.Plan(TINY, (workload,), sweep, 1, hybrid, hybrids)

    return plan


def test_a_run_measures_writes_and_goes_on_where_it_was_interrupted(
    only_ours: Callable[[], compute.Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    methods = ["separate", "shared-cached", "matmul", "continued"]
    sweep = compute.measure_sweep

    def interrupted(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(compute, "measure_sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute.run(only_ours(), tmp_path, methods=methods)
    before = json.loads((tmp_path / "compute.json").read_text(encoding="utf-8"))
    assert not before["complete"]
    monkeypatch.setattr(compute, "measure_sweep", sweep)
    results = compute.run(only_ours(), tmp_path, methods=methods)
    assert "kept from before: tiny, hybrid-tiny" in capsys.readouterr().out
    assert results["complete"]
    assert results["rows"] == before["rows"]

    (row,) = results["rows"]
    # The last step's group: 7 + 4 + 6 tokens, or two rows of 7 + 6.
    assert row["computed_tokens"] == {"separate": 26, "shared-cached": 17}
    assert 0 < row["share_of_matmul_rate"]["median"] < 1
    (hybrid,) = results["hybrids"]
    # The prompt of 7 and two responses of up to 6 tokens, or two rows.
    assert hybrid["computed_tokens"] == {"separate": 26, "continued": 19}
    assert hybrid["speedup_continued"] > 0
    for method in methods[:2]:
        assert 0 < row["seconds"][method]["median"] < 60
        assert row["peak_mib"][method]["median"] > row["above_start_mib"][method]["median"]
    assert [found["n"] for found in results["sweep"]] == [2, 3]
    assert json.loads((tmp_path / "compute.json").read_text(encoding="utf-8")) == results
    page = (tmp_path / "compute.md").read_text(encoding="utf-8")
    assert page == markdown(results) + "\n"
    assert "ours, separate rows" in page
    assert "## A hybrid of recurrent layers and attention" in page
    assert str(tmp_path) not in (tmp_path / "compute.json").read_text(encoding="utf-8")
    assert (tmp_path / "compute.png").stat().st_size > 10_000


def test_a_process_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "METHODS", {"matmul": {"side": "neither"}})
    workload = Workload.even(2, 4, 3, "", rounds=1)
    with pytest.raises(RuntimeError, match=r"(?s)matmul ended early.*KeyError: 'neither'"):
        compute.measure(workload, TINY, tmp_path, tmp_path / "work", ["matmul"])


def test_rounds_beyond_the_second_are_left_out_where_time_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    workload = Workload.even(2, 4, 3, "", rounds=4)
    found = compute.measure(workload, TINY, tmp_path, tmp_path / "work", ["matmul"], seconds=0)
    assert len(found["matmul"]["seconds"]) == 2


def test_methods_that_train_on_other_tokens_are_not_compared() -> None:
    workload = Workload.even(2, 4, 3, "", rounds=1)
    answers = {"trl": {"scored": 6}, "shared": {"scored": 6}, "trl-all-pairs": {"scored": 9}}
    compute._compare_tokens(workload, {**answers, "matmul": {}})
    with pytest.raises(RuntimeError, match="unequal response tokens.*'shared': 5"):
        compute._compare_tokens(workload, {**answers, "shared": {"scored": 5}})


# ----------------------------------------------------------------------------- the parts of a step


def test_profile_of_a_step_has_every_part(tmp_path: Path) -> None:
    out = tmp_path / "profile.md"
    sizes = ["--prompt=6", "--response=5", "-n=3", "--rounds=1", f"--out={out}"]
    threads = torch.get_num_threads()
    step_profile.main(sizes, TINY)
    torch.set_num_threads(threads)
    first, _, *table = out.read_text().splitlines()
    assert first.startswith("n = 3, 6:5 tokens, threads: 1. Share of the rate of bare products: 0.")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    shares = {part: float(time) for part, time, _ in rows}
    assert list(shares) == list(step_profile.PARTS)
    assert sum(shares.values()) == pytest.approx(1, abs=0.004)
    assert min(shares.values()) > 0
    assert sum(float(needed) for *_, needed in rows) == pytest.approx(1, abs=0.004)


# ------------------------------------------------------------------------------------- real work


@pytest.fixture
def real_groups(tmp_path: Path) -> Path:
    """Rows of ten responses, two of them alike and one an attack, and a row that has too few."""
    path = tmp_path / "groups.jsonl.gz"
    rows = []
    for number in range(4):
        texts = [f"Answer {number * index} to it{', at length' * index}." for index in range(9)]
        row = {"prompt": f"Question {number}?", "responses": [*texts, texts[3]]}
        scores = [0.1 * index for index in range(10)]
        models = ["one"] * 8 + ["example", "another"]
        rows.append({**row, "scores": scores, "models": models})
    rows.append({"prompt": "Short.", "responses": ["Yes.", "No."], "scores": [1, 0]})
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_real_groups_have_the_tokens_that_are_told(
    base: str, real_groups: Path, tmp_path: Path
) -> None:
    wanted = real_work.Real(n=8, max_length=60, rounds=1)
    found = real_work.prepare(tmp_path / "real", wanted, Path(base), real_groups)
    assert found.source == "groups.jsonl.gz"
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, found.rows)
    data = PreferenceDataModule(
        tokenizer=str(found.base),
        train=str(rows),
        groups_per_batch=1,
        max_length=60,
        over_long="cut",
    )
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [(b.prompt_lengths[0], tuple(b.response_lengths[0])) for b in batches] == [*found.groups]
    # Some are cut to the limit, and some are not.
    totals = {prompt + length for prompt, lengths in found.groups for length in lengths}
    assert max(totals) == 60
    assert len(totals) > 3
    for row in found.rows:
        assert sorted(row["scores"]) == list(range(8))
        # The ninth is the attack's; ranks follow the scores, which grow with the texts here.
        assert not any("at length" * 8 in text for text in row["responses"])
        assert [t for _, t in sorted(zip(row["scores"], row["responses"], strict=True))] == sorted(
            row["responses"], key=len
        )
    with pytest.raises(ValueError, match="3 groups can be used, 5 are needed"):
        real_work.prepare(tmp_path / "again", wanted._replace(rounds=3), Path(base), real_groups)


def test_real_groups_can_be_sampled(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_work.subprocess, "run", lambda command, **_: command_line(command[3:]))
    wanted = real_work.Real(n=2, max_length=160, rounds=1)
    found = real_work.prepare(tmp_path / "real", wanted, Path(base), None)
    assert found.source == "sampled by the model itself"
    assert [len(row["responses"]) for row in found.rows] == [2, 2, 2]
    assert all(prompt + max(rs) <= 160 for prompt, rs in found.groups)


def test_real_work_is_a_table_of_its_own(
    base: str, real_groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = compute.Plan(
        TINY, (), compute.Sweep(6, 4, (), 0), 1, real=real_work.Real(n=8, max_length=60, rounds=1)
    )
    chosen = {"only": ["real"], "methods": ["shared-plain"], "groups": real_groups}
    results = compute.run(plan, tmp_path / "out", model=Path(base), **chosen)
    row = results["real"]
    assert results["rows"] == []
    # The second group is the counted one.
    prompt, lengths = row["lengths"][1]
    assert row["computed_tokens"] == {"shared-plain": prompt + sum(lengths)}
    assert 0 < row["seconds"]["shared-plain"]["median"] < 60
    page = (tmp_path / "out" / "compute.md").read_text(encoding="utf-8")
    assert "## Real work" in page
    assert "ours, shared, torch's layers" in page


def test_torchs_layers_are_compared_with_trl_alike() -> None:
    measured = measured_example()
    measured["shared-plain"] = measured["shared"]
    measured["shared-cached-plain"] = measured["shared-cached"]
    row = summarise(Workload.even(8, 16, 8, "2:1", rounds=3), TINY, measured)
    assert row["speedup_vs_trl_plain"] == row["speedup_vs_trl"]
    assert row["speedup_vs_trl_precomputed_plain"] == row["speedup_vs_trl_precomputed"]
