"""Runs a script as from the command line."""

import runpy
import sys

from accelerate.state import AcceleratorState

from helpers import ROOT


def script(name: str, *arguments: object, capsys, monkeypatch) -> str:
    """What a script of examples/ prints, run as if from the command line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out
