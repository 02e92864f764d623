"""SIGINT and SIGTERM end a run between two steps."""

import signal
import threading
from types import FrameType
from typing import Any


class RunStopped(KeyboardInterrupt):
    """A run that was asked to end, and has been saved.

    Its text is one line: where the run is saved, and how to go on.

    Attributes:
        signal: The number of the signal that asked.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """Notes the first SIGINT or SIGTERM while it is entered. A second one acts as it always does.

    Signals reach the main thread only. In another thread nothing is noted.

    Attributes:
        signal: The number of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL

        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
