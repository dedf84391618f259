"""Changes to a model are taken back, the last one first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from runtime.engine.attachment import Attachment


def test_the_last_change_is_taken_back_first_and_only_once() -> None:
    attachment, said = Attachment(), list[int]()
    attachment.add(lambda: said.append(1), lambda: said.append(2))
    attachment.add(lambda: said.append(3))
    attachment.undo()
    attachment.undo()
    assert said == [3, 2, 1]


def test_an_attribute_that_was_put_hides_the_classs_own_until_it_is_taken_off() -> None:
    class Owner:
        name = "its class's"

    owner, attachment = Owner(), Attachment()
    attachment.put(owner, "name", "its own")
    assert owner.name == "its own"
    attachment.undo()
    assert owner.name == "its class's" and not vars(owner)


def test_a_kept_attribute_gets_its_value_back_whatever_became_of_it() -> None:
    owner, attachment = SimpleNamespace(training=True), Attachment()
    attachment.keep(owner, "training")
    owner.training = False
    attachment.undo()
    assert owner.training is True


def test_where_taking_back_fails_the_rest_is_still_there_to_be_taken_back() -> None:
    attachment, said = Attachment(), list[str]()
    attachment.add(lambda: said.append("first"), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attachment.undo()
    attachment.undo()
    assert said == ["first"]
