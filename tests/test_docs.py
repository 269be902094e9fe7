"""What the documents tell a reader to type works: code blocks run, commands name files and flags that exist."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from octvideo import build, config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "datasets/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMAND = re.compile(r"(?:python|torchrun)\b[^\n`|]*?\b((?:tools|datasets)/\w+\.py)([^\n`|]*)")


def commands() -> list[tuple[str, str, str]]:
    found = []
    for document in DOCUMENTS:
        for match in COMMAND.finditer(document.read_text()):
            found.append((str(document.relative_to(ROOT)), match[1], match[2].split("#")[0].strip()))
    return found


def subcommand(rest: str) -> tuple[str, ...]:
    words = shlex.split(rest)
    return tuple(words[:1]) if words and words[0].isalpha() and words[0].islower() else ()


# One process that runs each as a script, so that torch is imported once.
HELPS = """
import contextlib, io, json, os, runpy, sys

for script, *command in json.load(sys.stdin):
    sys.argv, sys.path[0] = [script, *command, "--help"], os.path.abspath(os.path.dirname(script))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = runpy.run_path(script, run_name="__main__") and "no exit"
        except SystemExit as end:
            status = end.code or 0
    print(json.dumps([[script, *command], status, said.getvalue()]))
"""


@cache
def helps() -> dict[tuple[str, ...], str]:
    asked = sorted({(script, *subcommand(rest)) for _, script, rest in commands()})
    run = [sys.executable, "-c", HELPS]
    done = subprocess.run(run, input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        name, status, text = json.loads(line)
        assert status == 0, f"{name}: {text}"
        found[tuple(name)] = text
    return found


@pytest.mark.parametrize("document,script,rest", commands())
def test_commands_name_scripts_flags_and_configs_that_exist(document: str, script: str, rest: str) -> None:
    words, text = shlex.split(rest), helps()[(script, *subcommand(rest))]
    for word in words:
        if word.startswith("--"):
            assert word in text, f"{document}: {script} {rest}: no flag {word}"
        if word.startswith("configs/") and "FOLDER" not in word:
            assert (ROOT / word).exists(), f"{document}: no {word}"
    keys = config.key_names()
    for word in words:
        if re.fullmatch(r"[A-Z]+\.[A-Z_]+", word):
            assert word in keys, f"{document}: {script} {rest}: no key {word}"


def test_the_readme_s_python_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope: dict = {}
    exec(block, scope)
    assert scope["logits"].shape == (1, 400)


@pytest.mark.usefixtures("importable_torchvision")
def test_the_python_of_octavize_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision", reason="pip install --no-deps -r tests/peers.txt")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/octavize.md").read_text(), re.S)
    scope: dict = {}
    exec(block, scope)
    assert scope["logits"].shape == (2, 5)
    assert "layer3.1.conv1" in capsys.readouterr().out


@pytest.mark.usefixtures("importable_torchvision")
def test_the_example_of_another_package_s_network_is_a_config() -> None:
    pytest.importorskip("torchvision", reason="pip install --no-deps -r tests/peers.txt")
    path = ROOT / "configs/_examples/oct_mc3_18.yaml"
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/octavize.md").read_text(), re.S)
    assert block in path.read_text()
    cfg = build.load_config(path)
    octave, vanilla = build.cost(cfg, 112), build.cost(build.load_config(path, ["OCTAVE.ALPHA", "0.0"]), 112)
    assert octave.params == vanilla.params and octave.macs.total < 0.85 * vanilla.macs.total


def test_the_readme_s_yaml_is_a_config(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    content = yaml.safe_load(block)
    content["_BASE_"] = str(ROOT / content["_BASE_"])
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert build.load_config(path).MODEL.NUM_CLASSES == 5


def test_links_lead_to_files() -> None:
    for document in [*DOCUMENTS, ROOT / "configs/README.md"]:
        prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (document.parent / target).exists(), f"{document}: {target}"
