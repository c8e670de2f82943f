"""The house's walls: who may import whom, where each heavy package may appear, and how long things may get.

Read from the source with `ast`, so imports inside functions count too and nothing is executed.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_spice"

# Imports go down the floors only. Rooms on one floor are told apart by BESIDE: these, and no others, may look across.
FLOORS = {
    "config": 1,
    "game": 1,
    "corpus": 1,
    "cluster": 2,
    "telemetry": 2,
    "rollout": 3,
    "checkpoint": 3,
    "report": 3,
    "weights": 4,
    "curriculum": 3,
    "convert": 5,
    "evaluation": 5,
    "crossplay": 5,
    "policy": 5,
    "cost": 5,
    "tools": 5,
    "machine": 6,
    "doctor": 6,
    "plan": 6,
    "challenger": 6,
    "warmup": 6,
    "assemble": 6,
    "watch": 6,
    "launch": 6,
    "train": 7,
    "__init__": 6,
    "__main__": 8,
}
BESIDE = {
    ("game", "config"),
    ("corpus", "config"),
    ("corpus", "game"),  # the records that flow: passages, prompts
    ("evaluation", "convert"),  # a checkpoint is exported before it is served
    ("tools", "convert"),
    ("tools", "evaluation"),
    ("tools", "crossplay"),
    ("crossplay", "convert"),
    ("tools", "policy"),
    ("tools", "cost"),
    ("cost", "policy"),  # its counts of operations, rows and parameters, which are plain Python
    ("tools", "machine"),  # benchmarks say on what they ran
    ("tools", "assemble"),  # a benchmark runs the driver with engines of its own
    ("tools", "train"),
    ("assemble", "challenger"),
    ("warmup", "assemble"),
    ("doctor", "machine"),
    ("plan", "machine"),
}

# Package -> files (or folders) of the house in which it may be imported.
HOMES = {
    "sglang": ("megatron_spice/rollout",),
    "megatron": (
        "megatron_spice/policy",
        "megatron_spice/checkpoint",
        "megatron_spice/weights",
        "megatron_spice/cluster/platform.py",
        "tools/passages_benchmark.py",  # the rival
    ),
    "transformer_engine": ("megatron_spice/policy",),
    "nvidia": ("megatron_spice/corpus/dali_loader.py",),
    "math_verify": ("megatron_spice/game/verify_worker.py", "tools/grading_agreement.py"),  # the latter compares with it
}
HEAVY = {"torch", "megatron", "sglang", "transformers", "transformer_engine", "numpy", "triton", "nvidia", "torchvision"}

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 600

HOUSE = sorted(path for top in (PACKAGE, ROOT / "tools", ROOT / "examples") for path in top.rglob("*.py"))
EVERYTHING = HOUSE + sorted((ROOT / "tests").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, relative ones resolved, wherever in the file they stand."""
    found: set[str] = set()
    here = list(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level], *filter(None, [node.module])] if node.level else [node.module or ""]
            # `from megatron_spice import doctor` imports a module, `from x.y import function` one of `x.y`.
            found |= {".".join([*base, alias.name]) for alias in node.names} if base == ["megatron_spice"] else {".".join(base)}
    return found


def room_of(path: Path) -> str | None:
    """The room a file belongs to; None for a file outside the house, such as an example."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "tools":
        return "tools"
    return Path(parts[1]).stem if parts[0] == "megatron_spice" else None


def rooms_imported(path: Path) -> set[str]:
    return {parts[1] for module in imports(path) if (parts := module.split("."))[0] == "megatron_spice" and len(parts) > 1}


def test_the_walls_are_looked_for_in_real_files():
    assert len(HOUSE) > 30
    assert "megatron_spice.config.schema" in imports(PACKAGE / "config" / "loader.py")
    assert room_of(PACKAGE / "config" / "loader.py") == "config"


@pytest.mark.parametrize("path", HOUSE, ids=name)
def test_imports_go_down_the_floors(path: Path):
    room = room_of(path)
    if room is None:
        return
    assert room in FLOORS, f"{room} has no floor: add it to FLOORS"
    for other in rooms_imported(path) - {room, "__version__"}:
        assert FLOORS[other] < FLOORS[room] or (room, other) in BESIDE, f"{name(path)} ({room}) imports {other}"


@pytest.mark.parametrize("path", HOUSE, ids=name)
def test_heavy_packages_stay_in_their_rooms(path: Path):
    for module in imports(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or name(path).startswith(homes), f"{name(path)} imports {module}; it may in {homes}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "game").rglob("*.py")), ids=name)
def test_the_game_knows_no_accelerator(path: Path):
    assert not {module.split(".")[0] for module in imports(path)} & HEAVY
    assert rooms_imported(path) <= {"game", "config"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "config").glob("*.py")), ids=name)
def test_settings_are_read_without_the_heavy_stack(path: Path):
    assert not {module.split(".")[0] for module in imports(path)} & HEAVY
    assert rooms_imported(path) <= {"config"}


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_files_and_functions_stay_short(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} in {name(path)} has {lines} lines"


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_sources_are_ascii(path: Path):
    assert path.read_bytes().isascii()
