"""Command line of the show case: `python -m mpo_lightning.showcase COMMAND`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpo_lightning.errors import UserError
from mpo_lightning.showcase.prompts import SPLITS, write_prompts

STUDIES = ("verifiable", "judged")
HARNESS_TASKS = ("constraints", "text")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpo_lightning.showcase",
        description="A real model on instructions whose constraints a program can verify.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="compose the prompts of each split")
    prompts.add_argument("--out", type=Path, required=True, help="folder of the files")
    prompts.add_argument("--seed", type=int, default=0)
    for split, (count, _) in SPLITS.items():
        number = f"number of prompts, from its first; {count} if not set"
        prompts.add_argument(f"--{split}", type=int, default=count, help=number)
    model = commands.add_parser("model", help="write SmolLM2-135M-Instruct in float32")
    model.add_argument("--out", type=Path, required=True, help="folder of the model")
    report = commands.add_parser("report", help="print and draw before and after")
    report.add_argument("--run", type=Path, required=True, help="folder of the run")
    study = commands.add_parser("study", help="run a study of a real model, see its plan")
    study.add_argument("name", choices=STUDIES)
    study.add_argument("--out", type=Path, required=True, help="folder of the results")
    study.add_argument("--data", help="file of judged responses, for the study of them")
    study.add_argument("--arms", nargs="+", help="parts of the study; all if not set")
    study.add_argument("--quick", action="store_true", help="a small form; not evidence")
    study.add_argument("--workers", type=int, default=2, help="number of one-thread processes")
    dtype = study.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    dtype.help = "dtype of the model; bfloat16 is faster on processors with hardware for it"
    harness = commands.add_parser("harness", help="evaluate by lm-evaluation-harness")
    harness.add_argument("--tuned", type=Path, required=True, help="folder of the exported model")
    harness.add_argument("--prompts", type=Path, required=True, help="folder of the prompts")
    harness.add_argument("--text", type=Path, required=True, help="folder of held-out pages, .md")
    harness.add_argument("--out", type=Path, required=True, help="file of the results, .json")
    tasks = harness.add_argument("--tasks", nargs="+", choices=HARNESS_TASKS)
    tasks.help = "what to evaluate; all if not set"
    harness.add_argument("--limit", type=int, help="number of prompts and pages; all if not set")
    for command in (study, harness):
        command.add_argument("--base", type=Path, default=Path("showcase/base"))
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments. Defaults to those of the process.
    """
    options = _parser().parse_args(args)
    try:
        if options.command == "prompts":
            sizes = {split: getattr(options, split.replace("-", "_")) for split in SPLITS}
            write_prompts(options.out, options.seed, sizes)
        elif options.command == "model":
            from mpo_lightning.showcase.model import write_model

            write_model(options.out)
        elif options.command == "report":
            from mpo_lightning.showcase.report import report

            report(options.run)
        elif options.command == "harness":
            from mpo_lightning.showcase.harness import evaluate

            evaluate(
                {"base": options.base, "tuned": options.tuned},
                prompts=options.prompts,
                text=options.text,
                out=options.out,
                limit=options.limit,
                tasks=options.tasks or HARNESS_TASKS,
            )
        else:
            _study(options)
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def _study(options: argparse.Namespace) -> None:
    """Run a study."""
    from mpo_lightning.showcase.judged import ARMS as JUDGED_ARMS
    from mpo_lightning.showcase.judged import File
    from mpo_lightning.showcase.judged import study as judged
    from mpo_lightning.showcase.runs import Base
    from mpo_lightning.showcase.verifiable import ARMS
    from mpo_lightning.showcase.verifiable import study as verifiable
    from mpo_lightning.studies.lab.conditions import Findings, Form
    from mpo_lightning.studies.lab.results import StudyError, run_study
    from mpo_lightning.studies.lab.runner import Runner

    of_judged = options.name == "judged"
    known = JUDGED_ARMS if of_judged else ARMS
    arms = options.arms or known
    if not set(arms) <= set(known):
        raise StudyError(f"--arms must be of {', '.join(known)}, got {' '.join(arms)}.")
    base = Base.of(options.base, options.dtype)
    file = File.of(options.data) if of_judged else None

    def study(runner: Runner, form: Form) -> Findings:
        if file is not None:
            return judged(runner, form, base, file, arms)
        return verifiable(runner, form, base, arms)

    run_study(options.name, study, Form(quick=options.quick), options.out, workers=options.workers)


if __name__ == "__main__":
    main()
