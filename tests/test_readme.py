"""The README's Python runs as it stands, on a small checkpoint in place of the one that it names."""

import re
from pathlib import Path

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.training import save_model

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_python_block(tmp_path):
    flows = [{"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1}]
    config = TarFlowLMConfig(
        vocab_size=27, latent_size=2, max_position_embeddings=256, hidden_size=16, num_attention_heads=2, flows=flows
    )
    save_model(TarFlowLMModel(config), character_tokenizer(), tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4 and "USER/NAME" in blocks[0]
    code = "\n".join(blocks).replace('"USER/NAME"', repr(str(tmp_path / "model")))
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["flow"].noise.shape == (2, 64, 8)  # the last block has run


def test_every_command_names_files_that_exist():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"examples/[\w/]+\.(?:py|json)", README)) | set(re.findall(r"src/[\w/]+\.py", README))
    assert len(named) >= 4 and all((root / name).is_file() for name in named)


def test_every_test_that_is_named_exists():
    """What a docstring or the README promises names the test that shows it."""
    root = Path(__file__).parents[1]
    texts = [README, *(path.read_text() for path in (root / "src").rglob("*.py"))]
    named = {name for text in texts for name in re.findall(r"(tests/\w+\.py)::(\w+)", text)}
    assert len(named) >= 10
    for path, test in named:
        assert re.search(rf"^def {test}\(", (root / path).read_text(), re.MULTILINE), (path, test)
