"""What a namespace holds, by content: as a dictionary would answer, in little memory."""

from __future__ import annotations

import hashlib
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from dpo_score.storage.cache.namespace import Contents, content_digest_of, file_name


def content(n: int) -> str:
    return hashlib.blake2b(str(n).encode(), digest_size=16).hexdigest()


hints = st.text("ab-_9", min_size=1, max_size=8)
files = st.dictionaries(st.integers(0, 30), hints, max_size=20).map(
    lambda found: {content(n): file_name(hint, content(n)) for n, hint in found.items()}
)


@given(listed=files, added=files)
def test_it_answers_as_a_dictionary(listed: dict[str, str], added: dict[str, str]) -> None:
    contents = Contents(list(listed.values()))
    for digest, name in added.items():
        contents.add(digest, name)
    for digest in map(content, range(31)):
        assert contents.find(digest) == (listed | added).get(digest)


def test_names_that_it_did_not_give_do_not_disturb_it() -> None:
    known = file_name("ref", content(1))
    contents = Contents(["x.parquet", ".parquet", "é-1.parquet", f"{content(2)}.parquet", known])
    assert contents.find(content(1)) == known
    assert contents.find(content(2)) == f"{content(2)}.parquet"
    assert content_digest_of(known) == content(1)


def test_a_hundred_thousand_files_are_a_few_megabytes() -> None:
    names = [file_name("ref", content(n)) for n in range(100_000)]
    tracemalloc.start()
    contents = Contents(names)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert contents.find(content(77_777)) == names[77_777]
    assert held < 5 << 20
