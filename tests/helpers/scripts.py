"""Runs a script as from the command line."""

import runpy
import sys

from accelerate.state import AcceleratorState

from helpers import ROOT


def script(name: str, *arguments: object, capsys, monkeypatch) -> str:
    """Runs a script of examples/ as from the command line, and returns its output."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out
