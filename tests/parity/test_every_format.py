"""The same pairs in every format give the same token ids and, bit for bit, the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_score.data.formats.registry import FORMATS
from dpo_score.errors import DataError
from tests.parity.conversions import Row, unpaired
from tests.parity.every_format import Models, Scored, differing, ids_of, pairs_of, scored
from tests.parity.forms import FORMS, Form, conversion, token_forms
from tests.tiny import save_tiny

HELD = {
    "messages": 20, "one question": 16, "system column": 18, "no system": 18, "differ at once": 14,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def two_of_each_subset() -> list[Row]:
    kept: dict[str, list[Row]] = {}
    for pair in pairs_of():
        kept.setdefault(pair["subset"], []).append(pair)
    return [pair for pairs in kept.values() for pair in pairs[:2]]


PAIRS = two_of_each_subset()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("every-format")
    reference, policy = (save_tiny(folder / f"m{seed}", seed=seed) for seed in (0, 1))
    return Models(str(reference), str(policy), folder / "cache", {"path": "plain", "threads": 1})


@pytest.fixture(scope="module")
def twins(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scored]:
    """What the other forms are held against."""
    names = {form.twin for form in FORMS}
    folder = tmp_path_factory.mktemp("twins")
    return {form.name: scored(form, PAIRS, models, folder / form.name) for form in FORMS if form.name in names}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_gives_the_bits_of_its_twin(
    form: Form, models: Models, twins: dict[str, Scored], tmp_path: Path
) -> None:
    found = scored(form, PAIRS, models, tmp_path)
    assert differing(found, twins[form.twin]) == []
    assert found.computed == 0
    assert found.summary["data"]["datasets"]["pairs"]["format"] == form.format
    assert found.table.num_rows == len(found.conversion.carried) >= 14


def test_token_ids_give_the_bits_of_the_text(models: Models, twins: dict[str, Scored], tmp_path: Path) -> None:
    for form in token_forms(ids_of(PAIRS, models, tmp_path / "ids")):
        found = scored(form, PAIRS, models, tmp_path / form.name)
        assert (differing(found, twins[form.twin]), found.computed) == ([], 0)
        assert len(found.conversion.carried) == len(PAIRS)


@pytest.mark.parametrize("name", ["Json() columns", "messages-full", "sharegpt", "Arena, winner", "HelpSteer3"])
def test_without_a_cache_the_bits_are_the_same(
    name: str, models: Models, twins: dict[str, Scored], tmp_path: Path
) -> None:
    """Every pair again, so blocks and packs are the same ones."""
    form = next(form for form in FORMS if form.name == name)
    found = scored(form, PAIRS, Models(models.reference, models.policy, tmp_path / "c", models.options), tmp_path)
    assert (differing(found, twins[form.twin]), found.computed > 0) == ([], True)


def test_a_wrong_label_is_seen(models: Models, twins: dict[str, Scored], tmp_path: Path) -> None:
    form = next(form for form in FORMS if form.name == "SHP")

    def lying(pair: Row, number: int) -> list[Row] | None:
        rows = form.convert(pair, number)
        return rows and [{**rows[0], "labels": 1 - rows[0]["labels"]}]

    turned = scored(Form("turned", form.format, lying, form.options), PAIRS, models, tmp_path)
    assert {"pair_digest", "margins", "loss", "ref_chosen_logps"} <= set(differing(turned, twins[form.twin]))


def test_every_row_of_the_table_of_formats_is_a_form() -> None:
    assert {form.format for form in (*FORMS, *token_forms([]))} == {row.full_name for row in FORMATS}


def test_what_holds_no_pairs_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"KTO form.*DPO needs pairs"):
        scored(Form("KTO", "", unpaired), PAIRS, models, tmp_path)


def test_how_many_pairs_each_kind_of_form_can_hold(tmp_path: Path) -> None:
    held = {form.name: len(conversion(form, PAIRS, tmp_path / str(i)).carried) for i, form in enumerate(FORMS)}
    kinds = {
        "messages": "messages-full", "one question": "pair-text", "system column": "pair-text with a system column",
        "no system": "hh-transcript", "differ at once": "pair-text-implicit",
    }  # fmt: skip
    assert {kind: held[name] for kind, name in kinds.items()} == HELD
