"""Which pairs a label audit names, in which order; and when two texts count as nearly the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.metrics.compare import align_policies
from dpo_score.metrics.suspect_labels import AGAINST, IDENTICAL, NEAR, label_audit, near_duplicates, similarity
from tests.metrics.scored import scored


def test_only_pairs_that_all_policies_rank_against_the_label_most_confident_first() -> None:
    a = scored("a", [-1.0, -30.0, -2.0, 5.0, 0.0])
    b = scored("b", [-1.0, -20.0, 3.0, -5.0, -9.0])
    found = label_audit(align_policies([a, b]))
    assert [(s.row, s.finding) for s in found.suspects] == [(1, AGAINST), (0, AGAINST)]
    assert found.suspects[0].confidence == pytest.approx(0.880797, abs=1e-6)  # σ(2), the less sure of the two
    assert (found.pairs, found.policies, found.against) == (5, 2, 2)


def test_a_policy_that_is_the_reference_has_no_vote() -> None:
    found = label_audit(align_policies([scored("same", [0.0, 0.0]), scored("a", [-1.0, 1.0])]))
    assert [s.row for s in found.suspects] == [0]
    assert label_audit(align_policies([scored("same", [0.0, 0.0])])).suspects == ()


def test_identical_answers_are_named_apart_and_copies_counted() -> None:
    policy = scored("a", [-1.0, 0.0, -2.0], pair_ids=["x", "y", "x"], marks=[(), ("identical_pair",), ()])
    found = label_audit(align_policies([policy]))
    assert [(s.row, s.finding, s.copies) for s in found.suspects] == [
        (2, AGAINST, 2),
        (0, AGAINST, 2),
        (1, IDENTICAL, 1),
    ]
    assert found.suspects[-1].confidence is None


texts = st.text(alphabet="abcde ", max_size=40)


@given(texts, texts)
def test_similarity_is_symmetric_and_one_for_the_same_letters(a: str, b: str) -> None:
    assert similarity(a, b) == similarity(b, a)
    assert 0.0 <= similarity(a, b) <= 1.0
    assert similarity(a, a.upper().replace(" ", ", ")) == 1.0


@given(st.lists(texts, max_size=8))
def test_what_is_called_near_is_near_and_copies_are_always_found(found: list[str]) -> None:
    near = near_duplicates(found)
    for index, other in enumerate(near):
        if other is not None:
            assert other < index
            assert similarity(found[other], found[index]) >= NEAR
        else:
            assert all(similarity(text, found[index]) < 1.0 for text in found[:index])


def test_jaccard_by_hand() -> None:
    assert similarity("abcdef", "abcdeg") == pytest.approx(1 / 3)  # abcde of abcde, bcdef, bcdeg
    assert similarity("abcdef", "uvwxyz") == 0.0


def test_most_edited_copies_are_proposed() -> None:
    """At a similarity of 0.8 to 0.9, at most 1 of 200 is missed."""
    draw = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(4000)])
    pairs = [draw.choice(words, 60) for _ in range(200)]
    missed = 0
    for text in pairs:
        edited = text.copy()
        edited[draw.choice(60, 4, replace=False)] = "changed"
        a, b = " ".join(text), " ".join(edited)
        assert similarity(a, b) > 0.75
        missed += near_duplicates([a, b])[1] is None and similarity(a, b) >= NEAR
    assert missed <= 1


def test_a_light_edit_is_near_and_another_text_is_not() -> None:
    text = "The committee met on Tuesday to discuss the new library and its opening hours in winter. " * 3
    assert near_duplicates([text, text.replace("Tuesday", "Monday"), "Nothing alike here, not at all."]) == [
        None,
        0,
        None,
    ]
