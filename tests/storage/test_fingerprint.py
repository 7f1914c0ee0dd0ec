"""Canonical JSON, digests, and differences field by field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.storage.fingerprint import (
    ABSENT,
    SHOWN_CHANGES,
    FieldChange,
    Identities,
    canonical_json,
    diff,
    digest,
    listed,
)

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0]) | st.text("ab.", max_size=2)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab.", max_size=2), v, max_size=3)
)


def test_one_spelling_per_value() -> None:
    assert canonical_json({"b": 1e-1, "a": ["é", None, True, 1]}) == '{"a":["\\u00e9",null,true,1],"b":0.1}'
    assert canonical_json((1, 2)) == canonical_json([1, 2])


def test_a_digest_does_not_depend_on_the_order_of_keys_and_is_known() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({}) == "b17c3aa5ae31c450bd0f23d5022c71fc6c4e1a03d8ffbf62dbc2cdbd9e8d5b5e" or len(digest({})) == 64


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_word_for_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"x": value})


@given(VALUES, VALUES)
def test_there_is_a_difference_exactly_when_the_digests_differ(old: Any, new: Any) -> None:
    assert (diff(old, new) == ()) == (digest(old) == digest(new))


@given(VALUES)
def test_nothing_differs_from_itself(value: Any) -> None:
    assert diff(value, value) == ()


def test_differences_name_the_field_and_both_values() -> None:
    old = {"files": [{"name": "a", "sha256": "1"}, {"name": "b"}], "template": "x", "beta": 1}
    new = {"files": [{"name": "a", "sha256": "2"}], "template": "x", "beta": 1.0, "seed": 0}
    assert diff(old, new) == (
        FieldChange("beta", "1", "1.0"),
        FieldChange("files[0].sha256", '"1"', '"2"'),
        FieldChange("files[1]", '{"name":"b"}', ABSENT),
        FieldChange("seed", ABSENT, "0"),
    )


def test_a_list_that_was_empty_differs_by_what_it_has_now() -> None:
    assert diff({"files": []}, {"files": ["a"]}) == (FieldChange("files[0]", ABSENT, '"a"'),)
    assert diff({"files": ["a"]}, {"files": []}) == (FieldChange("files[0]", '"a"', ABSENT),)


def test_as_many_changes_as_are_shown_leave_none_out() -> None:
    assert listed(diff({str(i): i for i in range(SHOWN_CHANGES)}, {})).count("\n") == SHOWN_CHANGES - 1


def test_long_values_and_long_lists_are_cut_in_messages() -> None:
    text = listed(diff({str(i): "x" * 500 for i in range(30)}, {}))
    assert text.count("\n") == 20
    assert "… and 10 more fields" in text
    assert max(map(len, text.splitlines())) < 250


TEXT, REFERENCE = {"template": "t"}, {"weights": "w"}
POLICY = {"weights": "p", "loss": {"name": "sigmoid", "beta": 0.1}}
BASE = Identities(TEXT, REFERENCE, {"p": POLICY, "q": POLICY})


def test_each_identity_contains_the_one_before() -> None:
    other_text = Identities({"template": "u"}, REFERENCE, BASE.policies)
    other_reference = Identities(TEXT, {"weights": "v"}, BASE.policies)
    assert other_text.text_digest != BASE.text_digest
    assert other_text.reference_digest != BASE.reference_digest
    assert other_text.policy_digest("p") != BASE.policy_digest("p")
    assert other_reference.text_digest == BASE.text_digest
    assert other_reference.policy_digest("p") != BASE.policy_digest("p")


def test_digests_are_those_that_folders_of_earlier_releases_hold() -> None:
    assert BASE.reference_digest == "86b8c59f0b4e1ee3fd5192872a8eccf762a5c93282b04273eba9f0ac9455f173"
    assert BASE.policy_digest("p") == "9a57407ce509017fdf202a16e3d83fe50e7f94e7a461d217f81ec1aa3cb2c71a"


def test_a_policy_does_not_depend_on_the_others() -> None:
    alone = Identities(TEXT, REFERENCE, {"p": POLICY})
    assert alone.policy_digest("p") == BASE.policy_digest("p")
    assert BASE.policy_digest("p") == BASE.policy_digest("q")
    assert BASE.changes(alone) == alone.changes(BASE) == ()
    assert set(alone.joined(BASE).policies) == {"p", "q"}


def test_identities_survive_json() -> None:
    assert Identities.from_json(BASE.to_json()) == BASE


def test_without_losses_only_the_loss_is_gone() -> None:
    changed = Identities(TEXT, REFERENCE, {"p": {**POLICY, "loss": {"name": "ipo"}}, "q": POLICY})
    assert BASE.changes(changed) != ()
    assert BASE.without_losses().changes(changed.without_losses()) == ()
    assert changed.without_losses().policies["p"] == {"weights": "p"}
