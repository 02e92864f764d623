"""Publishing on a Hub: what arrives, and what is refused before anything is written.

A lost connection leaves nothing half published.
"""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from helpers.checkpoints import CODE, MIX_1, MIX_D, SAVED, make
from helpers.local_hub import Repository
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.hub import CleanRoom, PublishError, nats_per_token, publish

pytestmark = pytest.mark.usefixtures("one_clean_room")

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FLOWS = [MIX_D, MIX_1]


@pytest.fixture
def model():
    return make(flows=FLOWS)


@pytest.fixture
def tokenizer():
    return character_tokenizer()


def state_of(hub):
    """Returns a Hub's whole content."""
    return {
        repo_id: (dict(each.commits), dict(each.branches), dict(each.tags))
        for repo_id, each in hub.repositories.items()
    }


# ------------------------------------------------------------------------------------- what arrives


def test_one_commit_brings_everything(hub, model, tokenizer, clean_room):
    model.flow.layers[1].train()
    commit = publish(model, tokenizer, "tester/public")
    repository = hub.repositories["tester/public"]
    assert list(repository.commits)[1:] == [commit.oid] and not repository.private
    assert model.flow.layers[1].training and not model.flow.layers[0].training
    files = hub.files("tester/public")
    assert set(files) == SAVED | TOKENIZER | {"README.md"}
    assert all(files[name] == path.read_bytes() for name, path in CODE.items())
    assert ModelCard(files["README.md"].decode()).data.library_name == "transformers"
    nats = clean_room.nats_per_token("tester/public", "a text")
    assert nats == pytest.approx(nats_per_token(model.eval(), tokenizer, "a text"), rel=1e-5)


def test_a_name_alone_is_ones_own(hub, model, tokenizer):
    publish(model, tokenizer, "named", card="---\nlicense: mit\n---\n# Mine")
    assert hub.files("tester/named")["README.md"].endswith(b"# Mine")


def test_what_was_there_is_replaced_and_nothing_of_it_is_loaded(hub, model, tokenizer):
    publish(model, tokenizer, "tester/again", max_shard_size="20kB")
    repository = hub.repositories["tester/again"]
    shards = {name for name in hub.files("tester/again") if name.endswith(".safetensors")}
    assert len(shards) > 1 and "model.safetensors.index.json" in hub.files("tester/again")
    repository.commit(
        "main", {**hub.files("tester/again"), "notes.txt": b"mine", "coupling_old.py": b"1 / 0"}
    )
    other = make(seed=1, flows=FLOWS)
    publish(other, tokenizer, "tester/again", branch="main")
    assert set(hub.files("tester/again")) == SAVED | TOKENIZER | {"README.md", "notes.txt"}
    assert len(repository.commits) == 4


def test_patches_and_half_precision(hub, tokenizer):
    model = make(flows=FLOWS, patch_size=4).bfloat16()
    publish(model, tokenizer, "tester/half")
    assert json.loads(hub.files("tester/half")["config.json"])["dtype"] == "bfloat16"


def test_a_private_repository_is_its_owners(hub, model, tokenizer, clean_room):
    publish(model, tokenizer, "lab/private", private=True, token="hf_local")
    assert hub.repositories["lab/private"].private

    with pytest.raises(
        RuntimeError, match=r"(?s)lab/private is not a local folder.*hf auth login.*token="
    ):
        clean_room.nats_per_token("lab/private", "a text", token="hf_other")

    with pytest.raises(RuntimeError, match=r"401 Unauthorized"):
        clean_room.nats_per_token("lab/private", "a text", token="hf_unknown")

    assert clean_room.nats_per_token("lab/private", "a text", token="hf_local") > 0


def test_branches_and_tags(hub, model, tokenizer, clean_room):
    other = make(seed=1, flows=FLOWS)
    publish(model, tokenizer, "tester/versions", branch="small", tag="v1")
    assert hub.files("tester/versions") == {}
    commit = publish(other, tokenizer, "tester/versions", branch="small", tag="v2")
    assert hub.repositories["tester/versions"].tags["v2"] == commit.oid

    for revision, expected in {"v1": model, "v2": other, "small": other}.items():
        nats = clean_room.nats_per_token("tester/versions", "a text", revision=revision)
        assert nats == pytest.approx(nats_per_token(expected.eval(), tokenizer, "a text"), rel=1e-5)

    before = state_of(hub)
    with pytest.raises(ValueError, match="tag 'v1' already"):
        publish(model, tokenizer, "tester/versions", tag="v1")

    assert state_of(hub) == before


# --------------------------------------------------------------- refused before anything is written


def with_token(name):
    return lambda model, tokenizer, patch: {"token": name}


def without_a_token(model, tokenizer, patch):
    patch.delenv("HF_TOKEN")
    return {}


def broken(model, tokenizer, patch):
    model.codebook.mean.data.fill_(torch.nan)
    return {}


def saved_as_something_else(model, tokenizer, patch):
    save = TarFlowLMModel.save_pretrained
    patch.setattr(
        TarFlowLMModel,
        "save_pretrained",
        lambda self, *args, **kwargs: save(make(seed=1, flows=FLOWS), *args),
    )

    return {}


def saved_without_code(model, tokenizer, patch):
    save = TarFlowLMModel.save_pretrained

    def save_without_code(self, folder, **kwargs):
        save(self, folder)
        Path(folder, "normal.py").unlink()

    patch.setattr(TarFlowLMModel, "save_pretrained", save_without_code)
    return {}


def card(metadata):
    return lambda model, tokenizer, patch: {"card": f"---\n{metadata}\n---\n# A model"}


REFUSED = {
    "no token": ("tester/new", without_a_token, ValueError, "hf auth login"),
    "a token that is none": (
        "tester/new",
        with_token("hf_unknown"),
        ValueError,
        "does not accept the token",
    ),
    "a token that may only read": (
        "tester/new",
        with_token("hf_read"),
        ValueError,
        "may only read",
    ),
    "a name of someone else": (
        "someone/new",
        with_token(None),
        ValueError,
        "choose tester or lab before /new",
    ),
    "a name that is none": ("tester/new model", with_token(None), ValueError, "new model"),
    "public, to be private": (
        "tester/taken",
        lambda *_: {"private": True},
        ValueError,
        "exists and is public",
    ),
    "a licence that is none": ("tester/new", card("license: my-own"), ValueError, "license"),
    "results without values": (
        "tester/new",
        card(
            "model-index:\n- name: x\n  results:\n  - task: {type: text-generation}\n    dataset: {name: a, type: a}\n"
            "    metrics: [{type: perplexity, value: low}]"
        ),
        ValueError,
        "metrics",
    ),
    "metadata that is no YAML": (
        "tester/new",
        card("license: [mit"),
        ValueError,
        "card's metadata",
    ),
    "metadata that is a list": ("tester/new", card("- mit"), ValueError, "card's metadata"),
    "not a number": ("tester/new", broken, ValueError, "nan nats per token"),
    "saved as something else": (
        "tester/new",
        saved_as_something_else,
        PublishError,
        "nothing was published",
    ),
    "saved without its code": (
        "tester/new",
        saved_without_code,
        PublishError,
        "(?s)nothing was published.*normal",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_fit_is_refused_and_nothing_is_written(
    hub, model, tokenizer, monkeypatch, case
):
    repo_id, prepare, kind, message = REFUSED[case]
    hub.repositories.setdefault("tester/taken", Repository())
    options = prepare(model, tokenizer, monkeypatch)
    before = state_of(hub)
    with pytest.raises(kind, match=message):
        publish(model, tokenizer, repo_id, **options)

    assert state_of(hub) == before


def test_what_is_no_model_of_ours_or_has_another_tokenizer(hub, model, tokenizer):
    before = state_of(hub)
    with pytest.raises(ValueError, match="unwrap what is compiled"):
        publish(torch.nn.DataParallel(model), tokenizer, "tester/new")

    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="28 tokens, more than the model's vocab_size, 27"):
        publish(model, tokenizer, "tester/new")

    model.train()
    with pytest.raises(ValueError, match="choose another probe_text"):
        publish(model, character_tokenizer(), "tester/new", probe_text="")

    assert model.training  # as it was
    assert state_of(hub) == before


# ------------------------------------------------------ connections, and what goes wrong on the way


@pytest.mark.parametrize("place", ["/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_a_lost_connection_leaves_nothing_half_published(hub, model, tokenizer, monkeypatch, place):
    repo_id = f"tester/lost-{place.strip('/').replace('/', '-')}"
    monkeypatch.setattr(hub, "breaks_at", place)
    with pytest.raises(PublishError, match=r"(?s)not confirmed.*publish again"):
        publish(model, tokenizer, repo_id)

    assert repo_id not in hub.repositories or list(hub.repositories[repo_id].commits.values()) == [
        {}
    ]
    monkeypatch.setattr(hub, "breaks_at", None)
    publish(model, tokenizer, repo_id)
    assert len(hub.repositories[repo_id].commits) == 2


def test_a_commit_of_someone_else_meanwhile_is_not_overwritten(hub, model, tokenizer, monkeypatch):
    def list_files(api, repo_id, **options):
        hub.repositories[repo_id].commit("main", {"theirs.txt": b""})
        return []

    monkeypatch.setattr(HfApi, "list_repo_files", list_files)
    with pytest.raises(PublishError, match=r"(?s)not confirmed.*412"):
        publish(model, tokenizer, "tester/shared")

    assert set(hub.files("tester/shared")) == {"theirs.txt"}


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda files: {**files, "model.safetensors": files["model.safetensors"][:-100]},
            "does not load here",
        ),
        (
            lambda files: {name: files[name] for name in files if name != "codebook.py"},
            "(?s)does not load here.*codebook",
        ),
        (
            lambda files: {
                **files,
                "model.safetensors": files["model.safetensors"][:-400] + b"\0" * 400,
            },
            "another model",
        ),
    ],
    ids=["cut short", "without code", "other weights"],
)
def test_what_arrives_damaged_is_no_success(hub, model, tokenizer, monkeypatch, damage, message):
    commit = Repository.commit
    monkeypatch.setattr(
        Repository,
        "commit",
        lambda self, branch, files: commit(self, branch, damage(files) if files else files),
    )
    repo_id = f"tester/damaged-{len(hub.repositories)}"
    with pytest.raises(PublishError, match=message):
        publish(model, tokenizer, repo_id, tag="v1")

    assert hub.repositories[repo_id].tags == {}


def test_a_clean_room_that_dies_says_so():
    with CleanRoom() as clean_room:
        clean_room.process.kill()
        clean_room.process.wait()
        with pytest.raises(RuntimeError, match="has ended"):
            clean_room.nats_per_token("tester/any", "a text")
