"""What the documentation shows is run: code blocks of the pages, cells of notebooks, and the examples in docstrings.

All ```python blocks of a page share one namespace and run in order, so a page reads like a session.
"""

import doctest
import importlib
import json
import os
import pathlib
import re
import types

import jax
import matplotlib.pyplot as plt
import pytest

from kvattn.codecs.registry import CODECS
from kvattn.policies.registry import POLICIES

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if path.exists()]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
FENCE = re.compile(r"^(?P<indent> *)```python *$\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(text):
    """The (line number, code) of each ```python block; a block inside a list is moved to the left."""
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield line, re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)


def cells(text):
    """Each code cell of a notebook, as if it stood at the top of a file of its own."""
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "code":
            yield 0, "".join(cell["source"])


def run_page(path):
    page = types.ModuleType(path.stem)
    for line, code in (cells if path.suffix == ".ipynb" else blocks)(path.read_text()):
        exec(compile("\n" * line + code, str(path), "exec"), page.__dict__)  # a traceback names the line of the page


def run_docstrings(module):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test)
    return runner.summarize(verbose=False)


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """Examples are run as a reader would: without the strict promotion of the other tests.

    What they register is forgotten.
    """
    for table in (POLICIES, CODECS):
        monkeypatch.setattr(table, "_entries", list(table.registered()))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def with_code(pages):
    return [path for path in pages if any(blocks(path.read_text()))]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def pages():
    """README, and the others, which `make docs-test` runs."""
    for path in with_code(PAGES):
        slow = () if path.parent == ROOT else pytest.mark.slow
        yield pytest.param(path, id=str(path.relative_to(ROOT)), marks=slow)


@pytest.mark.parametrize("path", list(pages()))
def test_page(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What pages call a checkpoint is a tiny one.
    (tmp_path / "Llama-3.2-1B").symlink_to(ROOT / "tests" / "golden" / "hf" / "llama3")
    run_page(path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_of_a_notebook(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the one on many devices sets it
    run_page(path)
    plt.close("all")


MODULES = [path for path in sorted(ROOT.glob("kvattn/**/*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_docstrings(path, capsys):
    failed, attempted = run_docstrings(importlib.import_module(module_name(path)))
    assert attempted > 0
    assert failed == 0, capsys.readouterr().out


def test_the_pages_with_code_are_found():
    names = {path.name for path in with_code(PAGES)}
    assert {"index.md", "notation.md", "layouts.md", "choose_a_cache.md"} <= names


def test_notebooks_are_found_and_hold_no_outputs():
    """They are made when the pages are built. What is committed is the text."""
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None


def test_a_wrong_cell_fails(tmp_path):
    page = tmp_path / "page.ipynb"
    cell = lambda kind, source: {"cell_type": kind, "source": [source]}
    page.write_text(
        json.dumps({"cells": [cell("code", "x = 1"), cell("markdown", "x = 2"), cell("code", "assert x == 2")]})
    )
    with pytest.raises(AssertionError):
        run_page(page)


def dead_links(page):
    """Links of a page outside docs/, which Sphinx does not see, to files or headings that are not there."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        if ":" in name:
            continue
        file = page.parent / name
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor and file.is_file() else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if not file.exists() or (anchor and anchor not in slugs):
            dead.append(target)
    return dead


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_outside_the_site_resolve(name):
    assert dead_links(ROOT / name) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading: here\n[a](page.md) [b](no.md) [c](page.md#a-heading-here) [d](page.md#other)\n")
    assert dead_links(page) == ["no.md", "page.md#other"]


def test_a_wrong_page_fails_at_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\nx = 1\n```\n\n```bash\nfalse\n```\n\n- item\n\n  ```python\n  assert x == 2\n  ```\n"
    )
    with pytest.raises(AssertionError) as failure:
        run_page(page)
    assert failure.traceback[-1].lineno + 1 == 14


def test_a_wrong_docstring_fails():
    module = types.ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert run_docstrings(module) == (1, 1)


def test_tables_name_every_policy_and_codec():
    """Those of pages the classes, that of the command line their names."""
    text = {page: (ROOT / page).read_text() for page in ("README.md", "docs/choose_a_cache.md", "docs/policies.md")}
    options = (ROOT / "docs" / "cli.md").read_text()
    for entry in POLICIES.registered():
        assert [page for page in text if f"`{entry.kind.__name__}" not in text[page]] == []
        assert f"`{entry.name}" in options
    plain, *others = CODECS.registered()
    for entry in others:
        assert [page for page in list(text)[:2] if f"`{entry.kind.__name__}" not in text[page]] == []
    assert all(f"`{name}" in options for name in (*plain.names, *(entry.name for entry in others)))


def test_every_public_name_is_documented():
    import kvattn
    from kvattn.codecs.base import Codec
    from kvattn.policies.base import Policy

    text = "".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    documented = set(re.findall(r"kvattn\.(\w+)", text))
    for base in (Policy, Codec):
        if f"<!-- every public {base.__name__} -->" in text:  # docs/conf.py lists them
            documented |= {n for n, x in vars(kvattn).items() if isinstance(x, type) and issubclass(x, base)}
    public = {name for name in dir(kvattn) if not name.startswith("_") and name not in ("importlib", "TYPE_CHECKING")}
    # Modules are documented by the names in them.
    public -= {name for name in public if isinstance(vars(kvattn).get(name), types.ModuleType) and name != "errors"}
    assert not public - documented, "add them to a page of docs/api"
