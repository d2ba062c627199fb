"""A provider that counts how many of its calls run at once."""

import threading
import time

from support.hosted import Pattern, tell
from support.pattern import pattern


class Concurrent(Pattern):
    def __init__(self, limit, log):
        super().__init__(None, log, limit)

    def open(self):
        self.lock, self.inside = threading.Lock(), 0

    def read(self, offset, out):
        with self.lock:
            self.inside += 1
            tell(self.log, self.inside)
        time.sleep(0.05)
        out[:] = pattern(offset, len(out))
        with self.lock:
            self.inside -= 1
