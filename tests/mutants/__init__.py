"""Planted faults: small wrong changes to the package, each of which some test must notice.

`faults.py` is the list, ``python -m mutants`` (`make mutants`) runs it: for each fault the package is copied, the text
is changed there, and the tests nearest to it are run. The working tree is never touched.
"""

import ast
import dataclasses
import functools
import pathlib
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class DoesNotApplyError(Exception):
    """The text of a fault is not where it is said to be, once."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong change.

    Attributes:
        file: of the package, without "kvattn/".
        function: dotted name of the function (of classes and functions around it too) or class; "": the module.
        old: text that occurs in it once.
        new: what takes its place.
        tests: node ids, the likeliest to fail first; a file or a function without parameters stands for all its tests.
        equivalent: why no test can fail; "": one must.
    """

    file: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.file} {self.function}: {self.old!r} -> {self.new!r}"


def group(file: str, tests: str, *changes: tuple[str, ...]) -> list[Fault]:
    """Faults of one file.

    Args:
        file: of the package.
        tests: node ids without "tests/", separated by white space; tried after those of a fault itself.
        *changes: (function, old, new, tests of this fault, why it is equivalent); the last two may be left out.
    """
    named = lambda text: tuple(f"tests/{line.strip()}" for line in text.splitlines() if line.strip())
    found = []
    for function, old, new, *more in changes:
        own, equivalent = [*more, "", ""][:2]
        found.append(Fault(file, function, old, new, tuple(dict.fromkeys(named(own) + named(tests))), equivalent))
    return found


def planted(source: str, fault: Fault) -> str:
    """The source with the fault in it.

    Raises:
        DoesNotApplyError: no such function; the text is not in it, or more than once; nothing is changed by it.
    """
    places = functions(source).get(fault.function, [])
    if len(places) != 1:
        raise DoesNotApplyError(f"{fault}: {len(places)} functions of that name in kvattn/{fault.file}, not one.")
    first, last = places[0]
    lines = source.splitlines(keepends=True)
    before, text, after = "".join(lines[:first]), "".join(lines[first:last]), "".join(lines[last:])
    if (count := text.count(fault.old)) != 1:
        raise DoesNotApplyError(f"{fault}: the text occurs {count} times in the function, not once.")
    changed = text.replace(fault.old, fault.new)
    try:
        same = _program(changed) == _program(text)
    except SyntaxError as error:
        raise DoesNotApplyError(f"{fault}: the result is no Python: {error}.") from error
    if same:
        raise DoesNotApplyError(f"{fault}: the program is the same with it.")
    return before + changed + after


@functools.cache
def functions(source: str) -> dict[str, list[tuple[int, int]]]:
    """First line and end, counted from 0, of every function and class by dotted name; "" is the module."""
    found = {"": [(0, len(source.splitlines()))]}

    def look(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = (*names, child.name)
                found.setdefault(".".join(inner), []).append((child.lineno - 1, child.end_lineno or 0))
            look(child, inner)

    look(ast.parse(source), ())
    return found


def _program(text: str) -> str:
    return ast.dump(ast.parse(textwrap.dedent(text)))
