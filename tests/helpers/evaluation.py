"""A text of three sentences."""

TEXT = (
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm light of the sun "
    * 3
)
