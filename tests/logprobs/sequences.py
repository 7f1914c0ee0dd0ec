"""Token sequences for the engine's tests: shapes that have gone wrong somewhere, and a slow look at a pack."""

from __future__ import annotations

import numpy as np

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.packing import Pack


def ids(rng, n):
    return rng.integers(0, 256, n).astype(np.int32)


def awkward(seed=0, longest=40):
    """Every awkward shape at once; the comments say which."""
    rng = np.random.default_rng(seed)
    prompt, answer = ids(rng, 12), ids(rng, 9)
    return [
        TokenSequence(prompt, answer),
        TokenSequence(prompt, ids(rng, 5)),
        TokenSequence(prompt, answer.copy()),  # identical answers
        TokenSequence(prompt, np.concatenate([answer, ids(rng, 4)])),  # an answer that extends another
        TokenSequence(prompt, answer[:1]),  # one token, and a prefix of another
        TokenSequence(prompt, answer, scored=rng.random(12 + 9) < 0.5),  # scored tokens inside the prompt
        TokenSequence(ids(rng, 1), ids(rng, 7)),  # a prompt of one token
        TokenSequence(ids(rng, 0), ids(rng, 6)),  # empty prompts, not shared
        TokenSequence(ids(rng, 0), ids(rng, 2)),
        TokenSequence(ids(rng, 0), ids(rng, 1)),  # nothing to score: the first token has no predecessor
        TokenSequence(ids(rng, longest), ids(rng, longest)),  # longer than every window
        TokenSequence(ids(rng, 3), ids(rng, 20), scored=np.zeros(23, bool)),  # nothing asked for
    ]


def visible(pack: Pack, window: int = 0) -> np.ndarray:
    """The mask of a pack [T, T] from the definition: which token each token may attend to."""
    T = len(pack.ids)
    seen = np.zeros((T, T), bool)
    for s in pack.segments:
        keys = [*range(s.prefix, s.prefix + s.prefix_length), *range(s.start, s.start + s.length)]
        for i in range(s.length):
            place = s.prefix_length + i
            seen[s.start + i, [k for j, k in enumerate(keys) if j <= place and (not window or place - j < window)]] = (
                True
            )
    return seen
