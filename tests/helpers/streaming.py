"""Streamers that keep what they are given."""


class Recorder:
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class DraftRecorder(Recorder):
    """One that keeps guesses, too, each behind all that was certain then."""

    def __init__(self):
        super().__init__()
        self.guesses = []

    def put_draft(self, value):
        certain = [token for part in self.parts for token in part]
        self.guesses.append(certain + value.flatten().tolist())
