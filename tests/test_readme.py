"""What the documents say, held against the project: commands compose, files exist, and the worked examples are run."""

import importlib.util
import re
import runpy
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from preparation.prepare import TASKS
from runtime.command import _open_as_run
from runtime.composition import CONF, compose, compose_sweep
from runtime.run_directory import RunDirectory, load_run_config
from tests.documents import blocks, lines_of, words_of

REPO = Path(__file__).parents[1]
DOCUMENTS = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")])
WORKED = ("adding_a_method", "adding_a_source")
SCRIPTS = {f"{name}.py": name for name in ("train", "evaluate", "prepare", "sample", "convert", "app")}
MADE = ("runs/", "data/")  # what commands leave behind
SMALL = (  # a backbone without the shipped weights, which a folder elsewhere does not have
    "backbone.weights=null",
    "backbone.unet_config.norm_num_groups=8",
    "backbone.unet_config.block_out_channels=[16,24]",
    "backbone.unet_config.attention_head_dim=[2,3]",
    "backbone.text_config.hidden_size=32",
    "backbone.text_config.intermediate_size=64",
)


@dataclass(frozen=True, kw_only=True)
class Command:
    document: Path
    line: str

    @property
    def words(self) -> list[str]:
        return words_of(self.line)


def commands(document: Path) -> list[Command]:
    found = blocks(document.read_text(encoding="utf-8"), "bash")
    return [Command(document=document, line=line) for block in found for line in lines_of(block)]


def files(document: Path) -> dict[str, str]:
    """The files that a document gives: a line with the path alone, then the content."""
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return dict(found)


def written(document: Path, folder: Path) -> Path:
    for name, content in files(document).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (folder / "conf").mkdir(exist_ok=True)
    return folder


COMMANDS = {f"{c.document.name}: {c.line}": c for document in DOCUMENTS for c in commands(document)}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    """A run directory as `train.py` makes it, of which evaluate and sample read the configuration."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(compose("train"), resolve=True))
    return folder


def test_there_are_commands_to_test():
    assert len(COMMANDS) > 30
    assert {c.document.name for c in COMMANDS.values()} >= {"README.md", "CONTRIBUTING.md", "shapes.md"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_in_a_document_is_one_that_exists(name, a_run):
    command = COMMANDS[name]
    match command.words:
        case ["make", target, *variables]:
            assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.MULTILINE)
            assert all("=" in variable for variable in variables)
        case ["source", ".venv/bin/activate"]:
            pass
        case ["python", script, *arguments] if script in SCRIPTS:
            if command.document.stem not in WORKED:  # those are run below
                composes(SCRIPTS[script], arguments, a_run)
        case ["python", "-m", "pytest", *arguments]:
            paths = [a for place, a in enumerate(arguments) if not a.startswith("-") and arguments[place - 1] != "-k"]
            assert all((REPO / path).exists() or path in files(command.document) for path in paths)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["python", script]:
            assert script in files(command.document)
        case _:
            pytest.fail(f"{name}: not a form of command that this test knows")


def composes(config: str, arguments: list[str], a_run: Path) -> None:
    if arguments[:1] == ["-m"]:
        compose_sweep(config, [_open_as_run(argument, config) for argument in arguments[1:]])
        return
    cfg = compose(config, [_open_as_run(argument, config) for argument in arguments])
    if config in ("evaluate", "sample"):
        load_run_config(a_run, cfg)
    if config in ("sample", "app") and cfg.scene is not None:
        assert (REPO / cfg.scene).is_file()


def test_the_readme_shows_what_the_makefile_runs():
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (REPO / "Makefile").read_text(), re.MULTILINE)[1]
    demo = re.findall(r"\$\(BIN\)/(python .*)", recipe)
    shown = [c.line for c in commands(REPO / "README.md")]
    assert demo == [line for line in shown if line in demo]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    absent = [link for link in links if link and not (document.parent / link).exists()]
    tops = {path.name for path in REPO.iterdir()}
    for path in re.findall(r"`([\w.]+/[\w./]*\w)`", text):
        is_ours = path.partition("/")[0] in tops and not path.startswith(MADE)
        is_a_pattern = "NAME" in path
        if is_ours and not is_a_pattern and path not in files(document) and not (REPO / path).exists():
            absent.append(path)
    assert not absent


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_into_a_document_name_one_of_its_headings(document):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]*#[^)]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            headings = re.findall(
                r"^#+ (.+)$", (document.parent / path if path else document).read_text(), re.MULTILINE
            )
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            wrong += [] if anchor in slugs else [link]
    assert not wrong


def table(heading: str) -> set[str]:
    """The names in the first column of the README's table under a heading."""
    rows = (REPO / "README.md").read_text().partition(f"| {heading} |")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE))


@pytest.mark.parametrize("group", ["conditioning", "backbone"])
def test_the_tables_name_exactly_what_can_be_chosen(group):
    there = {path.stem for path in (CONF / group).glob("*.yaml")}
    assert table(group) == {name for name in there if not name.startswith("tiny_")}


def test_the_messages_of_the_troubleshooting_page_are_the_projects():
    packages = [path for path in REPO.iterdir() if (path / "__init__.py").is_file() or path.name in ("conf", "scenes")]
    source = "\n".join(file.read_text(encoding="utf-8") for package in packages for file in package.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message that goes on in the next line
    source = re.sub(r"\{[^{}\n]*\}", "…", source)
    headings = re.findall(r"^### `(.+)`$", (REPO / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 40
    pieces = {heading: [piece.strip() for piece in heading.split("…")] for heading in headings}
    wrong = [heading for heading, parts in pieces.items() if any(part not in source for part in parts)]
    assert not wrong


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((REPO / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (REPO / "CHANGELOG.md").read_text()


@pytest.fixture(params=WORKED)
def example(request, tmp_path, monkeypatch):
    """The document and a folder with its files, whose packages are part of the project's."""
    import datamodules.sources
    import lightning_modules
    import models.conditioning

    document = REPO / "docs" / f"{request.param}.md"
    folder = written(document, tmp_path)
    before = set(sys.modules)
    for package in (models.conditioning, lightning_modules, datamodules.sources):
        path = folder / package.__name__.replace(".", "/")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(path)])
    monkeypatch.chdir(folder)
    yield document, folder
    for module in set(sys.modules) - before:
        if getattr(sys.modules[module], "__file__", None) and sys.modules[module].__file__.startswith(str(folder)):
            del sys.modules[module]


def test_a_worked_example_runs_as_it_stands(example, backbone_named):
    from evaluation.evaluate import evaluate
    from runtime.training import train

    document, folder = example
    for command in commands(document):
        script, arguments = command.words[1], command.words[2:]
        config = SCRIPTS.get(script)
        if config is None:
            if script in files(document):
                runpy.run_path(script)
            continue
        opened = [_open_as_run(argument, config) for argument in arguments]
        cfg = compose(config, [*opened, *(SMALL if config == "train" else ())], config_dir=str(folder / "conf"))
        if config == "train":
            directory = RunDirectory(cfg.run)
            module = train(cfg, directory, directory.inspect(cfg))
            assert cfg.plan or directory.finished_step() == cfg.trainer.max_steps
            assert not {p for p in module.backbone.parameters() if p.requires_grad}
        elif config == "evaluate":
            assert set(evaluate(cfg, load_run_config(cfg.run, cfg))["values"]) >= {"with_scene", "without_scene"}
        else:
            TASKS[cfg.task](cfg)
    for name in files(document):
        if name.startswith("tests/"):
            own = runpy.run_path(name)
            adapter = own["BoxAverageAdapter"](backbone_named("shapes"))
            tests = [value for key, value in own.items() if key.startswith("test_")]
            assert tests
            for test in tests:
                test(adapter)
