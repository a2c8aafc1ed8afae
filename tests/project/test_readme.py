"""What the README shows works: every Python block runs, every command and option exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in FENCED if language == "python"]
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].split()
    for language, text in FENCED
    if language in ("", "bash", "sh", "shell", "console")
    for line in text.splitlines()
    if re.match(r"(\$ )?(make|initperf) ", line)
]


def test_the_readme_shows_the_three_drop_ins():
    assert len(PYTHON) >= 3


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.splitlines()[0][:40])
def test_a_python_block_of_the_readme_runs_by_itself(block, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_the_readme_shows_the_commands_that_set_everything_up():
    assert {tuple(command[:2]) for command in COMMANDS} >= {("make", "demo"), ("make", "test")}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_exists_with_its_options(command, capsys):
    program, name, *arguments = command
    if program == "make":
        assert re.search(rf"^{re.escape(name)}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    from typer.main import get_command

    from initperf.cli.main import app

    commands = get_command(app).commands
    options = {option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts}
    assert {a.split("=")[0] for a in arguments if a.startswith("--")} <= options | {"--help"}
