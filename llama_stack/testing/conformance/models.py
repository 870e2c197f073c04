"""Checks of Models, which the stack itself provides."""

from __future__ import annotations

from ...apis import Models
from .checks import check, everything
from .subject import Subject


@check(Models)
async def models_are_sorted_by_name(subject: Subject) -> None:
    """The list is in the order of the names, so that two of them can be compared."""
    found = await everything(await subject.client.models.list_models())
    names = [model.model for model in found]
    assert names == sorted(names), "it is not sorted"
