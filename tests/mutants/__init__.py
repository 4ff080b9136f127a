"""Planted faults: small wrong changes to the package, each of which some test must notice.

`faults.py` is the list, ``python -m mutants`` (`make mutants`) runs it: for each fault the package is copied, the text
is changed there, and the tests nearest to it are run. The working tree is never touched.
"""

import ast
import dataclasses
import pathlib

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
    first, last = _lines(source, fault)
    lines = source.splitlines(keepends=True)
    before, text, after = "".join(lines[:first]), "".join(lines[first:last]), "".join(lines[last:])
    if (count := text.count(fault.old)) != 1:
        raise DoesNotApplyError(f"{fault}: the text occurs {count} times in the function, not once.")
    changed = before + text.replace(fault.old, fault.new) + after
    try:
        same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError as error:
        raise DoesNotApplyError(f"{fault}: the result is no Python: {error}.") from error
    if same:
        raise DoesNotApplyError(f"{fault}: the program is the same with it.")
    return changed


def _lines(source: str, fault: Fault) -> tuple[int, int]:
    """First line and end of the function, counted from 0."""
    if not fault.function:
        return 0, len(source.splitlines())
    found = []

    def look(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = (*names, child.name)
                if ".".join(inner) == fault.function:
                    found.append(child)
            look(child, inner)

    look(ast.parse(source), ())
    if len(found) != 1:
        raise DoesNotApplyError(f"{fault}: {len(found)} functions of that name in kvattn/{fault.file}, not one.")
    return found[0].lineno - 1, found[0].end_lineno
