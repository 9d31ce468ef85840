"""Wordings about invented things: ten or more for each domain, each with the name, none with a doubt."""

import pytest

from builders.nonsense_entities.names import DOMAINS
from builders.nonsense_entities.prompts import WORDINGS


@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_ten_wordings_or_more_and_all_differ(domain: str):
    assert len(set(WORDINGS[domain].values())) == len(WORDINGS[domain]) >= 10


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_wording_names_the_thing_once_and_hints_at_nothing(domain: str):
    for wording in WORDINGS[domain].values():
        assert wording.count("{name}") == 1
        asked = wording.format(name="Xyz").lower()
        assert not any(word in asked for word in ("exist", "real", "invent", "made up", "if there"))
