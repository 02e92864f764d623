"""The options of generation that a converted model takes from its source."""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.modeling_tarflowlm import TarFlowLMModel

# Those that mean the same here.
SHARED_OPTIONS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_new_tokens",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
SAMPLING_OPTIONS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generation_config_of(source: PreTrainedModel) -> GenerationConfig:
    """The source's generation config, as far as a flow's `generate` has its options.

    The source's temperature is that of the next token's distribution, so it becomes
    `mixture_temperature`. Options of sampling are taken over only if the source samples. A converted
    model always samples by default; `top_k=1` makes it greedy.
    """
    theirs = source.generation_config
    options = {name: getattr(theirs, name, None) for name in SHARED_OPTIONS}
    if theirs.do_sample:
        options |= {name: getattr(theirs, name, None) for name in SAMPLING_OPTIONS}
        options["mixture_temperature"] = theirs.temperature

    given = {name: value for name, value in options.items() if value is not None}
    config = GenerationConfig(do_sample=True, temperature=1.0, **given)
    config._from_model_config = False
    return config


def adopt(
    model: TarFlowLMModel, source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Gives a converted model its source's options of generation, by `generation_config_of`.

    The tokenizer is told not to write the start token, which the model reads anyway.
    """
    model.generation_config = generation_config_of(source)
    if tokenizer is not None and tokenizer("a").input_ids[:1] == [model.config.start_token_id]:
        tokenizer.add_bos_token = False
