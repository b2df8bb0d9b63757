"""A storage with attributes on top that are kept in memory: the database below is only read."""

from __future__ import annotations

from abc import update_abstractmethods
from collections.abc import MutableMapping
from typing import Any

from optuna.storages import BaseStorage

__all__ = ["Overlay"]

Layer = MutableMapping[tuple[int, str], Any]


def _passing_on(kind: Any) -> Any:
    """Have a class pass every method of a storage that it lacks on to the storage below."""
    for name in kind.__abstractmethods__:

        def method(self: Any, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            return getattr(self.below, _name)(*args, **kwargs)

        setattr(kind, name, method)
    return update_abstractmethods(kind)


class _Overlay(BaseStorage):
    """Adds system attributes of studies from a layer in memory; all else is the storage below.

    Figures and notes of a dashboard are such attributes: they can be shown for a study that is
    being run, or that cannot be written to, without a word in its database.

    Args:
        below: the storage.
        layer: (study id, key) -> value.
        keep: whether what is set goes into the layer; otherwise into the storage below.
    """

    def __init__(self, below: BaseStorage, layer: Layer, *, keep: bool) -> None:
        self.below, self.layer, self.keep = below, layer, keep

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute, in the layer or below; see `keep`."""
        if self.keep:
            self.layer[study_id, key] = value
            return
        self.below.set_study_system_attr(study_id, key, value)
        self.layer.pop((study_id, key), None)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the attributes below, with those of the layer on top."""
        mine = {key: value for (id_, key), value in list(self.layer.items()) if id_ == study_id}
        return {**self.below.get_study_system_attrs(study_id), **mine}

    def get_all_studies(self) -> list[Any]:
        """Return all studies with the attributes of the layer."""
        found = sorted(self.below.get_all_studies(), key=lambda study: int(study._study_id))
        for study in found:
            study.system_attrs = self.get_study_system_attrs(study._study_id)
        return found


Overlay: Any = _passing_on(_Overlay)
