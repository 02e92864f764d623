"""Downloads the texts that figures here were made on, in the very form they had.

    python benchmarks/texts.py brown-and-reviews brown-and-reviews.txt   # a file: the study's text
    python benchmarks/texts.py doyle doyle                               # a folder of three files

**brown-and-reviews** is the Brown corpus without its tags, then 2,000 film reviews (Pang and Lee
2004), both as NLTK has them, for research. **doyle** is eleven books of Arthur Conan Doyle, in the
public domain, from Project Gutenberg: a paragraph a line, without what the volunteers wrote around
it. The last fiftieth of each book is the test text, the fiftieth before it the validation text.
A tokenizer of 1,024 pieces of words lies beside them.

Every download has a fixed version and a checksum.
"""

import argparse
import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NLTK = (
    "https://raw.githubusercontent.com/nltk/nltk_data/5db857e6f7df11eabb5e5665836db9ec8df07e28/"
    "packages/corpora/"
)
BROWN = "9b275f9b3b95d7bd66ccfb7cd259f445a13bbe5d1f4107aba09fd3e8364bafa6"
REVIEWS = "a41211ae685019137410268134db6a1a14428c89b671eb83056151a878539008"

BOOKS_FROM = "https://raw.githubusercontent.com/GITenberg/"
HELD_OUT = 50  # the validation and the test text are one in so many paragraphs, each


class Book(NamedTuple):
    """A book of Project Gutenberg: its number is behind the last underscore of its name."""

    name: str
    commit: str
    sha256: str


# fmt: off
BOOKS = [
    Book("A-Study-in-Scarlet_244", "28ff9b2f49dad721efd60c4d5ba9645fad84f936",
         "5bff1205877115d74a7f16e82ea35150f932638a67718626d30b0410c2be074a"),
    Book("The-Sign-of-the-Four_2097", "c36c6c7a4e7e5f7b8d17c9b19299e8ff996b414c",
         "940b404710fc5cc8b3e9b4d19f91c12d8b1657f960eda9dea65a049b3ca05220"),
    Book("The-Adventures-of-Sherlock-Holmes_1661", "7e5dd2703fbf503c004063e96ab7c61262375e5f",
         "2a0ce5568625a304f54fbb6bfdeeadf527a1437254b5f0e06b5a9e233d4784a2"),
    Book("The-Memoirs-of-Sherlock-Holmes_834", "6a4b3489ac34fb2b01bb5f8e8097134b2e954d5c",
         "ce431578214ff174df0958b0277d9f3fc2c27bd06c6862d51777c2a04a3d752e"),
    Book("The-Return-of-Sherlock-Holmes_108", "723d6d49bca7b22e3b33e68af4df88ea6c12b459",
         "ae6a89aa626af682045e873a3a6d171c706f6fc5c0a0388d1027788aebe4ab5d"),
    Book("The-Hound-of-the-Baskervilles_2852", "bb11a2bd7e3cda991b7f83936e811a0f472c089c",
         "f128d1476b176d1273da92aa0394dc55ad605995a914c83c3464a52f226f3b46"),
    Book("The-Valley-of-Fear_3289", "b3d6c72f411351fae7db81842f9ca72c9312dfc2",
         "2114963ba433a5d3efa0d3b7771e12f4b77d14c951e64eb0c5b35e49d0a3e539"),
    Book("The-Lost-World_139", "358626523d86f073e29deccb063418920ea11aeb",
         "f6b39bd6c79270d117e0a4e9a8814628e4185d356a0a6d6bd7116e74c389b7d5"),
    Book("Tales-of-Terror-and-Mystery_537", "3dc6408d7e9c4af808eb78415c113373fee520af",
         "45491fc47d00ec1d71c7729da4005d9b5d8eb0d2873a181607d3d512dd4ac919"),
    Book("The-White-Company_903", "30244201bee3aadaec83888dc29fa868c96225b9",
         "3ca25dfd637f80d5e4ab6d8568272717aa1121a1a592a68751b65b711ac7b5c2"),
    Book("Sir-Nigel_2845", "c3cc69ff99d4d1ae8c1815a66e89cd147bf37853",
         "8d9d891fe6f0f572c6ab85c470afa4e9258c318ba301c559906363bed0abe87e"),
]
# fmt: on


def download(url: str, sha256: str) -> bytes:
    """The content of a URL.

    Raises:
        ValueError: If it is not what it was when the figures were made.
    """
    with urlopen(url) as answer:
        content = answer.read()

    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{url} has changed: its SHA-256 is {found}, not {sha256}.")

    return content


# ------------------------------------------------------------------------------ brown-and-reviews


def texts_in(archive: bytes, pattern: str, encoding: str) -> str:
    """The files of an archive whose names match, in the order of their names, a newline between."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = sorted(name for name in files.namelist() if re.fullmatch(pattern, name))
        return "\n".join(files.read(name).decode(encoding) for name in names)


def without_tags(text: str) -> str:
    """The words of a tagged text.

    Example:
        >>> without_tags("The/at jury/nn said/vbd 1-1/2/cd")
        'The jury said 1-1'
    """
    return re.sub(r"(\S*?)/\S+", r"\1", text)


def brown_and_reviews() -> str:
    brown = texts_in(download(NLTK + "brown.zip", BROWN), r"brown/c[a-r]\d\d", "utf-8")
    reviews = download(NLTK + "movie_reviews.zip", REVIEWS)
    return without_tags(brown) + texts_in(reviews, r"movie_reviews/.*\.txt", "latin-1")


# ------------------------------------------------------------------------------------------ doyle


def paragraphs(book: str) -> list[str]:
    """The paragraphs of a book of Project Gutenberg, each in one line.

    Example:
        >>> paragraphs("*** START OF THIS PROJECT GUTENBERG EBOOK X ***\\nA _b_\\nc.\\n\\nD.\\n*** END OF THIS PROJECT")
        ['A b c.', 'D.']
    """
    book = book.replace("\r\n", "\n")
    start = re.search(r"\*\*\* ?START OF TH.*\n", book).end()
    end = re.search(r"\n\*\*\* ?END OF TH", book).start()
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", book[start:end]))
    is_around = re.compile(r"Produced by|(End of )?(the )?Project Gutenberg", re.IGNORECASE).match
    return [part.replace("_", "") for part in found if part and not is_around(part)]


def doyle() -> dict[str, str]:
    """The text of each split."""
    splits = {"train": [], "validation": [], "test": []}
    for book in BOOKS:
        number = book.name.rpartition("_")[2]
        url = f"{BOOKS_FROM}{book.name}/{book.commit}/{number}.txt"
        parts = paragraphs(download(url, book.sha256).decode("ascii"))
        size = len(parts) // HELD_OUT
        splits["train"] += parts[: -2 * size]
        splits["validation"] += parts[-2 * size : -size]
        splits["test"] += parts[-size:]

    return {name: "\n".join(parts) + "\n" for name, parts in splits.items()}


def tokenizer_of(text: str, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """The most frequent pieces of words of a text, by byte pair encoding, and an end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", choices=["brown-and-reviews", "doyle"])
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    if arguments.text == "doyle":
        arguments.output.mkdir(parents=True, exist_ok=True)
        splits = doyle()
        for name, text in splits.items():
            (arguments.output / f"{name}.txt").write_text(text, "utf-8")

        tokenizer_of(splits["train"]).save_pretrained(arguments.output / "tokenizer")
    else:
        arguments.output.write_text(brown_and_reviews(), "utf-8")


if __name__ == "__main__":
    main()
