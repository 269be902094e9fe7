"""The rooms of the house: who may import whom. Any other edge fails here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "octvideo"
DOORS = {
    "errors": set(),
    "files": {"errors"},
    "streams": set(),
    "claims": set(),
    "pickles": set(),
    "torch_file": {"claims", "pickles"},
    "command": {"errors", "files", "streams"},
    "starting": {"command"},
    "octave": {"octave"},
    "models": {"models", "octave"},
    "weights": {"weights", "torch_file", "pickles", "claims", "errors", "files"},
    "data": {"data", "errors", "files"},
    "yaml_file": {"errors", "files"},
    "config_values": {"errors", "files"},
    "config": {"config_values", "yaml_file", "errors", "files"},
    "unused": {"config", "yaml_file", "errors"},
    "engine": {"engine", "torch_file", "claims", "errors", "files", "streams"},
    "analysis": {"analysis", "octave", "errors"},
    "launch": {"launch", "engine", "errors", "files"},
    "preflight": {"build", "config", "data", "engine", "launch", "errors", "files"},
    "deploy": {"octave", "errors"},
    "benchmark": {
        *("octave", "models", "weights", "data", "config", "engine", "analysis", "deploy", "build"),
        *("benchmark", "errors", "files", "command"),
    },
    "build": {"octave", "models", "weights", "data", "config", "unused", "engine", "analysis", "errors", "files"},
    "jobs": {"jobs", "build", "octave", "models", "data", "config", "engine", "errors", "files"},
    "__init__": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_open_doors(path: Path) -> None:
    room = room_of(path)
    ours = [name for name in imports(path) if name.startswith("octvideo.")]
    rooms = {name.split(".")[1] for name in ours} - {"__version__"}
    assert rooms <= DOORS[room], f"{path}: {room} opens {rooms - DOORS[room]}"
    if room == "launch":
        engine = {name for name in ours if name.startswith("octvideo.engine")}
        assert all(name.startswith("octvideo.engine.distributed") for name in engine)


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "octave"], ids=lambda p: p.name)
def test_the_operator_imports_torch_only(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - {"octvideo", "torch"} - set(sys.stdlib_module_names)
    assert outside == ({"triton"} if path.name == "kernels_triton.py" else set())  # which is loaded where it is used


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if room_of(p) not in ("build", "jobs", "config", "unused", "benchmark", "preflight")],
    ids=lambda p: p.name,
)
def test_no_lower_room_receives_a_config(path: Path) -> None:
    names = {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
    assert not names & {"cfg", "config"}, path


def test_no_room_without_a_name_of_its_own() -> None:
    assert not [
        p for p in FILES if {"utils", "core", "common", "helpers"} & {part.removesuffix(".py") for part in p.parts}
    ]


def test_importing_the_package_is_light() -> None:
    code = "import sys, octvideo; print([m for m in ('torch', 'av', 'decord', 'numpy', 'fvcore') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"


def test_importing_the_operator_does_not_need_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import octvideo.octave; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert "'octvideo.octave.kernels'" in out.stdout and "kernels_triton" not in out.stdout


def test_importing_build_does_not_import_decord() -> None:
    code = "import sys, octvideo.build; print('decord' in sys.modules, 'torchvision' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "False False"
