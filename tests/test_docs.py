"""What the pages of docs/ say holds.

All are in the navigation, their links lead somewhere, their commands parse, their code is code, and
their tables are whole. `make docs` builds the site and checks what generated parts link to.
"""

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml
from mkdocs.exceptions import PluginError
from mkdocs.utils.yaml import get_yaml_loader
from pymdownx.slugs import slugify

import collect_help
import formulas
import method
import pages
import settings
import tables

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Others that are read by people and lie elsewhere.
OTHERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
OTHERS += sorted((ROOT / "benchmarks").rglob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [*PAGES, *OTHERS]}
# What stands in commands for something that the reader names.
NAMES = {"COMMAND": "fit", "NAME": "methods", "FILE": "train.jsonl", "FILE...": "train.jsonl"}


def blocks(text: str, *languages: str) -> list[str]:
    kinds = "|".join(languages)
    return re.findall(rf"^```(?:{kinds})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def named_blocks(language: str) -> dict[str, str]:
    """Blocks that begin with a comment of their file's name, of all pages."""
    found = {}
    for text in TEXTS.values():
        for block in blocks(text, language):
            name = re.match(r"# ([\w-]+\.\w+)\n", block)
            if name:
                found[name[1]] = block
    return found


# ------------------------------------------------------------------------ navigation and links


def site_settings() -> dict[str, Any]:
    found = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=get_yaml_loader())
    assert isinstance(found, dict)
    return found


def leaves(nav: Any) -> Iterator[str]:
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from leaves(entry)


def test_navigation_has_every_page_and_notebook() -> None:
    listed = list(leaves(site_settings()["nav"]))
    assert len(listed) == len(set(listed))
    outside = {name for name in pages.outside() if name.endswith((".md", ".ipynb"))}
    assert set(listed) == {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} | outside


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as Python-Markdown and code hosts name them alike."""
    name = slugify(case="lower")
    headings = [line for line in pages.prose(text) if re.match(r"#{1,6} ", line)]
    return {name(re.sub(r"[`*$]", "", line.lstrip("# ")), "-") for line in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for link, anchor in [*pages.links(TEXTS[name]), *within(TEXTS[name])]:
        target = pages.target_of(name, link) if link else name
        assert (ROOT / target).exists(), f"{name}: {link}"
        if anchor and target.endswith(".md"):
            assert anchor[1:] in anchors((ROOT / target).read_text("utf-8")), f"{link}{anchor}"


def within(text: str) -> list[tuple[str, str]]:
    return [("", found) for found in re.findall(r"\]\((#[^)]+)\)", "\n".join(pages.prose(text)))]


def test_external_links_are_well_formed() -> None:
    """By their form only: tests reach no network."""
    found = 0
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\((\w+:[^)]*)\)", "\n".join(pages.prose(text))):
            parts = urlsplit(link)
            assert parts.scheme == "https", f"{name}: {link}"
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), f"{name}: {link}"
            if parts.netloc == "arxiv.org":
                assert re.fullmatch(r"/abs/\d{4}\.\d{4,5}", parts.path), f"{name}: {link}"
                found += 1
    assert found > 10


# -------------------------------------------------------------------------------- commands


class Command(NamedTuple):
    """Arguments of a `mpo-lightning` in a page, and the variables that its block has set before."""

    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]


def commands(text: str) -> Iterator[Command]:
    """Every `mpo-lightning` in a page's shell blocks."""
    for block in blocks(text, "sh", "bash", "console"):
        variables: list[tuple[str, str]] = []
        for raw in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$\{[^}]*\}", "", raw.removeprefix("$ "))
            words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
            if words[:1] == ["export"]:
                name, _, value = words[1].partition("=")
                variables.append((name, value))
            for start in {"mpo-lightning", "mpo_lightning"} & set(words):
                after = words[words.index(start) + 1 :]
                given = list(takewhile(lambda word: word not in {">", "|", "&&", ";"}, after))
                # By itself it lists its commands.
                if given:
                    yield Command(tuple(NAMES.get(word, word) for word in given), tuple(variables))


ALL_COMMANDS = sorted({found for text in TEXTS.values() for found in commands(text)})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the files that pages name: recipes, overlays, classes."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, block in (named_blocks("yaml") | named_blocks("python")).items():
        (folder / name).write_text(block, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


def parsed(command: list[str]) -> bool:
    """Whether a command's parser takes these arguments, the command's name first."""
    parser = collect_help.command_parser(command[0])
    given = command if command[0] in collect_help.RUN_COMMANDS else command[1:]
    try:
        parser.parse_args(given)
    except SystemExit as stopped:
        # --help and --print_config end with 0.
        return stopped.code == 0
    return True


def test_commands_parse(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(ALL_COMMANDS) > 40
    for command in ALL_COMMANDS:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in command.variables:
                patch.setenv(name, value)
            assert parsed(list(command.arguments)), shlex.join(command.arguments)


def test_a_wrong_command_does_not_parse(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not parsed(["fit", "--config", "recipe.yaml", "--model.los", "MPO"])
    assert "los" in capsys.readouterr().err


def test_configurations_parse(workplace: Path) -> None:
    """Every block of YAML that is a part of a configuration, over the README's recipe."""
    found = 0
    for name, text in TEXTS.items():
        for number, block in enumerate(blocks(text, "yaml")):
            if set(yaml.safe_load(block)) <= {"trainer", "model", "data", "checkpoint"}:
                file = workplace / f"{Path(name).stem}-{number}.yaml"
                file.write_text(block, encoding="utf-8")
                assert parsed(["fit", "--config", "recipe.yaml", "--config", str(file)]), block
                found += 1
    assert found > 5


# ------------------------------------------------------------------------------------ code


def test_python_compiles() -> None:
    found = [(name, block) for name, text in TEXTS.items() for block in blocks(text, "python")]
    assert len(found) > 10
    for name, block in found:
        compile(block, name, "exec")


@pytest.mark.parametrize("name", ["docs/how-to-loss.md", "docs/how-to-data.md"])
def test_python_runs(name: str, workplace: Path) -> None:
    found = blocks(TEXTS[name], "python")
    assert len(found) > 1
    for block in found:
        exec(compile(block, name, "exec"), {"__name__": "block"})


@pytest.mark.parametrize(
    "name", ["README.md", "docs/tutorial.md", "docs/how-to-data.md", "docs/data.md"]
)
def test_rows_are_good(name: str) -> None:
    from mpo_lightning.data.rows import check_row

    lines = [line for block in blocks(TEXTS[name], "json") for line in block.splitlines()]
    assert lines
    for line in lines:
        assert len(check_row(json.loads(line), name).responses) == 3


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    shell = [block for text in TEXTS.values() for block in blocks(text, "sh")]
    quoted = [words for text in TEXTS.values() for words in re.findall(r"`(make \w+)", text)]
    named = set(re.findall(r"^make (\w+)", "\n".join([*shell, *quoted]), re.MULTILINE))
    assert {"quickstart", "test"} <= named <= targets


# ---------------------------------------------------------------------------------- tables


def first_cells(text: str) -> set[str]:
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def test_every_field_of_trl_is_named() -> None:
    from trl import DPOConfig, DPOTrainer

    named = first_cells(TEXTS["docs/trl-options.md"] + TEXTS["docs/trl.md"])
    fields = {field.name for field in dataclasses.fields(DPOConfig)}
    arguments = set(inspect.signature(DPOTrainer.__init__).parameters) - {"self"}
    assert fields | arguments <= named
    losses = re.search(r"Possible values are:(.*?)\. If", DPOConfig.__doc__ or "", re.DOTALL)
    assert losses is not None
    assert set(re.findall(r"'(\w+)'", losses[1])) <= named


def test_every_public_name_is_documented() -> None:
    import mpo_lightning
    from mpo_lightning import losses, optim, strategy

    text = TEXTS["docs/api.md"]
    for module in (mpo_lightning, losses, optim, strategy):
        for name in module.__all__:
            assert re.search(rf"\b{name}\b", text), name


def test_generated_tables_have_every_setting_and_command() -> None:
    from mpo_lightning.commands.help_data import read_pages
    from mpo_lightning.commands.names import COMMANDS

    text = TEXTS["docs/settings.md"] + TEXTS["docs/commands.md"]
    made = ""
    for marker in pages.MARKER.findall(text):
        name, _, argument = marker.partition(" ")
        made += "\n" + settings.GENERATED[name](argument)
    keys = read_pages()["fit"].settings
    assert len(keys) > 80
    for key in keys:
        assert f"| `{key}` |" in made, key
    for command in COMMANDS:
        assert f"| `{command}` |" in made, command
    for name in ("MPO", "InfoNCA", "TopBottom", "WarmupCosine", "UltraFeedback"):
        assert f"### {name}\n" in made, name
    assert "pull towards the reference" in made


# --------------------------------------------------------------------------------- figures


def test_figures_show_what_the_losses_do() -> None:
    """Against the gradients of equation 4, as docs/mathematics.md lists them for this group."""
    shown = method.pushes(method.LOSSES["W-MPO, alpha = 0.7"])
    expected = [0.348, 0.086, 0.086, -0.039, -0.160, -0.321]
    assert shown == pytest.approx(expected, abs=5e-4)
    assert method.pushes(method.LOSSES["MPO"]) == pytest.approx([1 / 6] * 3 + [-1 / 6] * 3)
    mpo = method.shares(method.MPO(beta=1.0), steps=400)
    each = method.shares(method.EachMPO(beta=1.0), steps=400)
    assert max(mpo[-1]) > 0.9
    assert max(each[-1]) < 0.4


def test_every_figure_has_its_script_and_its_page() -> None:
    drawn = {f"{name}.svg" for name in method.FIGURES} | {"results.svg"}
    assert {path.name for path in (ROOT / "docs" / "figures").glob("*.svg")} == drawn
    for name in drawn:
        assert any(f"figures/{name}" in text for text in TEXTS.values()), name


def test_formulas_need_no_network() -> None:
    drawn = formulas.mathml(r"L = \frac{1}{n} \sum_i x_i \tag{15}", block=True)
    assert "<mfrac>" in drawn
    assert '<span class="number">(15)</span>' in drawn
    with pytest.raises(PluginError, match=r"\\nocommand cannot be drawn"):
        formulas.mathml(r"\nocommand x", block=False)
    assert "http" not in str(site_settings().get("extra_javascript", ""))


def results_pages() -> str:
    return "\n".join(TEXTS[f"docs/{page.name}"] for page in tables.PAGES)


def test_every_table_of_the_results_is_on_a_page() -> None:
    found = [
        f"{m['study']}/{m['name']}"
        for m in tables.MARKED.finditer(results_pages())
        if m["kind"] == "table"
    ]
    assert sorted(found) == sorted(tables.TABLES)
    assert tables.filled(results_pages()) == results_pages(), "run: make figures"


@pytest.mark.parametrize("study", tables.STUDIES + tables.REAL_STUDIES)
def test_results_of_a_study_are_kept_and_shown(study: str) -> None:
    folder = tables.RESULTS / study
    summary = tables.summary(study)
    assert (summary["study"], summary["form"]) == (study, "full")
    marked = tables.MARKED.finditer(results_pages())
    shown = {m["name"] for m in marked if (m["kind"], m["study"]) == ("figure", study)}
    assert shown == {path.stem for path in folder.glob("*.png")}


# ------------------------------------------------------------------------------- citation


def test_citation_names_software_and_paper() -> None:
    import mpo_lightning  # noqa: F401

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert citation["cff-version"] == "1.2.0"
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert {"message", "title", "authors", "type", "references"} <= citation.keys()
