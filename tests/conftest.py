"""For all tests: threads that wait do so asleep, so that tests share a busy machine; no progress bars of libraries."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch starts its threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
