"""Record the keys of params.yaml and of the profile that a stage reads while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from coordexp.config.block import Block
from coordexp.config.presets import leaves
from coordexp.config.run import RunConfig
from coordexp.inputs import PARAMS_FILE, PROFILE_FILE

Key = tuple[str, str]  # PARAMS_FILE or PROFILE_FILE, dotted key


class Recorder:
    """Records the keys read from observed blocks: one by one, or all keys of a block that is dumped or pickled."""

    def __init__(self) -> None:
        self.keys: set[Key] = set()
        self._places: dict[int, tuple[Block, str, str]] = {}  # keeps the block: its id must stay its own

    def run(self, stage: Callable[..., None]) -> Callable[..., None]:
        """Run the stage with observed parameters."""

        def run(context: RunConfig, *names: str) -> None:
            self._watch(context.params, PARAMS_FILE, "")
            self._watch(context.profile, PROFILE_FILE, "")
            stage(context, *names)

        return run

    def _watch(self, block: Block, file: str, prefix: str) -> None:
        self._places[id(block)] = (block, file, prefix)

    def read(self, block: Block, name: str, value: Any) -> None:
        """A field was read."""
        if id(block) not in self._places:
            return
        _, file, prefix = self._places[id(block)]
        if isinstance(value, Block):
            self._watch(value, file, f"{prefix}{name}.")
        else:
            self.keys.add((file, prefix + name))

    def read_all(self, block: Block, dumped: dict[str, Any]) -> None:
        """All dumped fields of a block were read."""
        if id(block) in self._places:
            _, file, prefix = self._places[id(block)]
            self.keys.update((file, prefix + key) for key, _ in leaves(dumped))

    def copied(self, block: Block, copy: Block) -> None:
        """The copy of an observed block is observed, too."""
        if id(block) in self._places:
            self._watch(copy, *self._places[id(block)][1:])


@contextmanager
def recording() -> Iterator[Recorder]:
    """Let every parameter block report reads to the recorder."""
    recorder = Recorder()
    dump, copy, get_state = Block.model_dump, Block.model_copy, Block.__getstate__

    def get(block: Block, name: str) -> Any:
        value = object.__getattribute__(block, name)
        if name in type(block).__pydantic_fields__:
            recorder.read(block, name, value)
        return value

    def model_dump(block: Block, **options: Any) -> dict[str, Any]:
        dumped = dump(block, **options)
        recorder.read_all(block, dumped)
        return dumped

    def model_copy(block: Block, **options: Any) -> Block:
        copied = copy(block, **options)
        recorder.copied(block, copied)
        return copied

    def getstate(block: Block) -> dict[Any, Any]:
        recorder.read_all(block, dump(block))
        return get_state(block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "__getattribute__", get, raising=False)
        patch.setattr(Block, "model_dump", model_dump)
        patch.setattr(Block, "model_copy", model_copy)
        patch.setattr(Block, "__getstate__", getstate)
        yield recorder
