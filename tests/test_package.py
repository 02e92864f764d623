"""The wheel: it holds all of the code and nothing else, and works outside the tree.

Versions agree.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import tarflow_hf
from helpers import ROOT


def run(*arguments, **options):
    process = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **options
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the tree, which keeps the traces of the build."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)

    shutil.copytree(
        ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    run("-m", "build", "--wheel", "--no-isolation", tree)
    (wheel,) = (tree / "dist").iterdir()

    return wheel


def test_the_wheel_holds_all_of_the_code_and_nothing_else(wheel):
    source = ROOT / "src"
    code = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    pages = {str(path.relative_to(source)) for path in source.glob("*/report/templates/**/*.*")}
    assert {"tarflow_hf/__init__.py", "tarflow_hf/modeling/modeling_tarflowlm.py"} <= code
    assert {Path(name).suffix for name in pages} == {".j2", ".css"}
    archive = zipfile.ZipFile(wheel)
    information = f"tarflow_hf-{tarflow_hf.__version__}.dist-info"
    others = {
        f"{information}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    }
    assert set(archive.namelist()) == code | pages | others | {"tarflow_hf/model_card.md"}
    metadata = message_from_bytes(archive.read(f"{information}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("tarflow_hf", tarflow_hf.__version__)
    assert {"app", "evaluation", "peft", "test", "triton"} <= set(
        metadata.get_all("Provides-Extra")
    )
    assert any(
        line.startswith("transformers<6,>=5.17") for line in metadata.get_all("Requires-Dist")
    )


# With torch and transformers only: a Space of the demo page has no more.
USE = """
import importlib.metadata
import sys
for name in ("accelerate", "datasets", "matplotlib", "peft", "triton"):
    sys.modules[name] = None
import torch
import tarflow_hf
from tarflow_hf.report import demo
from transformers import AutoConfig, AutoModelForCausalLM

flow = {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1}
config = AutoConfig.for_model("tarflowlm", vocab_size=27, latent_size=2, hidden_size=16, num_attention_heads=2, flows=[flow])
model = AutoModelForCausalLM.from_config(config).eval()
model.save_pretrained("model")
noise = torch.randn(1, 6, 2)
assert "a &lt; b" in demo.message(ValueError("a < b")) and demo.STYLE_SHEET.is_file()
assert torch.equal(AutoModelForCausalLM.from_pretrained("model").generate(noise=noise), model.generate(noise=noise))
print(tarflow_hf.__file__, importlib.metadata.version("tarflow_hf"))
"""  # noqa: E501


def test_the_wheel_works_outside_the_tree(wheel, tmp_path):
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    file, version = run(
        "-c", USE, cwd=tmp_path, env={"PYTHONPATH": str(site), "HOME": str(tmp_path)}
    ).split()
    assert Path(file) == site / "tarflow_hf" / "__init__.py"
    assert version == tarflow_hf.__version__


def test_the_citation_has_this_version():
    citation = ROOT / "CITATION.cff"
    if not citation.exists():
        pytest.skip("there is no CITATION.cff")
    (version,) = re.findall(r"^version:\s*[\"']?([^\"'\s]+)", citation.read_text(), re.MULTILINE)
    assert version == tarflow_hf.__version__


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_training_installs_what_it_needs_only(tmp_path):
    """`make train` on a new machine leaves out the extras of the tests; what is there serves, too."""

    def commands():
        # `make test` hands its own make's variables down; "Entering directory" is one of their effects.
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "--dry-run", "train", f"VENV={tmp_path}"]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert '--editable ".[numba]"' in commands() and ".[test]" not in commands()
    time = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt")) + 9
    for name in (".installed-core", ".installed"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
        assert commands().startswith(f"{tmp_path}/bin/python examples/train.py")
