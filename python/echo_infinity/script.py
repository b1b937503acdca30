"""What a stream is to show: the prompt in effect, the one that waits for the next block, those still to come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from echo_infinity.cache import KV
from echo_infinity.prompts import TimedPrompt, due
from echo_infinity.settings import PromptChange


class Script:
    """A stream's prompts in order.

    Args:
        first: the first prompt.
        encode: gives a prompt's keys and values.
    """

    def __init__(self, first: PromptChange, encode: Callable[[str], list[KV]]) -> None:
        self.past = [first]  # the last of them is in effect
        self.waiting: tuple[PromptChange, list[KV]] | None = None
        self.coming: deque[TimedPrompt] = deque()
        self._encode = encode

    @property
    def cuts(self) -> list[int]:
        """Blocks at which new shots began, the first one's left out."""
        return [change.block for change in self.past if change.cut]

    @property
    def text_to_come(self) -> list[KV]:
        """Keys and values of the prompt that waits."""
        assert self.waiting is not None
        return self.waiting[1]

    def follow(self, seconds: float, block: int) -> None:
        """Ask for the newest prompt that is due; a cut that was passed over still cuts."""
        if not (count := due(self.coming, seconds)):
            return
        passed = list(islice(self.coming, count))
        cut = any(prompt.cut for prompt in passed) or (self.waiting is not None and self.waiting[0].cut)
        self.ask(PromptChange(passed[-1].prompt, block, cut=cut))
        for _ in passed:  # now that the prompt is encoded, which can fail
            self.coming.popleft()

    def ask(self, change: PromptChange) -> None:
        """Have a prompt wait for the next block."""
        self.waiting = change, self._encode(change.prompt)

    def enter(self, block: int, *, cut: bool) -> None:
        """Note that the prompt that waited is in effect from ``block`` on."""
        assert self.waiting is not None
        self.past.append(replace(self.waiting[0], block=block, cut=cut))
        self.waiting = None

    def rewrite(self, schedule: Sequence[TimedPrompt], begun: float, block: int) -> None:
        """Forget what waits and what is to come, for another schedule.

        Args:
            schedule: in order of time.
            begun: seconds at which the newest block began: what was due by then should be in effect.
            block: the next.
        """
        passed, waiting = due(schedule, begun), None
        if passed and schedule[passed - 1].prompt != self.past[-1].prompt:
            change = PromptChange(schedule[passed - 1].prompt, block)
            waiting = change, self._encode(change.prompt)
        self.waiting, self.coming = waiting, deque(schedule[passed:])

    def copy(self) -> Script:
        """Return one that goes its own way from here."""
        twin = Script(self.past[0], self._encode)
        twin.past, twin.waiting, twin.coming = list(self.past), self.waiting, self.coming.copy()
        return twin

    def meta(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "prompts": [asdict(change) for change in self.past],
            "schedule": [asdict(prompt) for prompt in self.coming],
            "switch": None if self.waiting is None else asdict(self.waiting[0]),
        }

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Take what :meth:`meta` returned."""
        self.past = [PromptChange(**change) for change in meta["prompts"]]
        self.coming = deque(TimedPrompt(**prompt) for prompt in meta.get("schedule", []))
        if meta["switch"] is not None:
            self.ask(PromptChange(**meta["switch"]))
