"""The house rules that a formatter can't check."""

import ast
import re
from pathlib import Path

import pytest

from helpers import ROOT

SOURCE = ROOT / "src" / "tarflow_hf"
FOLDERS = ("src", "examples", "benchmarks", "tests", "docs", "model_cards", "metrics")
FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {file: ast.parse(text) for file, text in FILES.items()}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)

# Instead: "Returns the number of ...". A sentence begins with the thing or with what it does.
VAGUE = {"Of", "What", "Whether", "Where", "How"}

LONGEST_BODY = 60
EXCEPTIONS: dict[str, str] = {}  # file:function, and why it is longer


def nodes_of(folder, *kinds):
    """Yields (file, node) of every node of these kinds."""
    for file, tree in TREES.items():
        if file.startswith(f"{folder}/"):
            yield from ((file, node) for node in ast.walk(tree) if isinstance(node, kinds))


def body_of(function):
    """Returns the numbers of the first and the last line of a body, without its docstring."""
    statements = function.body[ast.get_docstring(function) is not None :] or function.body
    return statements[0].lineno, statements[-1].end_lineno


def is_kernel(function):
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)


@pytest.mark.parametrize("folder", FOLDERS)
def test_sentences_begin_with_the_thing_or_the_verb(folder):
    """Those of docstrings: also behind a full stop, and behind the name of an argument."""
    documented = nodes_of(folder, ast.Module, ast.ClassDef, *FUNCTIONS)
    docstrings = [(file, ast.get_docstring(node) or "-") for file, node in documented]
    begins = re.compile(rf"(?:^|[.!?:]\s+|\n\s*\n\s*)({'|'.join(VAGUE)})\s[^?]*?[.:]")
    assert [(file, text) for file, text in docstrings if begins.search(text)] == []


def test_no_body_is_longer_than_a_screen():
    """Kernels apart: a program of the GPU is one piece."""
    long = {}
    for file, function in (each for folder in FOLDERS for each in nodes_of(folder, *FUNCTIONS)):
        first, last = body_of(function)
        if last - first + 1 > LONGEST_BODY and not is_kernel(function):
            long[f"{file}:{function.name}"] = last - first + 1

    assert long.keys() == EXCEPTIONS.keys(), long
    assert len(EXCEPTIONS) <= 2


@pytest.mark.parametrize("folder", FOLDERS)
def test_lines_are_short_and_bodies_have_room(folder):
    lines = {file: FILES[file].splitlines() for file in FILES if file.startswith(f"{folder}/")}
    lengths = [len(line) for each in lines.values() for line in each]
    assert sum(length > 100 for length in lengths) <= 0.06 * len(lengths)

    bodies = {
        (file, number)
        for file, function in nodes_of(folder, *FUNCTIONS)
        for number in range(body_of(function)[0], body_of(function)[1] + 1)
    }
    num_blank = sum(not lines[file][number - 1].strip() for file, number in bodies)
    assert num_blank >= 0.05 * len(bodies)


def names_no_encoding(node):
    """True of a call that opens a file as text and leaves its encoding to the locale."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    is_method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func) != "os.open"
    if not (name == "open" and not isinstance(node.func, ast.Attribute)) and not (
        is_method and name in ("read_text", "write_text", "open")
    ):
        return False

    named = [*map(ast.unparse, node.args), *(each.arg for each in node.keywords)]
    is_binary = name == "open" and any("b" in mode for mode in named if len(mode) <= 5)
    return not is_binary and not {"encoding", "'utf-8'"} & set(named)


@pytest.mark.parametrize("folder", sorted({*FOLDERS} - {"tests"}))
def test_text_files_are_utf_8_whatever_the_locale(folder):
    calls = [each for each in nodes_of(folder, ast.Call) if names_no_encoding(each[1])]
    assert [(file, node.lineno) for file, node in calls] == []


def test_the_hall_is_no_heap():
    """The package has at most 10 modules beside its folders."""
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert len(modules) <= 10, sorted(modules)


def modules_of(node):
    """The dotted names that an import may bind, without the dots in front."""
    names = [each.name for each in node.names]
    return [node.module or "", *names] if isinstance(node, ast.ImportFrom) else names


def test_no_test_file_imports_from_another():
    tests = {Path(file).stem for file in FILES if Path(file).name.startswith("test_")}
    for file, node in nodes_of("tests", *IMPORTS):
        assert not tests & {part for name in modules_of(node) for part in name.split(".")}, file


def test_modeling_imports_only_its_neighbours():
    """These files travel with every checkpoint, flat: ours are imported by `from .name import`."""
    for file, node in nodes_of("src/tarflow_hf/modeling", *IMPORTS):
        assert not any(name.split(".")[0] == "tarflow_hf" for name in modules_of(node)), file
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, file
