"""The studies' world: its language, its model, its exact enumeration, and groups drawn from it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.studies.world.enumeration import enumerate_ends, enumerate_logps
from mpo_lightning.studies.world.grammar import CONTEXTS, SYMBOLS, Grammar, prompts, responses
from mpo_lightning.studies.world.world import GroupSampling, StudyWorld, draw_seed, load_world


@pytest.fixture(scope="module")
def world(study_worlds: Path) -> StudyWorld:
    return load_world(study_worlds, 0)


# ------------------------------------------------------------------------------- the language


def test_prompts_and_responses() -> None:
    assert len(set(prompts())) == 1000
    assert len(set(responses())) == 1024
    assert responses()[33] == SYMBOLS[1] + SYMBOLS[1]
    assert set(SYMBOLS).isdisjoint(CONTEXTS)


def test_grammar_is_a_distribution_with_full_support() -> None:
    grammar = Grammar.draw(3)
    shares = grammar.logps.exp()
    assert shares.shape == (1000, 1024)
    torch.testing.assert_close(shares.sum(1), torch.ones(1000, dtype=torch.float64))
    assert shares.min() > 1e-8
    assert not torch.equal(grammar.logps, Grammar.draw(4).logps)
    assert torch.equal(grammar.logps, Grammar.draw(3).logps)


def test_gold_is_orthogonal_to_the_attributes() -> None:
    grammar = Grammar.draw(0)
    assert set(grammar.attributes.unique().tolist()) == {-1.0, 0.0, 1.0}
    # Over all responses alike, no attribute says anything on a prompt's gold.
    gold = grammar.gold()
    assert (gold @ grammar.attributes).abs().max() < 1e-9
    # An interaction: a third of the variance within prompts depends on the prompt.
    gold = gold - gold.mean(1, keepdim=True)
    share = (gold - gold.mean(0)).square().mean() / gold.square().mean()
    assert share.item() == pytest.approx(0.7**2 / (1 + 0.7**2), abs=0.01)


def test_product_utility_is_in_neither_symbol() -> None:
    grammar = Grammar.draw(0)
    taste = (grammar.taste[:, None] + grammar.taste[None, :]).flatten() / 2**0.5
    gold = grammar.gold("product") - 0.7 * grammar.leaning[:, None] * taste
    assert gold.view(1000, 32, 32).mean(2).abs().max() < 1e-9
    # Beside it, the same dependence on the prompt.
    worth = (grammar.worth[:, None] + grammar.worth[None, :]).flatten() / 2**0.5
    same = grammar.gold() - worth
    torch.testing.assert_close(same, grammar.gold("product") - gold)


# ----------------------------------------------------------------------------------- the model


def test_model_has_learnt_the_grammar(world: StudyWorld) -> None:
    grammar = world.grammar.logps
    divergence = (grammar.exp() * (grammar - world.reference)).sum(1)
    assert divergence.mean() < 0.02
    assert divergence.max() < 0.05
    assert world.measured["divergence"] == pytest.approx(divergence.mean().item())
    assert world.measured["outside"] < 1e-3
    assert world.measured["unended"] < 1e-3
    assert 1e5 < world.measured["parameters"] < 5e5


def test_enumeration_equals_whole_sequences(world: StudyWorld) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base).eval()
    numbers = torch.tensor([5, 321, 998])
    ids, symbols = world.prompt_ids(numbers), world.symbol_ids
    end = world.tokenizer.eos_token_id
    found = enumerate_logps(model, ids, symbols)
    ends = enumerate_ends(model, ids, symbols, end)
    texts, asked = responses(), prompts()
    generator = torch.Generator().manual_seed(0)
    for row, number in enumerate(numbers.tolist()):
        for response in torch.randint(1024, (20,), generator=generator).tolist():
            text = asked[number] + texts[response]
            whole = torch.tensor([[*world.tokenizer(text)["input_ids"], end]])
            with torch.no_grad():
                logps = model(input_ids=whole).logits.double().log_softmax(-1)
            of_tokens = logps[0, :-1].gather(1, whole[0, 1:, None])[:, 0].tolist()
            assert whole.shape[1] == 7
            assert found[row, response].item() == pytest.approx(sum(of_tokens[3:5]), abs=1e-5)
            assert ends[row, response].item() == pytest.approx(of_tokens[5], abs=1e-5)
    torch.testing.assert_close(found, world.logps[numbers], atol=1e-4, rtol=0)
    with torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=1).logits[:, -1]
    first = logits.double().softmax(-1)
    others = torch.ones(first.shape[1], dtype=torch.bool)
    others[symbols] = False
    # More than what is no symbol in the first place already, and no more than in both.
    outside = 1 - found.exp().sum(1)
    assert (outside > 0.999 * first[:, others].sum(1)).all()
    assert (outside < 0.01).all()


def test_second_build_reuses(world: StudyWorld, study_worlds: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study_worlds.rglob("*")}
    again = load_world(study_worlds, 0)
    assert torch.equal(again.logps, world.logps)
    assert {path: path.stat().st_mtime_ns for path in study_worlds.rglob("*")} == before


def test_gold_counts_in_standard_deviations(world: StudyWorld) -> None:
    gold, shares = world.gold(), world.reference.exp()
    assert (shares * gold).sum(1).abs().max() < 1e-9
    assert (shares * gold.square()).sum(1).mean().item() == pytest.approx(1)


# ----------------------------------------------------------------------------------- the groups


def test_samples_follow_the_reference_and_are_nested(world: StudyWorld) -> None:
    trained = world.trained(200)
    drawn = world.sample(trained, 40, GroupSampling())
    assert torch.equal(drawn[:50, :10], world.sample(world.trained(50), 10, GroupSampling()))
    gold, shares = world.gold()[trained], world.reference[trained].exp()
    found = gold.gather(1, drawn).mean()
    # Five standard errors of 8000 draws with a variance of one.
    assert abs(found - (shares * gold).sum(1).mean()) < 5 / 8000**0.5
    assert set(world.held_out.tolist()).isdisjoint(world.trained(936).tolist())
    with pytest.raises(ValueError, match="936 prompts, not 937"):
        world.trained(937)


def test_draws_differ_and_are_nested_alike(world: StudyWorld) -> None:
    trained = world.trained(50)
    first, second = (world.sample(trained, 20, GroupSampling(draw=draw)) for draw in (0, 1))
    # Of responses that are alike by chance alone.
    alike = (first == second).double().mean().item()
    shares = world.reference[trained].exp()
    assert alike == pytest.approx(shares.square().sum(1).mean().item(), abs=0.02)
    assert torch.equal(second[:10, :5], world.sample(trained[:10], 5, GroupSampling(draw=1)))
    assert draw_seed(7, 0) == 7
    # Of no other world: seeds are far below.
    assert draw_seed(7, 1) > 20_000


def test_dependent_samples(world: StudyWorld) -> None:
    trained = world.trained(50)
    copies = world.sample(trained, 10, GroupSampling(copies=5))
    assert all(len(set(row)) <= 2 for row in copies.tolist())
    assert torch.equal(copies[:, ::5], world.sample(trained, 2, GroupSampling()))
    always = world.sample(trained, 20, GroupSampling(shared=1.0)) // 32
    assert (always == always[:, :1]).all()
    never, half = (world.sample(trained, 40, GroupSampling(shared=s)) // 32 for s in (0.0, 0.5))
    assert (half == half[:, :1]).double().mean() > (never == never[:, :1]).double().mean() + 0.3
    cold = world.sample(trained, 40, GroupSampling(temperature=0.5))
    warm = world.sample(trained, 40, GroupSampling())
    reference = world.reference[trained]
    assert reference.gather(1, cold).mean() > reference.gather(1, warm).mean() + 0.2


def test_groups_are_read_as_they_were_written(world: StudyWorld, tmp_path: Path) -> None:
    trained = world.trained(4)
    drawn = world.sample(trained, 3, GroupSampling())
    scores = torch.arange(12.0, dtype=torch.float64).view(4, 3) / 3
    world.write_groups(tmp_path / "groups.jsonl", trained, drawn, scores)
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert rows[2]["prompt"] == prompts()[trained[2]]
    data = PreferenceDataModule(
        tokenizer=str(world.base), train=str(tmp_path / "groups.jsonl"), prompt_format="text"
    )
    data.setup("fit")
    group = data.datasets["train"].groups[2]
    assert torch.equal(group.prompt, world.prompt_ids(trained)[2])
    symbols, end = world.symbol_ids, world.tokenizer.eos_token_id
    for response, number in zip(group.responses, drawn[2].tolist(), strict=True):
        assert response.tolist() == [symbols[number // 32], symbols[number % 32], end]
    assert group.scores == tuple(scores[2].tolist())
