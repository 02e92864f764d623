"""A reader of the passes' pages, and text that must not break out of a page."""

import re
from html import unescape
from html.parser import HTMLParser

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def tokens_of(section):
    found = re.findall(r'--heat:([\d.]+)"><bdi>(.*?)</bdi><small>(.*?)</small>', section)
    return [(unescape(text), number, float(heat)) for heat, text, number in found]


HOSTILE = [
    "</p></li><script>alert(1)</script>",
    "&amp;",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31m\x00\u202e",
    "a\n b",
]


class Page(HTMLParser):
    """A page's rows, each a list of (text, marked, given).

    Asserts that every element ends in its place.
    """

    void = ("meta", "br", "link", "img")

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.rows, self.headings, self.titles = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "li":
            self.rows.append([])
        if tag not in self.void:
            self.open.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if ("p", "text") in self.open:
            self.rows[-1].append(
                (data, ("mark", None) in self.open, ("span", "given") in self.open)
            )
        elif self.open and self.open[-1][0] in ("h1", "h2"):
            self.headings.append((self.open[-1][0], data))
        elif self.open and self.open[-1][0] == "title":
            self.titles.append(data)


def hostile_tokenizer():
    tokenizer = Tokenizer(
        models.WordLevel({token: n for n, token in enumerate(HOSTILE)}, unk_token=HOSTILE[1])
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def written(answer):
    return unescape(
        re.search(r'<p class="written" dir="auto">(.*?)</p>', answer, re.DOTALL).group(1)
    )
