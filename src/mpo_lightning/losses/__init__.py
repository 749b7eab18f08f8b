"""Public names of the set-level preference losses and of the rules that split groups.

A loss maps ``(log_ratios, scores, valid)``, each (B, N), to one number per group, (B,). The
equations are in docs/mathematics.md.
"""

from mpo_lightning.losses.base import SetLoss
from mpo_lightning.losses.lists import (
    GVPO,
    NCA,
    EachAgainstBelow,
    InfoNCA,
    LiPO,
    MultiLevelMPO,
    PlackettLuce,
)
from mpo_lightning.losses.pairs import DPO, IPO, Hinge, PairLoss, RobustDPO, SimPO
from mpo_lightning.losses.partition import (
    AboveMean,
    AboveQuantile,
    AboveThreshold,
    AboveTrimmedMean,
    BestRest,
    Partition,
    TopBottom,
)
from mpo_lightning.losses.scores import deviation_log_weights, deviations, ordered_pairs
from mpo_lightning.losses.sets import MDPO, MIPO, MPO, EachMPO

__all__ = [
    "DPO",
    "GVPO",
    "IPO",
    "MDPO",
    "MIPO",
    "MPO",
    "NCA",
    "AboveMean",
    "AboveQuantile",
    "AboveThreshold",
    "AboveTrimmedMean",
    "BestRest",
    "EachAgainstBelow",
    "EachMPO",
    "Hinge",
    "InfoNCA",
    "LiPO",
    "MultiLevelMPO",
    "PairLoss",
    "Partition",
    "PlackettLuce",
    "RobustDPO",
    "SetLoss",
    "SimPO",
    "TopBottom",
    "deviation_log_weights",
    "deviations",
    "ordered_pairs",
]
