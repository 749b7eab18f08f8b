"""The losses as a model card writes them; their derivations are in docs/mathematics.md."""

from typing import NamedTuple

__all__ = ["BIBTEX", "FORMULAS", "WHERE", "Formula"]


class Formula(NamedTuple):
    """A loss of a group.

    Attributes:
        name: what the method is called.
        latex: the loss, in the notation of docs/mathematics.md.
        where: what symbols stand for that WHERE does not explain; it may be empty.
        arxiv: papers.
    """

    name: str
    latex: str
    where: str
    arxiv: tuple[str, ...]


WHERE = (
    "$r_i$ is the log-ratio "
    "$\\log \\pi_\\theta(y_i \\mid x) - \\log \\pi_\\text{ref}(y_i \\mid x)$ of policy to "
    "reference, summed over the response's tokens, $\\beta$ the pull towards the reference, "
    "$Y^+$ and $Y^-$ the chosen and the rejected set of the group's $n$ responses, $S_i$ a score, "
    "$\\sigma$ the logistic function"
)
_ENERGY = (
    "$E_i = \\beta r_i + w_i$ with log-weights $w_i = \\alpha \\lvert \\Delta_i \\rvert^{p}$ from "
    "the deviations $\\Delta_i = S_i - \\bar S$ ($\\alpha = 0$: none); $\\gamma$ multiplies the "
    "rejected terms"
)
_DISTANCE = (
    "$d = \\frac{1}{\\lvert Y^+ \\rvert} \\sum_{Y^+} r_i - "
    "\\frac{1}{\\lvert Y^- \\rvert} \\sum_{Y^-} r_j$"
)
_PAIR = "$h = \\beta (r_w - r_l)$ is the margin of a winner and a loser"
_MPO = "L = -\\log \\frac{\\sum_{i \\in Y^+} e^{E_i}}{\\sum_{j=1}^{n} e^{E_j}}"
_LSE = "\\mathrm{LSE}"

FORMULAS = {
    "MPO": Formula("Multi-Preference Optimization (MPO)", _MPO, _ENERGY, ("2412.04628",)),
    "EachMPO": Formula(
        "MPO with each chosen response by itself",
        "L = \\frac{1}{\\lvert Y^+ \\rvert} \\sum_{i \\in Y^+} "
        "-\\log \\frac{e^{E_i}}{e^{E_i} + M}, \\qquad M = \\sum_{j \\in Y^-} e^{E_j}",
        _ENERGY,
        ("2412.04628",),
    ),
    "MultiLevelMPO": Formula(
        "MPO over all cuts between score levels",
        _MPO,
        "it is the mean of this over the cuts between the levels of the scores, with "
        "$Y^+ = \\lbrace S \\ge l_k \\rbrace$; " + _ENERGY,
        ("2412.04628",),
    ),
    "MDPO": Formula(
        "DPO on the sets' means", "-\\log \\sigma(\\beta d)", _DISTANCE, ("2410.12138",)
    ),
    "MIPO": Formula(
        "IPO on the sets' means",
        "\\left( d - \\tfrac{1}{2 \\beta} \\right)^2",
        _DISTANCE,
        ("2410.12138",),
    ),
    "DPO": Formula(
        "Direct Preference Optimization (DPO)", "-\\log \\sigma(h)", _PAIR, ("2305.18290",)
    ),
    "IPO": Formula("IPO", "(h - \\frac12)^2 / \\beta^2", _PAIR, ("2310.12036",)),
    "Hinge": Formula("Hinge loss on pairs", "\\max(0, 1 - h)", _PAIR, ("2305.10425",)),
    "RobustDPO": Formula(
        "Robust DPO",
        "\\frac{-(1 - f) \\log \\sigma(h) + f \\log \\sigma(-h)}{1 - 2 f}",
        _PAIR + ", $f$ the part of flipped labels",
        ("2403.00409",),
    ),
    "SimPO": Formula(
        "SimPO",
        "-\\log \\sigma(h - \\beta m)",
        _PAIR + ", per token and without reference, $m$ the target margin",
        ("2405.14734",),
    ),
    "InfoNCA": Formula(
        "InfoNCA",
        "L = -\\sum_i t_i \\log \\mathrm{softmax}(\\beta r)_i, \\qquad "
        "t = \\mathrm{softmax}(S / \\tau)",
        "$\\tau$ is the temperature",
        ("2402.05369",),
    ),
    "NCA": Formula(
        "NCA",
        "L = -\\sum_i \\left[ t_i \\log \\sigma(\\beta r_i) + "
        "\\tfrac{1}{n} \\log \\sigma(-\\beta r_i) \\right], \\qquad "
        "t = \\mathrm{softmax}(S / \\tau)",
        "$\\tau$ is the temperature",
        ("2402.05369",),
    ),
    "PlackettLuce": Formula(
        "Plackett-Luce",
        "L = \\sum_{k=1}^{m-1} \\left[ "
        + _LSE
        + "_{S \\le l_k}(\\beta r) - "
        + _LSE
        + "_{S = l_k}(\\beta r) \\right]",
        "$l_1 \\gt \\dots \\gt l_m$ are the levels of the scores, $\\mathrm{LSE}_A(E)$ is "
        "$\\log \\sum_{i \\in A} e^{E_i}$",
        ("2305.18290",),
    ),
    "LiPO": Formula(
        "LiPO-lambda",
        "L = \\sum_{S_i \\gt S_j} \\lvert 2^{s_i} - 2^{s_j} \\rvert \\cdot \\left\\lvert "
        "\\frac{1}{\\log(1 + \\rho_i)} - \\frac{1}{\\log(1 + \\rho_j)} \\right\\rvert \\cdot "
        "\\log(1 + e^{-\\beta (r_i - r_j)})",
        "$s$ are the scores mapped to 0 to 1 within the group, $\\rho_i$ is the rank by reward",
        ("2402.01878",),
    ),
}

BIBTEX = {
    "2412.04628": """@article{gupta2024mpo,
  title  = {Multi-Preference Optimization: Generalizing DPO via Set-Level Contrasts},
  author = {Gupta and others},
  year   = {2024},
  journal = {arXiv preprint arXiv:2412.04628}
}""",
}
