"""Corpora, tokenizers and packing: from a name to blocks of token ids.

    splits = load_splits("python-docs")                    # {"train": documents, "validation": ..., "test": ...}
    tokenizer = character_tokenizer()                      # or any AutoTokenizer
    train = PackedTokens(splits["train"], tokenizer, 256)  # or StreamingPackedTokens

A document is a string. Only a dataset of the Hub needs a network. Only it, a file of documents or a
folder needs the `datasets` library.
"""

from .characters import (
    CharacterCount,
    check_vocabulary,
    checked_ids,
    continued_ids,
    is_of_characters,
    say_what_is_lost,
    special_token_ids,
    token_ids,
    token_with_highest_id,
    vocabulary_size,
)
from .corpora import (
    corpus_of,
    is_of_sentences,
    load_corpus,
    penn_treebank_tokenizer,
    symbol_tokenizer,
    word_tokenizer,
)
from .files import lost_path, output_file, read_json, read_text, split_documents, split_text
from .packing import PackedTokens, StreamingPackedTokens, pack_split
from .python_docs import PYTHON_DOCS, python_documentation
from .sentences import SentenceTokens, sentence_splits
from .sources import held_out_documents, load_splits
from .tokenizers import character_tokenizer, make_tokenizer

__all__ = [
    "PYTHON_DOCS",
    "CharacterCount",
    "PackedTokens",
    "SentenceTokens",
    "StreamingPackedTokens",
    "character_tokenizer",
    "check_vocabulary",
    "checked_ids",
    "continued_ids",
    "corpus_of",
    "held_out_documents",
    "is_of_characters",
    "is_of_sentences",
    "load_corpus",
    "load_splits",
    "lost_path",
    "make_tokenizer",
    "output_file",
    "pack_split",
    "penn_treebank_tokenizer",
    "python_documentation",
    "read_json",
    "read_text",
    "say_what_is_lost",
    "sentence_splits",
    "special_token_ids",
    "split_documents",
    "split_text",
    "symbol_tokenizer",
    "token_ids",
    "token_with_highest_id",
    "vocabulary_size",
    "word_tokenizer",
]
