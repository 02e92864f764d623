"""The multi-pass view and edits: which tokens are marked, and which are shown.

No text can break out of the page.
"""

import re
import sys
from runpy import run_path

import pytest
import torch

from helpers import ROOT
from helpers.models import STACKS, make
from helpers.pages import HOSTILE, Page, hostile_tokenizer
from tarflow_hf.data import character_tokenizer
from tarflow_hf.report import (
    Pass,
    few_changes,
    find_passes,
    passes_page,
    passes_section,
    passes_text,
)
from tarflow_hf.training import save_model

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27).float()


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.mark.parametrize("prompt", [None, torch.tensor([[3, 1, 4, 1]])], ids=["free", "prompt"])
def test_a_row_for_each_state_and_marks_where_tokens_differ(model, tokenizer, prompt):
    out = model.generate(prompt, num_return_sequences=3, max_new_tokens=12, output_states=True)
    given = None if prompt is None else prompt[0]
    num_given = 0 if prompt is None else 4

    for row in range(3):
        tokens = [model.decode(state[row]).argmax(-1) for state in reversed(out.states)]
        for ids in tokens:
            ids[:num_given] = out.sequences[row, :num_given]

        assert torch.equal(tokens[-1], out.sequences[row])
        passes = find_passes(model, out.states, row, given)
        page = Page(passes_page(passes, tokenizer))
        assert len(page.rows) == len(out.states) == len(passes)

        for n, (ids, cells) in enumerate(zip(tokens, page.rows, strict=True)):
            assert "".join(text for text, *_ in cells) == tokenizer.decode(ids)
            marked = [is_marked for text, is_marked, _ in cells for _ in text]
            assert marked == (ids != tokens[max(n - 1, 0)]).tolist()
            assert [is_given for text, _, is_given in cells for _ in text] == [
                i < num_given for i in range(len(ids))
            ]
            parts = (
                [f"{sum(marked)} of {len(ids)} tokens changed"] if n else []
            )  # of the noise there is nothing to say
            parts += [f"{num_given} given"] if num_given else []
            assert passes[n].summary() == ", ".join(parts)

        assert any(passes[-1].is_changed.tolist())


def test_the_page_is_whole_and_needs_nothing_else(model, tokenizer):
    out = model.generate(max_new_tokens=12, output_states=True)
    passes = find_passes(model, out.states)
    text = passes_page(passes, tokenizer, title="A <title> & more")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>\n") and page.tags[0] == ("html", {"lang": "en"})
    assert page.titles == ["A <title> & more"] and page.headings[0] == ("h1", "A <title> & more")
    assert [heading for tag, heading in page.headings if tag == "h2"] == [
        "Noise (before flow 3)", "Before flow 2", "Before flow 1", "Text",
    ]  # fmt: skip
    names = {tag for tag, _ in page.tags}
    assert {"main", "ol", "mark"} <= names and not names & {"script", "link", "img", "iframe"}
    assert not any(name in ("src", "href") for _, attributes in page.tags for name in attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and 'content: " [changed: "' in style
    assert passes_section(passes, tokenizer) in text
    assert [len(re.findall("tokens changed</p>", item)) for item in text.split("<li>")[1:]] == [
        0,
        1,
        1,
        1,
    ]


def test_hostile_text_stays_text():
    model, tokenizer = make(STACKS["mix-d"]), hostile_tokenizer()
    ids = torch.tensor([[[0, 1, 2, 3, 4]], [[1, 2, 3, 4, 0]]])
    states = list(model.codebook().mean[ids])
    with torch.no_grad():
        model.codebook.log_scale.fill_(-5.0)

    passes = find_passes(model, states)
    assert [state.token_ids.tolist() for state in passes] == ids.flip(0).squeeze(1).tolist()
    page = Page(passes_page(passes, tokenizer, title=HOSTILE[0]))
    expected = [re.sub("[\x1b\x00\u202e]", "\N{REPLACEMENT CHARACTER}", token) for token in HOSTILE]
    assert ["".join(text for text, *_ in row) for row in page.rows] == [
        "".join(expected[k] for k in row) for row in ids.flip(0).squeeze(1).tolist()
    ]
    assert not {"script", "img"} & {tag for tag, _ in page.tags} and page.titles == [HOSTILE[0]]
    assert "\x1b" not in passes_text(passes, tokenizer)
    assert set(re.findall("\x1b.{3}", passes_text(passes, tokenizer, color=True))) <= {
        "\x1b[7m",
        "\x1b[27",
    }


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ([0, 0, 90], "changed no token of this text: they move"),
        ([3, 2, 90], "changed only 3 of 100 tokens of this text: elsewhere they move"),
        ([3, 2, 3], None),  # the first flow changes no more
        ([6, 0, 90], None),  # many
        ([90], None),  # there is no other flow
    ],
)
def test_few_changes_are_explained(tokenizer, changed, sentence):
    """`changed`: the number of tokens that each pass changes, from the beginning on."""
    is_changed = [torch.arange(100) < number for number in [0, *changed]]
    ids, nowhere = torch.zeros(100, dtype=torch.long), torch.zeros(100, dtype=torch.bool)
    passes = [Pass("a pass", ids, mask, nowhere, is_first=not mask.any()) for mask in is_changed]
    notes = re.findall('<p class="note">(.*?)</p>', passes_page(passes, tokenizer))
    assert notes == ([few_changes(passes)] if sentence else [])
    assert all(sentence in note for note in notes)


def test_in_a_terminal(model, tokenizer):
    out = model.generate(max_new_tokens=12, output_states=True)
    passes = find_passes(model, out.states)
    brackets, colored = (
        passes_text(passes, tokenizer, color).split("\n\n") for color in (False, True)
    )
    assert len(brackets) == len(passes)
    assert brackets[0].split("\n")[0] == "Noise (before flow 3)"
    assert all("tokens changed" in block.split("\n")[0] for block in brackets[1:])

    for state, plain, color in zip(passes, brackets, colored, strict=True):
        assert color.replace("\x1b[7m", "[").replace("\x1b[27m", "]") == plain
        text = plain.split("\n", 1)[1]
        assert re.sub(r"[\[\]]", "", text) == tokenizer.decode(state.token_ids)

        # Inside of brackets, and only there, is what changed.
        depth, inside = 0, []

        for character in text:
            depth += {"[": 1, "]": -1}.get(character, 0)
            inside += [] if character in "[]" else [depth == 1]

        assert inside == state.is_changed.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(row=1), "row must be in 0, ..., 0, not 1"),
        (dict(given_ids=torch.arange(9)), "given_ids are 9 tokens"),
        (
            dict(given_ids=torch.arange(4), given_mask=torch.ones(3)),
            r"given_mask must have the shape \(4,\)",
        ),
        (dict(given_mask=torch.ones(3)), r"given_mask must have the shape \(0,\)"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        find_passes(model, [torch.zeros(1, 8, 2)] * 2, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A model with a separated codebook: encoding and decoding a text gives it back."""
    model = make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27, max_position_embeddings=32).float()
    with torch.no_grad():
        model.codebook.log_scale.fill_(-7.0)

    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(model, tokenizer, path)
    return str(path)


@pytest.fixture
def run(checkpoint, monkeypatch, capsys):
    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, checkpoint, *map(str, arguments)])
        run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.removesuffix("\n")

    return script


def test_show_passes(run, tmp_path, monkeypatch):
    text = "the fox is red"
    shown = run("show_passes.py", "--text", text, "--html", tmp_path / "out.html")
    assert "\x1b" not in shown and re.sub(r"[\[\]]", "", shown).endswith(f"\n{text}")
    page = Page((tmp_path / "out.html").read_text())
    assert len(page.rows) == 4 and "".join(cell[0] for cell in page.rows[-1]) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sampled = run("show_passes.py", "--prompt", "the fox", "--max_new_tokens", 9)
    assert "\x1b[7m" in sampled and sampled.count("\nthe fox") == 4


def test_edit(run):
    text, other = "the fox is red", "a quiet dog sleeps"
    assert run("edit.py", text) == text

    for num_flows in ([], ["--num_flows", 1]):
        edited = run("edit.py", text, "--redraw", "4:9", *num_flows)
        assert len(edited) == len(text) and edited != text

    # Flow 1 runs left to right: what stands before the edit of its state stays.
    assert edited[:4] == text[:4]
    steps = run("edit.py", text, "--towards", other, "--steps", 3).split("\n")
    assert len(steps) == 3 and steps[0] == text and steps[-1] == other[: len(text)]
    assert run("edit.py", text, "--towards", text, "--steps", 2).startswith(text)


def test_generate_is_steered(run):
    first = run(
        "generate.py", "--max_new_tokens", 16, "--top_k", 1, "--flow_temperatures", 1, 1, 0.5
    )
    assert len(first.strip("\n")) <= 16
    options = [
        "--num_candidates",
        3,
        "--top_p",
        0.5,
        "--mixture_temperature",
        0.8,
        "--num_samples",
        2,
    ]
    assert (
        run("generate.py", *options)
        == run("generate.py", *options)
        != run("generate.py", "--num_samples", 2)
    )
