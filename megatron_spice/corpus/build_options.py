"""What may be asked of a corpus being made."""

from __future__ import annotations

from dataclasses import dataclass


class BadInput(ValueError):
    """A broken line under --strict, or inputs that give no corpus."""


@dataclass(frozen=True)
class BuildOptions:
    """How passages are cut and shards are closed; all in tokens."""

    max_tokens: int = 5992
    min_tokens: int = 32
    shard_tokens: int = 1 << 30

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"--min-tokens {self.min_tokens} and --max-tokens {self.max_tokens}: "
                "the first must be at least 1 and at most the second"
            )
        if self.shard_tokens < 1:
            raise ValueError(f"--shard-tokens {self.shard_tokens} must be at least 1")
