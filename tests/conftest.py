"""For all tests: threads that wait do so asleep, so that tests share a busy machine; no progress bars of libraries."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.storage.s3_server import Server, serving

pytest_plugins = ("tests.model_fixtures", "tests.run_fixtures")

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch starts its threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores have workers of their own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests go first: begun last, one of them would leave the other cores without work at the end."""
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    items.sort(key=lambda item: item.path in quick)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An S3 server of this test file's own."""
    with serving() as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects_are_searched() -> None:
    """What is alive before a file, modules above all, stays: no later collection of garbage need look at it again.

    Every load of a model begins with one, which takes 0.2 s over the objects of torch and transformers.
    """
    gc.collect()
    gc.freeze()
