"""What `data check` says of a judge's scores, and which method its advice leads to."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.trusted import compare_with_trusted
from mpo_lightning.data.check.warnings import find_trusted_warnings
from mpo_lightning.studies.world.judges import Judge, NoisyJudge
from mpo_lightning.studies.world.world import GroupSampling, load_world

__all__ = ["AS_IT_IS", "LABELLED", "PLAIN", "DataCheck", "advised"]

# Names of methods of `calibration`: the one that a user meant to run, and MPO.
AS_IT_IS, PLAIN = "W-MPO 1 per score", "MPO"
# Number of groups with trusted labels, and of labels in each.
LABELLED = {"none": (0, 0), "48": (12, 4), "480": (48, 10)}
# Warnings of which the remedy is no weights; a split at the median; weights per std.
UNWEIGHTED = {"low-agreement", "unsure-differences", "wrong-best", "wrong-worst"}
AT_MEDIAN = {"skewed-scores", "lopsided-sets"}
PER_STD = {"scale-varies", "weight-dominance", "weight-without-effect", "outliers"}


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """The task of checking the groups that runs train on, meant for W-MPO with alpha 1 per score.

    Args:
        seed: seed of the world.
        judge: scores the responses.
        prompts: number of groups.
        responses: number of responses of a group.
    """

    seed: int
    judge: Judge = field(default_factory=NoisyJudge)
    prompts: int = 128
    responses: int = 10

    def __call__(self, worlds: Path) -> dict[str, list[str]]:
        """Return the names of the warnings, by number of trusted labels (`LABELLED`).

        The labels are gold. The attribute that a judge may have a taste for is given as a column.
        """
        world = load_world(worlds, self.seed)
        prompts = world.trained(self.prompts)
        drawn = world.sample(prompts, self.responses, GroupSampling())
        scores = self.judge(world, prompts, drawn)
        with tempfile.TemporaryDirectory() as folder:
            groups = Path(folder) / "groups.jsonl"
            world.write_groups(groups, prompts, drawn, scores)
            found = [each.name for each in check(str(groups), alpha=1.0).warnings]
        gold = world.gold()[prompts[:, None], drawn]
        attribute = world.grammar.attributes[:, 0][drawn]
        told = {}
        for name, (labelled, labels) in LABELLED.items():
            told[name] = list(found)
            if labelled:
                # Prompts and responses are in random order: the first are as good as any.
                trusted = torch.full_like(gold, torch.nan)
                trusted[:labelled, :labels] = gold[:labelled, :labels]
                comparison = compare_with_trusted(scores, trusted, columns={"column": attribute})
                told[name] += [each.name for each in find_trusted_warnings(comparison)]
        return told


def advised(warnings: Iterable[str]) -> str:
    """Return the method of `calibration` that remedies lead to, from W-MPO per score.

    Where both the weights and the split are doubted, that is MPO split at the median: the study has
    no weights with that split.
    """
    found = set(warnings)
    if found & AT_MEDIAN:
        return "MPO median"
    if found & UNWEIGHTED:
        return PLAIN
    return "W-MPO 1 per std" if found & PER_STD else AS_IT_IS
