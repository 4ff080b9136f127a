"""The pictures of the documentation are what the library does: `docs/drawings` runs it, and they are committed."""

import importlib
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from kvattn.serving import BlockPool, RadixTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
DRAWINGS, PICTURES = ROOT / "docs" / "drawings", ROOT / "docs" / "pictures"
WITHOUT_JAX = ("pages_in_time", "window_pages", "radix_tree", "shared_prefix", "ledger", "tiers")


@pytest.fixture
def storage(monkeypatch):
    monkeypatch.syspath_prepend(DRAWINGS)
    return importlib.import_module("storage")


def committed(name):
    return (PICTURES / f"{name}.svg").read_text()


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_a_picture_of_the_host_side_is_current(storage, name):
    assert getattr(storage, name)() == committed(name)


@pytest.mark.slow
def test_all_pictures_are_current():
    done = subprocess.run([sys.executable, DRAWINGS, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fault_of_the_library_changes_the_picture(storage, monkeypatch):
    with monkeypatch.context() as fault:
        append = BlockPool.append
        fault.setattr(BlockPool, "append", lambda pool, *args: append(pool, *args)[:0])  # copies are forgotten
        assert storage.pages_in_time() != committed("pages_in_time")
    monkeypatch.setattr(RadixTree, "lock", lambda tree, match: None)  # what is read is evicted
    assert storage.radix_tree() != committed("radix_tree")


def test_every_picture_is_shown_and_says_what_drew_it():
    pages = "".join(path.read_text() for path in ROOT.glob("docs/**/*.md"))
    shown = set(re.findall(r"pictures/(\w+)\.svg", pages))
    assert shown == {path.stem for path in PICTURES.glob("*.svg")}
    for name in shown:
        tree = ElementTree.fromstring(committed(name))
        words = " ".join(tree.itertext())
        drew, *ran = re.findall(r"(?:docs|kvattn)/[\w/]+\.py", words)
        assert drew.startswith("docs/drawings/") and ran and all((ROOT / path).is_file() for path in (drew, *ran))
        assert "prefers-color-scheme: dark" in words and int(tree.get("width")) < 520
