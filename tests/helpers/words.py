"""Small tokenizers."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def letters_with_a_template() -> PreTrainedTokenizerFast:
    """Letters; a text by itself gets a token in front of it and one behind it."""
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(97 + i): i + 2 for i in range(26)}, "Ġ": 28}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
