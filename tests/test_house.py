"""The folder listing is the architecture: who may import whom, no circles, and folders that are
read at a glance."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import vramlab
from vramlab.forecast.question import TRACED_CODE

LIB = Path(vramlab.__file__).parent
ROOMS = (
    "",
    "baichuan",
    "allocator",
    "timeline",
    "regimes",
    "training",
    "capture",
    "forecast",
    "factcc",
    "runs",
    "studies",
    "report",
    "gpu_check",
)
"""From the ground up, the modules at the root first: a room imports from itself and from those
before it."""
FREE = {"vramlab", "vramlab.cli"}
"""They may import anything, and nothing imports them."""
ANY_TRACE = {"vramlab.files", "vramlab.reading"}
"""What a trace imports and does not depend on: they find and read what was asked, and that is in a
forecast's key."""
MOST_AT_THE_ROOT, MOST_IN_A_FOLDER = 10, 16


@cache
def modules() -> dict[str, Path]:
    """Name -> file, of every module of the library."""
    names = {
        path: ".".join(path.relative_to(LIB.parent).with_suffix("").parts)
        for path in LIB.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> every absolute name it imports, those inside functions too; a module of the library
    by its full name."""
    found = {}
    for name, path in modules().items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names |= {
                    full if (full := f"{base}.{alias.name}") in modules() else base
                    for alias in node.names
                }
        found[name] = names
    return found


def room(name: str) -> str:
    parts = name.split(".")
    return (
        parts[1]
        if len(parts) > 2 or len(parts) == 2 and modules()[name].name == "__init__.py"
        else ""
    )


def inside(name: str) -> set[str]:
    return imports()[name] & modules().keys()


def test_every_room_has_its_place_in_the_order():
    assert {room(name) for name in modules()} == set(ROOMS)


def test_imports_go_up_the_order_and_never_down():
    wrong = [
        f"{name} imports {other}"
        for name in modules().keys() - FREE
        for other in inside(name)
        if other in FREE or ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_module_needs_itself():
    """Not by way of others either, nor by an import inside a function."""
    left = {name: inside(name) - {name} for name in modules()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or on the way to one: {', '.join(sorted(left))}"


def test_the_library_knows_no_notebook_and_no_test():
    outside = {
        path.stem
        for folder in ("notebooks", "tests")
        for path in (LIB.parents[1] / folder).rglob("*.py")
    }
    assert not [
        (name, other)
        for name in modules()
        for other in imports()[name]
        if other.split(".")[0] in outside
    ]


def test_folders_stay_small():
    count: dict[Path, int] = {}
    for path in modules().values():
        count[path.parent] = count.get(path.parent, 0) + 1
    assert count.pop(LIB) <= MOST_AT_THE_ROOT
    count.pop(LIB / "regimes")
    assert not {
        str(folder.relative_to(LIB)): files
        for folder, files in count.items()
        if files > MOST_IN_A_FOLDER
    }


def keyed() -> set[Path]:
    """The files whose hash is in a forecast's key."""
    return {
        file
        for name in TRACED_CODE
        for file in ([LIB / name] if name.endswith(".py") else (LIB / name).rglob("*.py"))
    }


def test_a_forecast_is_keyed_by_all_the_code_that_a_trace_runs():
    waiting, needed = ["vramlab.forecast.trace"], set()
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += inside(name)
    packages = {
        name for name in needed if modules()[name].name == "__init__.py" and not inside(name)
    }  # a docstring
    assert not {name for name in needed - packages - ANY_TRACE if modules()[name] not in keyed()}
    assert all((LIB / name).exists() for name in TRACED_CODE)


TRACES = """
import sys
from vramlab.forecast.trace import trace
from vramlab.regimes.parameters import model_spec, row_of

spec = model_spec("tiny")
for name in sys.argv[1:]:
    trace(spec, row_of(name), 16, 1)
print(*sys.modules)
"""
TRACED = "mixed galore qlora chunkft"


@pytest.mark.slow
def test_a_forecast_is_keyed_by_every_module_that_a_trace_has_imported():
    """Not only by those that its code names: an edit of none of them may leave a stale trace."""
    done = subprocess.run(
        [sys.executable, "-c", TRACES, *TRACED.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = modules().keys() & done.stdout.split()
    docstrings_only = {name for name in imported if not imports()[name]}
    assert "vramlab.forecast.virtual_gpu.device" in imported
    unkeyed = {name for name in imported if modules()[name] not in keyed()}
    assert unkeyed - docstrings_only <= ANY_TRACE | {"vramlab", "vramlab.auto_classes"}


@pytest.mark.parametrize("name", vramlab.PUBLIC)
def test_a_public_name_is_there_and_documented(name):
    assert (getattr(vramlab, name).__doc__ or "").strip()
    assert name in dir(vramlab)
