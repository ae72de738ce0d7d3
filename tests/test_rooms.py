"""The order of the rooms, as CONTRIBUTING.md draws it: imports go down, and what a room offers is listed."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipcap_jax

PACKAGE = Path(clipcap_jax.__file__).parent
EVERYWHERE = {"files", "progress", "signals", "errors"}  # the ground floor
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
ROOMS = sorted({name.partition(".")[0] for name in MODULES} - {"__init__"})


def imports(name: str) -> Iterator[str]:
    """The modules of the house that a module imports, wherever in it; a room, where it takes a name from its list."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("clipcap_jax") for alias in node.names), "import from, for this test"
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "no relative imports"
            place = f"{node.module}.".removeprefix("clipcap_jax.")
            if place != f"{node.module}.":
                for alias in node.names:
                    yield next(found for found in (place + alias.name, place[:-1]) if found in MODULES)


def stands_on() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name in MODULES.keys() - {"__init__"}:
        room = name.partition(".")[0]
        found[room] |= {other.partition(".")[0] for other in imports(name)} - {room}
    return found


def drawing() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md: every room from the top floor down, and what it stands on."""
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```\nroom +stands on\n(.*?)```", page, flags=re.DOTALL)
    return {room: set(others.split()) for room, others in re.findall(r"^(\w+) *(.*)$", block, flags=re.MULTILINE)}


def test_the_drawing_is_true() -> None:
    assert drawing() == {room: others - EVERYWHERE for room, others in stands_on().items()}


def test_imports_go_down() -> None:
    floors = {room: floor for floor, room in enumerate(drawing())}
    upward = [
        (room, other) for room, others in stands_on().items() for other in others if floors[other] <= floors[room]
    ]
    assert not upward


def test_no_circle_within_a_room() -> None:
    inside = {name: {other for other in imports(name) if other != name} for name in MODULES if "." in name}
    list(graphlib.TopologicalSorter(inside).static_order())


@pytest.mark.parametrize("room", [room for room in ROOMS if MODULES[room].name == "__init__.py"])
def test_what_others_use_is_listed(room: str) -> None:
    module = importlib.import_module(f"clipcap_jax.{room}")
    assert module.__doc__
    assert module.__doc__.count("\n") == 0
    used = defaultdict(set)
    for name in MODULES:
        if name.partition(".")[0] != room:
            for other in imports(name):
                if other.startswith(f"{room}."):
                    used[other.removeprefix(f"{room}.")].add(name)
    assert not {
        module: names
        for module, names in used.items()
        if module not in importlib.import_module(f"clipcap_jax.{room}").__all__
    }
    missing = [name for name in module.__all__ if not hasattr(module, name) and f"{room}.{name}" not in MODULES]
    assert not missing


@pytest.mark.parametrize(
    ("room", "absent"),
    [
        ("__init__", ("jax", "PIL")),
        ("datasets", ("jax", "clipcap_jax.metrics")),
        ("metrics", ("jax", "tensorflow_datasets")),
        ("commands", ("jax",)),
    ],
)
def test_a_room_loads_only_what_it_stands_on(room: str, absent: tuple[str, ...]) -> None:
    modules = ["clipcap_jax"] + [f"clipcap_jax.{name}" for name in MODULES if name.partition(".")[0] == room]
    code = f"import sys, {', '.join(modules)}; print([name for name in {absent!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
