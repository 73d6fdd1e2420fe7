"""Imports point one way, and the parts of TRL that carry no promise are touched in one file."""

import ast
from pathlib import Path

import pytest

import rlhf_kit

PACKAGE = Path(rlhf_kit.__file__).parent
TIERS = (
    ("config", "errors", "problems", "processes", "redact", "yaml12", "rollout", "world_size"),
    ("credit",),
    ("models", "judges", "data"),
    ("rewards", "objectives"),
    ("pairs", "evals"),
    ("trainers",),
    ("runs",),
    (
        "recipe",
        "recipe_bootstrap",
        "recipe_checks",
        "recipe_columns",
        "recipe_data",
        "recipe_errors",
        "recipe_files",
        "recipe_plan",
        "recipe_preference",
        "recipe_warnings",
        "recipe_yaml",
    ),
    ("cli", "__main__"),
)
TIER = {room: number for number, rooms in enumerate(TIERS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every name that a file imports, in full, wherever the import stands."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("rlhf_kit.")} - {"__version__"}
    if room != "__init__":
        assert {other for other in imported if TIER[other] > TIER[room]} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_trl_modules_touch_what_trl_does_not_promise(path: Path) -> None:
    if path.parent != PACKAGE / "trainers" or not path.name.startswith("trl_"):
        names = [name.split(".") for name in imports(path)]
        unpromised = [
            name for name in names if name[0] == "trl" and any(p[0] == "_" or p == "experimental" for p in name)
        ]
        assert unpromised == []
