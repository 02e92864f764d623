"""Publishes a model with its code, tokenizer and card in one commit.

    publish(model, tokenizer, "USER/NAME", card=model_card(model.config, repo_id="USER/NAME"))

Everything that can be wrong on this side is found before anything is written. `model.push_to_hub`
and `Trainer(push_to_hub=True)` work as in the library, without these checks.
"""

import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase

from .cards import model_card
from .data import check_vocabulary
from .modeling.inversion_tarflowlm import evaluating
from .modeling.modeling_tarflowlm import TarFlowLMModel

__all__ = [
    "PublishError",
    "check_access",
    "model_card",
    "publish",
]

PROBE = "the quick brown fox jumps over the lazy dog"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"

# What a commit replaces as a whole: weights, code and tokenizer of another shape would be loaded
# beside the new ones.
REPLACED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".py")
REPLACED_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}


class PublishError(RuntimeError):
    """A model does not load as it should, or has not arrived. The message says what the Hub has."""


def publish(
    model: TarFlowLMModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    *,
    card: ModelCard | str | None = None,
    private: bool | None = None,
    branch: str = "main",
    tag: str | None = None,
    token: str | None = None,
    max_shard_size: int | str = "5GB",
    commit_message: str = "Upload TarFlowLM",
    probe_text: str = PROBE,
) -> CommitInfo:
    """Publishes a model for `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`.

    1. Checks the name, the token, the card's metadata and the tokenizer.
    2. Saves everything to a temporary folder and loads that in a fresh process, which can't import
       this package. There the bound on the likelihood of `probe_text`, with the same noise, must be
       that of the model at hand.
    3. Writes one commit: weights (safetensors), configurations, tokenizer, code, card. It also
       deletes weights, code and tokenizer files of the commit before that have no successor; other
       files stay.
    4. Loads that commit in the same way, and compares again. Then it is tagged.

    Args:
        model: In any mode, on any device. In memory it is left as it is.
        repo_id: "USER/NAME" or "ORGANIZATION/NAME"; "NAME" belongs to the token's owner. A
            repository that does not exist is made.
        card: Text of README.md. By default [`model_card`] makes it from the configuration.
        private: Visibility of a new repository; by default the owner's settings decide. An existing
            one is refused if it is public and this is True.
        branch: Branch of the commit. If it does not exist, it is made from "main".
        tag: A name for the commit once it has been verified, such as "v1.0".
        token: Token of a user who may write; by default the one that `hf auth login` or `HF_TOKEN`
            has set.
        max_shard_size: Larger weights go to several files.

    Returns:
        The commit: `oid`, `commit_url`.

    Raises:
        ValueError: If the name, the token, the card, the tokenizer or the model is not fit to be
            published. Nothing was written.
        PublishError: If the saved model does not load as it should: nothing was written. Or if the
            connection failed, or the Hub's copy loads as something else: the message says what to
            do.
    """
    # 1. Everything that can be checked at hand.
    _check_model(model, tokenizer)
    api = HfApi(token=token)
    repo_id = check_access(repo_id, private=private, tag=tag, token=token)
    card = model_card(model.config, repo_id=repo_id) if card is None else card
    _check_card(card)
    expected = _nats_at_hand(model, tokenizer, probe_text)

    with tempfile.TemporaryDirectory() as folder, CleanRoom() as clean_room:
        # 2. The files, and what they load as.
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "README.md").write_text(str(card), encoding="utf-8")

        # The processes may differ in device, and in how they round in half precision.
        tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
        saved = _check_saved(clean_room, folder, probe_text, expected, tolerance)

        # 3. The commit.
        commit = _commit(api, Path(folder), repo_id, private, branch, commit_message)

        # 4. The commit as any machine loads it.
        token = get_token() if token is None else token
        _check_published(clean_room, repo_id, commit.oid, token, probe_text, saved)

    if tag is not None:
        _tag(api, repo_id, commit.oid, tag)

    return commit


def _check_model(model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(model, TarFlowLMModel):
        raise ValueError(
            f"publish takes a TarFlowLMModel, not {type(model).__name__}: unwrap what is compiled "
            "or distributed; a model of the library's own is published by its push_to_hub."
        )

    advice = "Give the tokenizer that the model was trained with."
    check_vocabulary(tokenizer, model.config.vocab_size, advice)


def _nats_at_hand(model: TarFlowLMModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """`nats_per_token` in evaluation mode; each module is left in its own mode."""
    with evaluating(model):
        nats = nats_per_token(model, tokenizer, text)

    if not math.isfinite(nats):
        raise ValueError(
            f"The model gives {text!r} {nats} nats per token: it is broken, and not published."
        )

    return nats


def _check_saved(
    clean_room: "CleanRoom", folder: str, text: str, expected: float, tolerance: float
) -> float:
    """Returns the nats per token of the saved model, which must be the `expected` ones."""
    try:
        saved = clean_room.nats_per_token(folder, text)
    except RuntimeError as error:
        raise PublishError(
            f"What was saved does not load, and nothing was published: {error}"
        ) from None

    if not math.isclose(saved, expected, rel_tol=tolerance, abs_tol=tolerance):
        raise PublishError(
            f"What was saved gives {text!r} {saved:.6f} nats per token, the model itself "
            f"{expected:.6f}; nothing was published. Save it with save_pretrained and compare what "
            "from_pretrained loads."
        )

    return saved


def _check_published(
    clean_room: "CleanRoom", repo_id: str, oid: str, token: str | None, text: str, saved: float
) -> None:
    """Checks that the commit loads as the model that was saved."""
    place = f"{repo_id} at {oid}"
    try:
        loaded = clean_room.nats_per_token(repo_id, text, revision=oid, token=token)
    except RuntimeError as error:
        raise PublishError(
            f"{place} was published but does not load here: {error}\nIf the connection was lost, "
            "publish again: what is there already is not sent twice. Until then nobody should use "
            "it."
        ) from None

    if not math.isclose(loaded, saved, rel_tol=1e-5, abs_tol=1e-5):
        raise PublishError(
            f"{place} was published but gives {text!r} {loaded:.6f} nats per token instead of "
            f"{saved:.6f}: it is another model. Don't use it; publish again, and see who else "
            f"writes to {repo_id}."
        )


def _tag(api: HfApi, repo_id: str, oid: str, tag: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=oid)
    except HfHubHTTPError as error:
        raise PublishError(
            f"{repo_id} at {oid} was published and verified, but not tagged {tag!r}: {error}\n"
            f"Tag it with `hf repos tag create {repo_id} {tag} --revision {oid}`."
        ) from None


def check_access(
    repo_id: str, *, private: bool | None = None, tag: str | None = None, token: str | None = None
) -> str:
    """Returns the full name of a repository that the token may write to. Writes nothing.

    The repository need not exist.

    Raises:
        ValueError: If the name is not valid, or not the token's to write; if there is no token, or
            it may only read; if the repository is public and was to be private, or has the tag
            already.
    """
    validate_repo_id(repo_id)
    api = HfApi(token=token)

    if token is None and get_token() is None:
        raise ValueError(
            f"There is no token to write to {repo_id} with: make one that may write at {TOKENS_PAGE}, then give it "
            "to `hf auth login`, in the variable HF_TOKEN, or as token=."
        )

    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError(
            f"The Hub does not accept the token: make one at {TOKENS_PAGE}. {error}"
        ) from None

    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"The token of {user['name']} may only read: make one that may write at {TOKENS_PAGE}, then give it to "
            "`hf auth login`, in the variable HF_TOKEN, or as token=."
        )

    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    owner, name = repo_id.split("/") if "/" in repo_id else (user["name"], repo_id)
    if owner not in owners:
        raise ValueError(
            f"The token's owner can't write to {owner}/{name}: choose {' or '.join(owners)} before /{name}."
        )

    repo_id = f"{owner}/{name}"
    try:
        info = api.model_info(repo_id)
        if private and not info.private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, or choose another name."
            )
        if tag is not None and tag in [each.name for each in api.list_repo_refs(repo_id).tags]:
            raise ValueError(f"{repo_id} has a tag {tag!r} already: choose another one.")
    except RepositoryNotFoundError:
        pass

    return repo_id


def _check_card(card: ModelCard | str) -> None:
    """Asks the Hub if it will take a card. Nothing is written.

    Raises:
        ValueError: If its metadata is no YAML, or not what the Hub expects.
    """
    try:
        (card if isinstance(card, ModelCard) else ModelCard(card)).validate()
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"The card's metadata, between its two lines of ---, is not valid, and nothing was published: {error}"
        ) from None


def _commit(
    api: HfApi, folder: Path, repo_id: str, private: bool | None, branch: str, commit_message: str
) -> CommitInfo:
    """Makes one commit with all files of a flat folder, on top of what the branch has now.

    `upload_folder` may make several commits.
    """
    files = {path.name: path for path in sorted(folder.iterdir())}
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)

        head = api.model_info(repo_id, revision=branch).sha
        left_over = [
            name
            for name in api.list_repo_files(repo_id, revision=head)
            if name not in files
            and "/" not in name
            and (name.endswith(REPLACED) or name in REPLACED_FILES)
        ]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(n) for n in left_over
        ]
        operations += [CommitOperationAdd(name, path) for name, path in files.items()]

        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=branch, parent_commit=head
        )
    except Exception as error:  # of the client's several network libraries
        raise PublishError(
            f"The commit to {repo_id} was not confirmed: {type(error).__name__}: {error}\nA commit arrives whole or "
            f"not at all: see {api.endpoint}/{repo_id}/commits/{branch}, and publish again."
        ) from None


@torch.no_grad()
def nats_per_token(model, tokenizer, text: str) -> float:
    """Minus the ELBO of a text, in nats per token, with noise that is always the same.

    Its source also runs in the clean room: it uses nothing but its arguments and torch.
    """
    # The text `patch_size` times over, so that patches are whole.
    ids = tokenizer(text, add_special_tokens=False).input_ids * model.config.patch_size
    ids = ids[: model.config.max_position_embeddings]
    if not ids:
        raise ValueError(f"The tokenizer makes no token of {text!r}: choose another probe_text.")

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, len(ids), model.config.latent_size, generator=generator)
    input_ids = torch.tensor([ids], device=model.device)
    return -model(input_ids, latent_noise=noise.to(model.device)).elbo.item() / len(ids)


class CleanRoom:
    """A fresh process that can't import this package: it loads models by their own code.

    It runs on the CPU, with a cache of its own for modules and files, and takes one request a line.
    """

    SCRIPT = """
import json
import sys

sys.modules["tarflow_hf"] = None  # as if it were not installed
answers, sys.stdout = sys.stdout, sys.stderr

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


{function}

for line in sys.stdin:
    request = json.loads(line)
    source, text = request.pop("source"), request.pop("text")
    try:
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, **request)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True, **request)
        answer = {{"nats": nats_per_token(model.eval(), tokenizer, text)}}
        del model
    except Exception as error:
        answer = {{"error": f"{{type(error).__name__}}: {{error}}"}}
    print(json.dumps(answer), file=answers, flush=True)
"""

    def __enter__(self) -> "CleanRoom":
        self.folder = tempfile.TemporaryDirectory()
        self.errors = tempfile.TemporaryFile("w+")
        script = self.SCRIPT.format(function=inspect.getsource(nats_per_token))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={
                **os.environ,
                "HF_MODULES_CACHE": f"{self.folder.name}/modules",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        assert self.process.stdout is not None
        self.answers = self.process.stdout

        return self

    def __exit__(self, *exception) -> None:
        self.process.communicate()  # closes its input, by which it ends
        self.errors.close()
        self.folder.cleanup()

    def nats_per_token(self, source: str, text: str, **options: str | None) -> float:
        """Runs the function of that name there, on a model in a folder or on the Hub.

        Raises:
            RuntimeError: If the model could not be loaded or run. The message is the other
                process's.
        """
        request = {
            "source": source,
            "text": text,
            "cache_dir": f"{self.folder.name}/files",
            **options,
        }

        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = json.loads(self.answers.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # it has died
            self.errors.seek(0)
            raise RuntimeError(
                f"The process that loads it has ended: {self.errors.read()[-2000:]}"
            ) from None

        if "error" in answer:
            raise RuntimeError(answer["error"])

        return answer["nats"]
