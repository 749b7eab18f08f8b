"""Table of the commands."""

from typing import NamedTuple

__all__ = ["COMMANDS", "FUNCTIONS", "RUN", "Command"]


class Command(NamedTuple):
    """A command: the module whose ``main(args)`` runs it, and its purpose in one line."""

    module: str
    purpose: str


RUN = "mpo_lightning.commands.run"
FUNCTIONS = "mpo_lightning.commands.functions"


COMMANDS = {
    "fit": Command(RUN, "Train on groups of scored responses."),
    "validate": Command(RUN, "Measure a checkpoint on the validation data."),
    "test": Command(RUN, "Measure a checkpoint on the test data."),
    "predict": Command(RUN, "Measure every response of scored groups, or answer prompts."),
    "sample": Command(FUNCTIONS, "Sample n responses to each prompt."),
    "score": Command(FUNCTIONS, "Score responses, for use in fit."),
    "compare": Command(FUNCTIONS, "Score two models' answers: win rates, also at equal length."),
    "export": Command(
        FUNCTIONS,
        "Write a checkpoint as a PEFT adapter or a merged model, with a model card.",
    ),
    "cache": Command(
        "mpo_lightning.commands.cache", "List or remove cached references and token ids."
    ),
    "data": Command("mpo_lightning.commands.data", "Check, convert or split scored groups."),
    "study": Command(
        "mpo_lightning.commands.study",
        "Check the paper's claims in a fully known world.",
    ),
    "completion": Command(
        "mpo_lightning.commands.completion", "Print a script that completes all this in bash."
    ),
}
