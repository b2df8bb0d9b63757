"""The registry: names, descriptions, and the user's own learners."""

from __future__ import annotations

import pytest

from adapters import registry
from tests.adapters import methods


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown learner 'netwrok'.*network"):
        registry.get("netwrok")


def test_a_name_belongs_to_one_learner() -> None:
    assert registry.get("network") is registry.get("network")
    assert registry.describe()["network"].startswith("Perceptron")
    other = type("Other", (methods.Linear,), {"name": "network", "__doc__": "Another one."})
    with pytest.raises(ValueError, match="there is a learner 'network' already"):
        registry.register(other)


def test_a_registered_method_is_a_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register(methods.Linear)
    assert registry.get(methods.Linear.name).name == methods.Linear.name
