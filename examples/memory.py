"""How much memory the process takes that no file backs, and for how long."""

import ctypes
import re
import sys
import threading
import time
from pathlib import Path

STATUS = Path("/proc/self/status")


def private_bytes() -> int | None:
    """Memory that this process alone holds and that is no copy of a file; None if unknown."""
    if not STATUS.exists():
        return None
    line = re.search(r"^RssAnon:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return 1024 * int(line[1]) if line else None


def give_back() -> None:
    """Return freed memory to the system if we can: reusing it would hide what is taken next."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # some C libraries lack it
        if trim:
            trim(0)


class MemoryLog(threading.Thread):
    """Private memory every two milliseconds: ``rows`` holds (seconds, MB above the start)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rows: list[tuple[float, float]] = []
        self.done = threading.Event()

    def __enter__(self) -> "MemoryLog":
        give_back()
        self.before, self.began = private_bytes(), time.perf_counter()
        if self.before is not None:
            self.start()
        return self

    def look(self) -> None:
        seconds = time.perf_counter() - self.began
        self.rows.append((seconds, (private_bytes() - self.before) / 1e6))

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.look()

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.done.set()
        if self.before is not None:
            self.join()
            self.look()

    @property
    def peak(self) -> float:
        """In MB; nan where the system does not tell private memory."""
        return max((size for _, size in self.rows), default=float("nan"))
