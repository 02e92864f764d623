"""The README's Python runs as it stands, on a small checkpoint in place of the one that it names."""

import re

import pytest

from helpers import ROOT
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.training import save_model

README = (ROOT / "README.md").read_text()


def test_every_python_block(tmp_path):
    flows = [
        {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1}
    ]
    config = TarFlowLMConfig(
        vocab_size=27,
        latent_size=2,
        max_position_embeddings=256,
        hidden_size=16,
        num_attention_heads=2,
        flows=flows,
    )
    save_model(TarFlowLMModel(config), character_tokenizer(), tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4 and "USER/NAME" in blocks[0]
    code = "\n".join(blocks).replace('"USER/NAME"', repr(str(tmp_path / "model")))
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["flow"].noise.shape == (2, 64, 8)  # the last block has run


PLACES = (
    "",
    "src/tarflow_hf",
    "src/tarflow_hf/modeling",
    "examples",
    "benchmarks",
    "tests",
    "docs",
)

PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text()
    code = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w./-]+\.(?:cff|md|py|toml|yaml))`", text))
    named |= set(
        re.findall(
            r"\b(?:examples|benchmarks|src|tests)/[\w./-]+\.(?:json|py|yaml)\b", "".join(code)
        )
    )
    assert not [
        name for name in named if not any((ROOT / place / name).exists() for place in PLACES)
    ]
    assert page != "README.md" or len(named) > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    text = (ROOT / page).read_text()
    headings = {
        heading.lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }

    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        assert ((ROOT / page).parent / path).exists(), link
        assert path or anchor in headings, link


def test_every_test_that_is_named_exists():
    """Docstrings and the README name the tests that show what they promise."""
    texts = [README, *(path.read_text() for path in (ROOT / "src").rglob("*.py"))]
    named = {name for text in texts for name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)}
    assert len(named) >= 10
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), (path, test)
