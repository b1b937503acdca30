"""Watch a freely generated video until something has gone out of sight behind the curtain and come back."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from echo_infinity.evaluation.objects import find_objects
from echo_infinity.evaluation.returns import LOOK_BACK, Answer, Question, ask, judge_return
from echo_infinity.evaluation.scenes import CLOSED, OPEN, curtain_share
from echo_infinity.worlds.motion import SINK_FRAMES

_SIGHT = 6  # open frames after which an object counts as seen
_JUDGED = (2, 5, 8)  # open frames after the return


class Watch:
    """One stream's first question and its answer; constant in size.

    The question is the last open frame but three before the curtain closes, where it had been open for six frames and
    shows a clear object. The answer is read off the third, sixth and ninth open frame after the curtain has opened
    again. A stream that shows objects in the sink is not asked.

    Args:
        seed: of the stream; chooses the object that is asked for.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.question: Question | None = None
        self.answer: Answer | None = None
        self.hidden = 0  # frames that the curtain was closed
        self.done = False
        self._frames = self._open = 0
        self._last: deque[Tensor] = deque(maxlen=LOOK_BACK)
        self._after: list[Tensor] = []

    def push(self, frames: Tensor) -> None:
        """Take the next frames ``(N, 3, 64, 64)`` uint8."""
        for frame, share in zip(frames, curtain_share(frames).tolist(), strict=True):
            if self.done:
                return
            self._see(frame, share)
            self._frames += 1

    def _see(self, frame: Tensor, share: float) -> None:
        if share <= OPEN:
            if self._frames < SINK_FRAMES:
                self.done = bool(find_objects(frame))
            elif self.question is None:
                self._last.append(frame)
            elif self._open in _JUDGED:
                self._after.append(frame)
            self._open += 1
        elif share >= CLOSED:
            if self.question is None and self._last and self._open >= _SIGHT:
                self.question = ask(find_objects(self._last[0]), self.seed)
            self.hidden += self.question is not None and not self._after
            self._open = 0
            self._last.clear()
        if self.question is not None and len(self._after) == len(_JUDGED):
            self.answer, self.done = judge_return(self.question, self._after), True
