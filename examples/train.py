"""Train a TarFlowLM, or a discrete transformer to compare it with.

    python examples/train.py                                    # the demo: five to ten minutes on two CPU cores
    python examples/train.py --recipe demo_ar                   # the discrete baseline, same data
    python examples/train.py --recipe text8_mixd --stage_steps 8000 1000 1000
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py --recipe openwebtext_deep
    python examples/train.py --dataset my.txt --mode progressive --patience 3 --eval_every 100
    python examples/train.py --dataset my.txt --tokenizer FOLDER    # one's own: a single flow, recipe demo_one_flow
    python examples/train.py --resume                           # go on where a run stopped
    python examples/train.py --push_to_hub USER/NAME            # publish it at the end
    python examples/train.py --from SOURCE --dataset my.txt     # convert it, and let it learn to fill gaps

A recipe is a file of examples/recipes/, by its name, or any JSON file like these: a model's
configuration, and options. Options of the command line win over those of the recipe. A model whose
recipe names no `latent_size` has one that fits the vocabulary: log2 of it, rounded up. With --from
it has a `conversion` in the configuration's place: options of `from_causal_lm`, and the flows to
append.
"""

import inspect
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, set_seed

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.baseline import longest_sequence, sample_discrete
from tarflow_hf.conversion import adopt, append_flow, from_causal_lm, load_source
from tarflow_hf.data import (
    PYTHON_DOCS,
    SentenceTokens,
    StreamingPackedTokens,
    check_vocabulary,
    is_of_sentences,
    load_splits,
    make_tokenizer,
    pack_split,
    read_json,
    sentence_splits,
    special_token_ids,
    vocabulary_size,
)
from tarflow_hf.evaluation import WHAT_IS_SCORED, score
from tarflow_hf.hub import check_access, model_card, publish
from tarflow_hf.loading import check_checkpoint
from tarflow_hf.report import likelihood_table
from tarflow_hf.training import (
    RunStopped,
    TrainingConfig,
    check_output_dir,
    discrete_baseline,
    make_accelerator,
    share_cores,
    slow_vocabulary,
    train,
)

RECIPES = Path(__file__).parent / "recipes"
CONVERSION = (
    "latent_size",
    "log_scale",
    "max_position_embeddings",
    "posterior_top_k",
    "start_token_id",
    "conditional",
    "append_flows",
)


@dataclass
class RunConfig:
    """The model to train, and the data to train it on."""

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "demo; with --tokenizer demo_one_flow; with --from convert_then_infill; there are "
            + ", ".join(sorted(p.stem for p in RECIPES.iterdir()))
        },
    )
    model: str = field(
        default="tarflowlm",
        metadata={
            "help": "tarflowlm, or ar: the discrete baseline",
            "choices": ["tarflowlm", "ar"],
        },
    )
    config: str | None = field(
        default=None,
        metadata={
            "help": "TarFlowLMConfig (with --from a conversion) as JSON, in the recipe's place"
        },
    )
    dataset: str = field(
        default=PYTHON_DOCS,
        metadata={
            "help": f"{PYTHON_DOCS}, a file of text or documents, a folder of them, a Hub dataset, ptb:FOLDER or "
            "wikitext2:FOLDER"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a Hub dataset"}
    )
    text_column: str = field(
        default="text", metadata={"help": "column of a file of documents or a Hub dataset"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read a Hub dataset while it downloads"}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "text8 (27 characters), ptb (50), words (those of the training text), or any AutoTokenizer; with "
            "--from the source's"
        },
    )
    sequence_length: int | None = field(
        default=None,
        metadata={"help": "tokens of a training sequence; by default as many as the model takes"},
    )
    test_sequences: int = field(default=64, metadata={"help": "sequences of the closing table"})
    test_samples: int = field(
        default=16, metadata={"help": "samples of the importance-weighted bound in it"}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "publish there at the end: USER/NAME"}
    )
    private: bool = field(
        default=False, metadata={"help": "make that repository private, where it is new"}
    )


def check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError for the first name that is not known, and suggests a known one."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"there are {', '.join(sorted(known))}."
            )
            raise ValueError(f"There is no {what} {name!r}: {hint}")


def read_recipe(name: str) -> dict:
    """The `config` and the `options` of a recipe, by name or path.

    Raises:
        ValueError: There is no such recipe, or it has other keys.
    """
    path = Path(name) if name.endswith(".json") else RECIPES / f"{name}.json"
    if not path.is_file():
        check_names("recipe", [name], [path.stem for path in RECIPES.iterdir()])

    recipe = read_json(path)
    check_names(
        f"key in the recipe {name}", recipe, ["description", "config", "conversion", "options"]
    )
    return recipe


def check_options_say_something(run: RunConfig) -> None:
    """Raises ValueError for an option that the others leave without a meaning."""
    is_text = run.dataset == PYTHON_DOCS or Path(run.dataset).suffix.lower() == ".txt"
    if is_text or is_of_sentences(run.dataset):
        for name, default in (("text_column", "text"), ("dataset_config", None)):
            if (value := getattr(run, name)) != default:
                raise ValueError(
                    f"--{name} {value} is for files of documents and Hub datasets, not {run.dataset}."
                )

    if run.private and not run.push_to_hub:
        raise ValueError("--private is for a repository of the Hub: give --push_to_hub, too.")


def default_recipe(given) -> str:
    """The recipe where none is named: with a tokenizer of one's own that of a single flow."""
    if given.source:
        return "convert_then_infill"
    return "demo" if given.tokenizer in (None, "text8") else "demo_one_flow"


def parse_arguments() -> tuple[RunConfig, TrainingConfig, dict]:
    """Returns the options and the model's configuration.

    The command line wins over the recipe, and the recipe over the defaults.
    """
    parser = HfArgumentParser((RunConfig, TrainingConfig))
    given = parser.parse_known_args()[0]
    name = given.recipe or default_recipe(given)
    recipe = read_recipe(name)
    options = recipe.get("options", {})
    known = [action.dest for action in parser._actions]
    check_names(f"option of train.py, as in the recipe {name},", options, known)
    parser.set_defaults(**options)
    run, training, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    check_names(
        "option",
        [argument for argument in unknown if argument.startswith("-")],
        [f"--{n}" for n in known],
    )
    if unknown:
        raise ValueError(f"There is no option before {unknown[0]!r}.")

    check_options_say_something(run)
    run.recipe = name
    run.tokenizer = run.tokenizer or training.source
    return run, training, model_fields(run, training, recipe)


def model_fields(run: RunConfig, training: TrainingConfig, recipe: dict) -> dict:
    """The fields of the model's configuration, or with --from the options of its conversion.

    Raises:
        ValueError: If one of them is unknown, or the recipe is for the other way.
    """
    kind, other = ("conversion", "config") if training.source else ("config", "conversion")
    if run.config is None and kind not in recipe and other in recipe:
        hint = (
            "describes a model of its own: leave it out with --from, or give one that has a conversion"
            if training.source
            else "converts a model: give it by --from"
        )
        raise ValueError(f"The recipe {run.recipe} {hint}.")
    if training.source and run.model == "ar":
        raise ValueError("--from makes a tarflowlm: leave out --model ar.")

    fields = read_json(run.config) if run.config else recipe.get(kind, {})
    if training.source:
        check_names("option of a conversion", fields, CONVERSION)
    else:
        # A saved one has all these.
        known = {*inspect.signature(TarFlowLMConfig).parameters, *TarFlowLMConfig().to_dict()}
        check_names("field of TarFlowLMConfig", fields, known)

    return fields


def data(run: RunConfig, config: TarFlowLMConfig, tokenizer, seed: int):
    """The three splits, tokenized; packed into blocks, or each line a sequence of its own."""
    splits = load_splits(
        run.dataset,
        text_column=run.text_column,
        dataset_config=run.dataset_config,
        streaming=run.streaming,
    )
    if is_of_sentences(run.dataset):
        patch_size = 1 if run.model == "ar" else config.patch_size
        made = sentence_splits(splits, tokenizer, patch_size)
    else:
        made = pack(run, splits, tokenizer, tokens_of_sequence(run, config), seed)

    return made["train"], made["validation"], made["test"]


def pack(run: RunConfig, splits, tokenizer, sequence_length: int, seed: int) -> dict:
    """The splits, packed into blocks; a stream is packed while it is trained on."""
    packed = {}
    for name, documents in splits.items():
        if run.streaming and name == "train":
            packed[name] = StreamingPackedTokens(
                documents, tokenizer, sequence_length, shuffle_buffer=1024, seed=seed
            )
            continue

        packed[name] = pack_split(name, documents, run.dataset, tokenizer, sequence_length)

    return packed


def build(run: RunConfig, fields: dict, tokenizer):
    """The configuration and the model, from the fields of its configuration and the tokenizer's vocabulary."""
    needed = vocabulary_size(tokenizer)
    if run.config is None:  # a configuration that was saved leaves out what is by default
        # The paper's sizes, too: 5 for 27 characters, 16 for 50,257 tokens.
        fields = {"latent_size": max(1, math.ceil(math.log2(needed))), **fields}

    config = TarFlowLMConfig(**{"vocab_size": needed, **fields})
    advice = "Leave vocab_size out of the configuration."
    check_vocabulary(tokenizer, config.vocab_size, advice)

    for name, token in special_token_ids(tokenizer, config.vocab_size).items():
        setattr(config, name, token)

    return config, discrete_baseline(config) if run.model == "ar" else TarFlowLMModel(config)


def build_from(training: TrainingConfig, fields: dict, tokenizer):
    """The model of --from and its tokenizer: a source converted, or a TarFlowLM as it is.

    Raises:
        ValueError: If a TarFlowLM is not what the conversion would make, or there is no tokenizer.
    """
    fields = dict(fields)
    flows = fields.pop("append_flows", [])
    source, gguf_file = training.source, training.gguf_file
    if gguf_file is None:
        check_checkpoint(source, needs_tokenizer=False)

    if gguf_file is None and AutoConfig.from_pretrained(source).model_type == "tarflowlm":
        model = TarFlowLMModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        for name, value in fields.items():
            if (own := getattr(model.config, name, value)) != value:
                raise ValueError(
                    f"{source} is a TarFlowLM already, with {name}={own}, and the recipe wants {value}. Give the model "
                    "that it was converted from, or take what it has by --config."
                )
    else:
        options = {"gguf_file": gguf_file, "dtype": torch.float32}
        language_model, tokenizer = load_source(source, tokenizer, **options)
        if tokenizer is None:
            raise ValueError(f"{source} has no tokenizer: give one by --tokenizer.")

        model = from_causal_lm(language_model.eval(), tokenizer, **fields)
        adopt(model, language_model, tokenizer)

    for flow in flows:
        append_flow(model, flow)

    return model, tokenizer


def make_model(run: RunConfig, training: TrainingConfig, fields: dict):
    """The model, its configuration and its tokenizer."""
    tokenizer = None
    if run.tokenizer is None or run.tokenizer != training.source:
        tokenizer = make_tokenizer(run.tokenizer, run.dataset, run.text_column)

    if training.source:
        model, tokenizer = build_from(training, fields, tokenizer)
        return model.config, model, tokenizer

    config, model = build(run, fields, tokenizer)
    # What is truncated fits the model.
    longest = min(tokenizer.model_max_length, config.max_position_embeddings)
    tokenizer.model_max_length = longest
    return config, model, tokenizer


def tokens_of_sequence(run: RunConfig, config: TarFlowLMConfig) -> int:
    """The tokens of a training sequence.

    Raises:
        ValueError: If the model does not take so many, or patches do not fit.
    """
    longest = config.max_position_embeddings
    length = longest if run.sequence_length is None else run.sequence_length
    if not 1 <= length <= longest or length % config.patch_size:
        raise ValueError(
            f"sequence_length must be at most {longest}, the model's max_position_embeddings, and a multiple of its "
            f"patch_size, {config.patch_size}: not {length}."
        )

    return length


def main():
    run, training, fields = parse_arguments()
    check_output_dir(training.output_dir, training.resume)  # before anything is read
    accelerator = make_accelerator(training)
    if accelerator.device.type == "cpu":
        share_cores()

    set_seed(training.seed)
    if run.push_to_hub and run.model == "ar":
        raise ValueError(
            "push_to_hub is for a tarflowlm: the discrete baseline is pushed by its own push_to_hub."
        )

    if run.push_to_hub and accelerator.is_main_process:
        run.push_to_hub = check_access(
            run.push_to_hub, private=run.private or None
        )  # before it is trained

    config, model, tokenizer = make_model(run, training, fields)

    with accelerator.main_process_first():
        train_data, validation_data, test_data = data(run, config, tokenizer, training.seed)

    accelerator.print(
        f"{run.model}: {model.num_parameters():,} parameters; {run.dataset}: {describe(train_data)}"
    )
    say_beforehand(run, config, train_data, validation_data, accelerator)

    try:
        model = train(model, train_data, validation_data, tokenizer, training, accelerator)
    except RunStopped as stop:
        accelerator.print(stop)
        sys.exit(128 + stop.signal)

    if accelerator.is_main_process:
        print(f"\nSaved to {training.output_dir}/model")
        report(model, tokenizer, test_data, run)
        if run.push_to_hub:
            push(run, training, tokenizer)


def say_beforehand(run: RunConfig, config, train_data, validation_data, accelerator) -> None:
    """Prints how much of the text is lost, and warns of a setting that will be slow."""
    is_stream = isinstance(train_data, StreamingPackedTokens)
    packed, name = (validation_data, "validation") if is_stream else (train_data, "training")
    notes = [packed.note(f"the {name} text")]
    if run.model != "ar":
        notes.append(slow_vocabulary(config))

    accelerator.print(*(note for note in notes if note), sep="\n", end="\n" if any(notes) else "")


def describe(train_data) -> str:
    if isinstance(train_data, StreamingPackedTokens):
        return "a stream"

    size = f"{len(train_data.tokens):,} training tokens"
    if isinstance(train_data, SentenceTokens):
        return f"{size} in {len(train_data):,} sentences"

    return size


def report(model, tokenizer, test_data, run: RunConfig) -> None:
    """A sample, and a table with the likelihood of held-out text."""
    if run.model == "ar":
        tokens = sample_discrete(model, 1, min(256, longest_sequence(model)), seed=(0,))
    else:
        length = {"max_new_tokens": run.sequence_length} if run.sequence_length else {}
        torch.manual_seed(0)
        tokens = model.generate(**length)

    sequences = test_data.first(run.test_sequences)
    scores = score(model, sequences, num_samples=run.test_samples, progress=True)
    print(f"\nA sample:\n{tokenizer.decode(tokens[0], skip_special_tokens=True)}\n")
    table = likelihood_table(
        scores.rows(), test_data.characters_per_token, test_data.tokens_per_word
    )
    print(f"Test text:\n{table}\n{WHAT_IS_SCORED}")


def push(run: RunConfig, training: TrainingConfig, tokenizer) -> None:
    """Publishes what was saved, with a card that says how it was trained."""
    model = TarFlowLMModel.from_pretrained(f"{training.output_dir}/model")
    command = shlex.join(["accelerate", "launch", *sys.argv])
    card = model_card(
        model.config,
        {**asdict(run), **asdict(training), "command": command},
        repo_id=run.push_to_hub,
    )
    print(
        publish(
            model, tokenizer, run.push_to_hub, card=card, private=run.private or None
        ).commit_url
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step, or in the closing table
        sys.exit("Stopped. Nothing was being trained.")
