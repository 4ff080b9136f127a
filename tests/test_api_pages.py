"""Whatever is public is on a page of docs/api."""

import importlib
import pathlib
import re
import types

import pytest

import kvattn
from kvattn.codecs.base import Codec
from kvattn.policies.base import Policy

PAGES = pathlib.Path(__file__).resolve().parent.parent / "docs" / "api"
NAMESPACES = (
    *("kvattn", "kvattn.attend", "kvattn.cache", "kvattn.codecs", "kvattn.errors", "kvattn.families", "kvattn.layers"),
    *(
        "kvattn.layers.linen",
        "kvattn.measure",
        "kvattn.memory",
        "kvattn.models",
        "kvattn.pallas",
        "kvattn.pallas.compat",
    ),
    *("kvattn.pallas.tuning", "kvattn.policies", "kvattn.positions", "kvattn.serving", "kvattn.sharding"),
)
DIRECTIVE = re.compile(r"^\.\. auto(\w+):: ([\w.]+)\(?\)?\n((?:   .*\n)*)", re.MULTILINE)


def found(dotted):
    """The object of a dotted name."""
    *path, last = dotted.split(".")
    for length in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:length]))
        except ImportError:
            continue
        for name in [*path[length:], last]:
            owner = getattr(owner, name)
        return owner
    raise ImportError(dotted)


def public(module):
    """Names that a namespace offers: its `__all__`, or what it defines itself."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        n for n, x in vars(module).items() if not n.startswith("_") and getattr(x, "__module__", "") == module.__name__
    ]


def documented(text):
    """Dotted names of the pages, and the objects that they are."""
    names, things = set(re.findall(r"`(kvattn(?:\.\w+)+)`", text)), []
    for kind, name, options in DIRECTIVE.findall(text):
        members = re.search(r":members:([^\n]*)", options)
        if kind != "module":
            names.add(name)
        elif members is not None:
            module = importlib.import_module(name)
            names |= {f"{name}.{n.strip()}" for n in members[1].split(",") if n.strip()} or {
                f"{name}.{n}" for n in public(module)
            }
    for base in (Policy, Codec):
        if f"<!-- every public {base.__name__} -->" in text:  # docs/conf.py lists them
            names |= {f"kvattn.{n}" for n, x in vars(kvattn).items() if isinstance(x, type) and issubclass(x, base)}
    for name in names:
        things.append(found(name))
    return names, {id(x) for x in things if callable(x)}


def missing(text):
    names, things = documented(text)
    left = []
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        for name in public(module):
            thing = getattr(module, name)
            if (
                not isinstance(thing, types.ModuleType)
                and f"{namespace}.{name}" not in names
                and id(thing) not in things
            ):
                left.append(f"{namespace}.{name}")
    return sorted(left)


@pytest.fixture(scope="module")
def text():
    return "\n".join(path.read_text() for path in sorted(PAGES.glob("*.md"))) + "\n"


def test_every_public_name_is_on_a_page(text):
    assert missing(text) == [], "add them to a page of docs/api"


def test_a_name_that_is_left_out_is_found(text):
    assert missing(text.replace(".. autofunction:: kvattn.layers.stateless\n", "")) == ["kvattn.layers.stateless"]
    assert "kvattn.serving.knee" in missing(re.sub(r"\.\. autofunction:: kvattn\.serving\.\w+\n", "", text))


def test_every_name_on_a_page_exists(text):
    for _, name, _ in DIRECTIVE.findall(text):
        found(name)
