"""The commands of the documents, run one after the other as they stand but for their sizes.

Those of a block that begins with `# composed only, it needs …` are composed by `tests/test_readme.py`, as all are.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.documents import blocks, lines_of, words_of
from tests.forked import REPO, Forked

COMPOSED_ONLY = "# composed only, it needs "
AFTER_THE_README = ("CONTRIBUTING.md", "docs/app.md", "docs/data.md", "docs/evaluation.md", "docs/shapes.md")
ELSEWHERE = ("adding_a_method.md", "adding_a_source.md")  # run whole by tests/test_readme.py
TINY = {
    "train.py": (
        "batch_size=4",
        "trainer.max_steps=2",
        "trainer.validate_every=2",
        "optimizer.warmup_steps=1",
        "data.make.source.count=16",
        "data.make_validation.source.count=4",
        "callback.layout_score.scenes=1",
        "callback.pictures.scenes=1",
        "sampler.steps=1",
    ),
    "evaluate.py": ("protocol.scenes=2", "protocol.make.source.count=4", "sampler.steps=1"),
    "sample.py": ("sampler.steps=1",),
    "prepare.py": ("source.count=4",),
    "convert.py": (),
}


def commands(document: str) -> list[list[str]]:
    """Words of those to run: of the scripts that end by themselves."""
    found = blocks((REPO / document).read_text(encoding="utf-8"), "bash")
    lines = [line for block in found if not block.startswith(COMPOSED_ONLY) for line in lines_of(block)]
    return [words for words in map(words_of, lines) if words[0] == "python" and words[1] in TINY]


def tiny(script: str, arguments: list[str]) -> list[str]:
    settings = TINY[script]
    others = [a for a in arguments if a.startswith(("experiment=", "source=", "task=")) and "=shapes" not in a]
    if others or (script == "sample.py" and arguments[0].startswith("again=")):
        settings = ()
    if any("shapes_base" in argument for argument in arguments):  # no adapter, so nothing to score or draw by a scene
        settings = tuple(setting for setting in settings if not setting.startswith("callback."))
    return [*arguments, *settings]


def run(folder: Path, document: str, forms: set[str]) -> None:
    """Runs a document's commands, unless they differ from one in `forms`, to which they are added, only in a name or a number."""
    for _, script, *arguments in commands(document):
        given = tiny(script, arguments)
        form = re.sub(r"\d+", "0", re.sub(r"runs/[\w${}]+", "RUN", " ".join((script, *arguments))))
        if form in forms:
            continue
        forms.add(form)
        process = Forked(script, *given, environment={**os.environ, "OMP_NUM_THREADS": "1"}, folder=folder)
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, f"{document}: {script} {' '.join(given)}\n{out}\n{error}"


@pytest.fixture(scope="module")
def after_the_readme(tmp_path_factory):
    """Where the commands of the README have run, and their forms."""
    place, forms = tmp_path_factory.mktemp("user"), set()
    (place / "examples").symlink_to(REPO / "examples")
    run(place, "README.md", forms)
    shutil.copy(place / "grid.png", place / "picture.png")  # what the page would have been asked to save
    return place, forms


@pytest.mark.parametrize("document", AFTER_THE_README)
def test_a_documents_commands_run_once_the_readmes_have(document, after_the_readme):
    folder, forms = after_the_readme
    assert (folder / "runs" / "demo" / "four_shapes.png").is_file()
    run(folder, document, forms)


def test_no_document_has_commands_that_are_neither_run_nor_said_to_be_composed_only():
    documents = [path.relative_to(REPO) for path in (*REPO.glob("*.md"), *REPO.glob("docs/*.md"))]
    are_run = {str(path) for path in documents if path.name not in ELSEWHERE and commands(str(path))}
    left = are_run - {"README.md", *AFTER_THE_README}
    plans = {document for document in left if all("plan=true" in words for words in commands(document))}
    assert left == plans
