"""Names and purposes of the commands."""

from typing import NamedTuple

__all__ = ["COMMANDS", "RUN", "Command"]


class Command(NamedTuple):
    """A command: the module whose ``main(args)`` runs it, and what it is for, in a line."""

    module: str
    purpose: str


RUN = "mpo_lightning.commands.run"


COMMANDS = {
    "fit": Command(RUN, "Train on groups of scored responses."),
    "validate": Command(RUN, "Measure a checkpoint on the validation data."),
    "test": Command(RUN, "Measure a checkpoint on the test data."),
    "predict": Command(RUN, "Measure every response of scored groups, or answer prompts."),
    "sample": Command("mpo_lightning.commands.sample", "Sample n responses to each prompt."),
    "score": Command("mpo_lightning.commands.score", "Score responses; the output is for fit."),
    "compare": Command(
        "mpo_lightning.commands.compare",
        "Score two models' answers: win rates, also at equal length.",
    ),
    "export": Command(
        "mpo_lightning.commands.export", "Write a checkpoint as an adapter or a merged model."
    ),
    "cache": Command(
        "mpo_lightning.commands.cache", "List or remove what is kept on disk for later runs."
    ),
    "data": Command("mpo_lightning.commands.data", "Check, convert or split scored groups."),
    "study": Command("mpo_lightning.commands.study", "Check the paper's claims."),
    "completion": Command(
        "mpo_lightning.commands.completion", "Print a script that completes all this in bash."
    ),
}
