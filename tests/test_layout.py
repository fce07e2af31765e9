"""Imports run in one direction, the names that outsiders rely on stay, and pages are up to date."""

import ast
import graphlib
import importlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

LIBRARY = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "author_dp").rglob("*.py"))
}
DOOR = {"data_utils", "dp_utils", "fine-tune-dp"}


# From the ground up: a module imports from its own level or those before it.
LEVELS = [{""}, {"accounting"}, {"data", "models"}, {"clipping"}, {"mechanism"}, {"guards"}, {"training"}, {"outputs"}]
# Files of a few lines that call a package's main.
PROGRAMS = {"ledger", "report", "generate", "synthetic_report", "publish", "merge", "tune", "plan"}


def level_of(module: str) -> int:
    """Return the level of `author_dp.package.module`, or of a ground module `author_dp.module`."""
    parts = module.split(".")
    package = parts[1] if len(parts) > 1 and (ROOT / "author_dp" / parts[1]).is_dir() else ""
    return next(level for level, packages in enumerate(LEVELS) if package in packages)


def imports_of(source: str) -> set[str]:
    """Return the modules of this project that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names} & LIBRARY.keys()
            found |= names or {str(node.module)}
    return {name for name in found if name in LIBRARY or name in DOOR}


def backward(module: str, source: str) -> set[str]:
    """Return the imports of a library module that lead to a higher level, or out of the library to the door."""
    found = imports_of(source)
    return {name for name in found if name in DOOR or level_of(name) > level_of(module)}


def test_three_files_stand_at_the_door():
    assert {path.stem for path in ROOT.glob("*.py")} == DOOR
    assert (ROOT / "README.md").stat().st_size < 10_000


def test_library_imports_in_one_direction():
    sources = {name: path.read_text() for name, path in LIBRARY.items() if name.removeprefix("author_dp.") not in PROGRAMS}
    assert not {name: found for name, source in sources.items() if (found := backward(name, source))}
    graphlib.TopologicalSorter({name: imports_of(source) for name, source in sources.items()}).prepare()  # raises CycleError


def test_door_imports_in_one_direction():
    used = {path.stem: imports_of(path.read_text()) & DOOR for path in ROOT.glob("*.py")}
    assert used == {"fine-tune-dp": {"data_utils", "dp_utils"}, "data_utils": set(), "dp_utils": set()}
    others = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("demo/*.py")]
    assert not [path for path in others if "fine-tune-dp" in imports_of(path.read_text())]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("author_dp.clipping.ghost", "from author_dp.mechanism import optimizer"),
        ("author_dp.accounting.ledger", "    import author_dp.outputs.report"),
        ("author_dp.errors", "from author_dp import models"),
        ("author_dp.data.readers", "from data_utils import DataArguments"),
    ],
)
def test_backward_import_is_noticed(module, line):
    source = f"def function():\n    {line.strip()}\n"
    assert backward(module, LIBRARY[module].read_text() + source)


@pytest.mark.integration
def test_the_folder_alone_is_a_library(tmp_path):
    shutil.copytree(ROOT / "author_dp", tmp_path / "author_dp", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-P", "-c", f"import sys; sys.path[0:0] = ['.']; import {', '.join(LIBRARY)}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "names",
    [
        "dp_utils: find_noise_multiplier compute_epsilon PrivacyArguments DPTrainer",
        "data_utils: group_by_author",
        "author_dp.clipping: ENGINES",
        "author_dp.mechanism: author_losses",
        "author_dp.guards: check_model",
        "author_dp.errors: UserError",
        "author_dp.ledger: main",
        "author_dp.report: write_report",
    ],
)
def test_names_that_outsiders_rely_on(names):
    module, rest = names.split(":")
    for name in rest.split():
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("program", ["ledger", "report", "publish", "merge", "generate", "synthetic_report", "tune", "plan"])
def test_programs_name_what_they_want(program, tmp_path, monkeypatch, capfd):
    for arguments in ([], [str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "author_dp" / f"{program}.py"), run_name="__main__")
        said = capfd.readouterr().err
        assert exited.value.code == 2 and said.startswith(f"author_dp.{program}: error: ") and said.count("\n") == 1, said


@pytest.mark.integration
def test_the_ledger_needs_none_of_the_libraries_of_training(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "author_dp.ledger", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "the --output_dir of a run" in done.stderr and " peft\n" not in done.stderr


def test_nothing_in_the_project_seeds_protected_randomness():
    for path in [ROOT / "dp_utils.py", *LIBRARY.values()]:
        # seed_checks seeds every generator to see that noise does not follow, and restores their states; generate comes after
        # training, where nothing is left to protect; trainer_arguments names --data_seed, which has no effect.
        if path.stem in ("seed_checks", "generate", "trainer_arguments"):
            continue
        assert not re.search(r"args\.seed|data_seed|default_rng\(|torch\.randn|np\.random\.seed", path.read_text()), path


def test_the_page_of_options_is_up_to_date():
    """Else: python docs/write_options.py"""
    page = runpy.run_path(str(ROOT / "docs" / "write_options.py"), run_name="options")["page"]
    assert (ROOT / "docs" / "options.md").read_text() == page()


def test_the_page_of_modules_is_up_to_date():
    """Else: python docs/write_modules.py"""
    make_page = runpy.run_path(str(ROOT / "docs" / "write_modules.py"), run_name="modules")["make_page"]
    assert (ROOT / "docs" / "modules.md").read_text() == make_page()


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
