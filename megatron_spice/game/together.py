"""Coroutines of one game that run together and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class GamePutOff(Exception):
    """The game cannot go on now: a completion was cut short, or may not be asked for any more."""


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """`asyncio.gather`, but when one fails the others are cancelled and waited for instead of running on unseen.

    When one says that the game is put off, the others are waited for uncancelled: what they asked for is being cut short too,
    and their part of it is to be kept.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        try:
            return await asyncio.gather(*tasks)
        except GamePutOff:
            await asyncio.wait(tasks)
            errors = [error for task in tasks if (error := task.exception()) and not isinstance(error, GamePutOff)]
            raise errors[0] if errors else GamePutOff from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
