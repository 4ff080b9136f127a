"""Draws docs/pictures/*.svg by running the library: policies, codecs, pages, trees, ledgers, meshes.

    python docs/drawings            writes them
    python docs/drawings --check    fails if they are not what the library does

Nothing in a picture is written by hand but its words: a change of the library changes the picture.
"""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
TARGET = HERE.parent / "pictures"
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
os.environ["JAX_PLATFORMS"] = "cpu"


def main(arguments: list[str]) -> int:
    """Writes or checks."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    import jax

    jax.config.update("jax_num_cpu_devices", 4)  # for the schemes
    import bits
    import policies
    import schemes
    import storage

    made = {name: text for part in (policies, bits, storage, schemes) for name, text in part.pictures()}
    TARGET.mkdir(exist_ok=True)
    there = {path.stem: path for path in TARGET.glob("*.svg")}
    if not arguments:
        for name, text in made.items():
            (TARGET / f"{name}.svg").write_text(text)
        for name in there.keys() - made.keys():
            there[name].unlink()
        return 0
    wrong = [
        name
        for name in sorted(made.keys() | there.keys())
        if name not in there or there[name].read_text() != made.get(name)
    ]
    if wrong:
        print(f"docs/pictures: {', '.join(wrong)} not what the library does: run python docs/drawings")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
