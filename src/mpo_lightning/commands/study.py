"""``mpo-lightning study NAME --out DIR``: check the paper's claims in a world of known rewards."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.errors import UserError

__all__ = ["STUDIES", "main"]

STUDIES = {
    "methods": "All methods at the same budget.",
    "responses": "Bias over the number of responses: of samples, and of trained policies.",
    "deviation": "Strength of the deviation weights, with clean and noisy scores.",
    "calibration": "Miscalibrated judges, with and without remedies.",
    "correlation": "Responses that are not independent, a quality that does not add up.",
    "sets": "Labels of sets by their sum, best, mean or worst response.",
    "skew": "Shapes of score distributions, and rules that split groups.",
    "levels": "Ordinal levels: multi-level losses against two sets.",
    "scaling": "Time, memory and quality with 2 to 512 responses.",
}


def _make_parser() -> SettingsParser:
    listed = "\n".join(f"  {name.ljust(13)}{purpose}" for name, purpose in STUDIES.items())
    purpose = f"{COMMANDS['study'].purpose}\n\n{listed}"
    parser = SettingsParser(prog="mpo-lightning study", description=purpose)
    parser.add_argument("name", choices=list(STUDIES), help="name of the study")
    parser.add_argument("--out", type=str, required=True, help="folder of the results")
    parser.add_argument(
        "--quick", action="store_true", help="a small form, as a test; not evidence"
    )
    own = "number of seeds. Defaults to the study's own"
    parser.add_argument("--seeds", type=int | None, default=None, help=own)
    parser.add_argument("--workers", type=int, default=2, help="number of one-thread processes")
    return parser


def main(args: list[str]) -> None:
    """Run ``mpo-lightning study``.

    Args:
        args: arguments, beginning with the command's name.
    """
    chosen = _make_parser().parse_args(args[1:])
    for name in ("seeds", "workers"):
        if chosen[name] is not None and chosen[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {chosen[name]}.")
    missing = [name for name in ("matplotlib", "scipy") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"Studies need {' and '.join(missing)}: pip install 'mpo-lightning[studies]'."
        )
    # Takes seconds to import, for which the check of the arguments need not wait.
    from mpo_lightning.studies.lab.conditions import Form
    from mpo_lightning.studies.lab.results import run_study

    form = Form(quick=chosen.quick, seeds=chosen.seeds)
    study = import_module(f"mpo_lightning.studies.{chosen.name}").study
    run_study(chosen.name, study, form, Path(chosen.out).expanduser(), workers=chosen.workers)
