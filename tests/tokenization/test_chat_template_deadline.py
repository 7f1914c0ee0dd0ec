"""Templates that do not end, end."""

from __future__ import annotations

import threading
import time

import pytest

from dpo_score.config.schema import TextSpec
from dpo_score.errors import ModelError
from dpo_score.tokenization import chat_template as deadline
from dpo_score.tokenization.chat_template import chat_template
from tests.tiny import byte_tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ASKED = ({"role": "user", "content": "hi"},)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "TEMPLATE_SECONDS", 0.3)


def test_an_endless_template_stops_the_run_in_one_paragraph() -> None:
    template = chat_template(byte_tokenizer(), TextSpec(chat_template=ENDLESS))
    assert template is not None
    with pytest.raises(ModelError, match=r"ran for more than 0\.3 s.*--chat-template"):
        template.render(ASKED, None, {})


def test_in_another_thread_too() -> None:
    found: list[Exception] = []

    def work() -> None:
        try:
            with deadline.template_deadline():
                while True:
                    pass
        except ModelError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1


def test_what_ends_in_time_is_left_alone_afterwards() -> None:
    with deadline.template_deadline():
        pass
    time.sleep(2 * deadline.TEMPLATE_SECONDS)
