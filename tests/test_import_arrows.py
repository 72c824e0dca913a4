"""The direction of imports, read off the syntax trees: what may import what, whatever happens at run time."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "torchvision",
    "pytorch_lightning",
    "lightning",
    "diffusers",
    "transformers",
    "torchmetrics",
}
FRAMEWORKS = {"pytorch_lightning", "lightning", "hydra", "omegaconf"}
ALLOWED = {  # of the project's own packages
    "files": set(),
    "scenes": {"files"},
    "models": {"files", "scenes"},
    "datamodules": {"files", "scenes"},
    "labelling": {"files", "scenes"},
    "metrics": {"files", "scenes", "labelling"},
    "callbacks": {"files", "scenes", "metrics", "models"},
    "loggers": {"files"},
    "lightning_modules": {"scenes", "metrics", "models", "datamodules", "labelling", "callbacks"},
    "runtime": {"files", "scenes", "conf", "models", "datamodules", "callbacks", "loggers", "lightning_modules"},
    "preparation": {"files", "scenes", "datamodules", "models", "labelling", "runtime"},
    "sampling": {"files", "scenes", "models", "datamodules", "lightning_modules", "runtime"},
    "evaluation": {"files", "scenes", "metrics", "loggers", "runtime", "sampling"},
    "web": {"scenes", "runtime", "sampling"},
}
FIRST = {
    "__init__",
    "command",
    "composition",
    "overrides",
    "run_directory",
    "build",
}  # imported before the settings are checked
PROJECT = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))} | set(ALLOWED)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add((node.module or "").partition(".")[0])
    return modules


def at_module_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: no bodies of functions, nothing for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_module_import(node)


def trees(package: str) -> Iterator[tuple[Path, ast.AST]]:
    for file in sorted((ROOT / package).rglob("*.py")):
        yield file.relative_to(ROOT), ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    forbidden = PROJECT - ALLOWED[package] - {package} | (FRAMEWORKS if package == "models" else set())
    wrong = {str(file): sorted(imported(ast.walk(tree)) & forbidden) for file, tree in trees(package)}
    assert not {file: modules for file, modules in wrong.items() if modules}


def test_what_checks_the_settings_imports_nothing_heavy() -> None:
    first = {str(file): tree for file, tree in trees("runtime") if file.stem in FIRST}
    wrong = {file: sorted(imported(at_module_import(tree)) & HEAVY) for file, tree in first.items()}
    assert {Path(file).stem for file in wrong} == FIRST
    assert not {file: modules for file, modules in wrong.items() if modules}


def test_the_test_would_see_an_arrow_that_points_the_wrong_way() -> None:
    tree = ast.parse("import numpy\nclass A:\n    import torch.nn\ndef f():\n    from models.text import Prompt\n")
    assert imported(ast.walk(tree)) == {"numpy", "torch", "models"}
    assert imported(at_module_import(tree)) == {"numpy", "torch"}
