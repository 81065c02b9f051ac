"""``lpattn new-plugin``: a folder with a complete distribution, from the template that ships in the wheel."""

from __future__ import annotations

import importlib.resources
from argparse import Namespace
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

from lpattn.cli.text import print_json
from lpattn.errors import InvalidArgumentError
from lpattn.registry import backend_name_problem, registry

_SUFFIX = ".in"
"""Of the template's files: no tool takes them for sources of lpattn."""


def run(arguments: Namespace) -> int:
    """Write the folder and say what to do with it. Returns 0.

    Raises:
        InvalidArgumentError: the name is not one for a backend or is taken, or the folder exists.
    """
    name = arguments.name
    if problem := backend_name_problem(name):
        raise InvalidArgumentError(problem)
    if name in registry.names():
        raise InvalidArgumentError(f"backend name {name!r} is already taken by {registry.source(name) or 'lpattn'}")
    if name.endswith("_") or "__" in name:
        raise InvalidArgumentError(
            f"{name!r}: of a plugin's name, a distribution's is made, in which no - follows another or is the last; "
            "choose one with single underscores between words"
        )
    folder = Path(arguments.into) / words(name)["DISTRIBUTION"]
    if folder.exists():
        raise InvalidArgumentError(f"{folder} exists already; choose another name, or --into another folder")
    written = write(name, folder)
    if arguments.json:
        print_json({"backend": name, "folder": str(folder), "files": written})
    else:
        print("\n".join([f"wrote {folder}:", *(f"  {file}" for file in written), "", *_next_steps(name, folder)]))
    return 0


def words(name: str) -> dict[str, str]:
    """What each word of the template stands for, for a backend of this name."""
    return {
        "DISTRIBUTION": f"lpattn-{name.replace('_', '-')}",
        "PACKAGE": f"lpattn_{name}",
        "BACKEND": name,
        "CLASS": "".join(part.capitalize() for part in name.split("_")) + "Backend",
    }


def render(text: str, name: str) -> str:
    """A file, or the name of one, with the words filled in."""
    for word, meaning in words(name).items():
        text = text.replace(word, meaning)
    return text


def write(name: str, folder: Path) -> list[str]:
    """Write the files for a backend of this name.

    Returns:
        Their paths below the folder.
    """
    written = []
    for path, file in sorted(_files(importlib.resources.files("lpattn.cli") / "template")):
        target = folder / render(path.removesuffix(_SUFFIX), name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(file.read_text(encoding="utf-8"), name), encoding="utf-8")
        written.append(target.relative_to(folder).as_posix())
    return written


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield prefix + entry.name, entry


def _next_steps(name: str, folder: Path) -> list[str]:
    return [
        f"pip install -e {folder}      # lpattn finds it by its entry point",
        f"lpattn check {name}      # what it declares is so; pytest {folder} runs the same",
        f"Then put your kernel into {folder}/src/{words(name)['PACKAGE']}/__init__.py.",
    ]
