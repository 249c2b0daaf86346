"""What a chat template makes of a prompt: an instruction that it leaves out, a thought that it opens before an answer.

lm-eval takes the system role away from a template that refuses it, and its results name the instruction all the same.
A template whose prompt for the answer ends in `<think>` makes an option that is scored the beginning of a thought. Both
are what lm-eval's `hf` does, and stay so; here they are counted, warned of once, and noted in the results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval_steering.metrics.output_language import warn_once

_OPENED = re.compile(
    r"(<\|?(?:begin_of_|start_of_)?(?:seed:)?(?:think|thinking|thought|reasoning)\|?>|\[THINK\]"
    r"|<\|channel\|>analysis<\|message\|>)\Z",
    re.IGNORECASE,
)
_LONGEST_MARK = 40  # characters


def opened_thought(context: str) -> str:
    """The mark at the end of a prompt that opens a thought; empty where it opens none."""
    match = _OPENED.search(context[-_LONGEST_MARK:].rstrip())
    return match[1] if match else ""


def leaves_out_instruction(messages: Sequence[Mapping[str, Any]], prompt: str) -> bool:
    """Whether the text of a system message is not in the prompt that a template made of the messages."""
    texts = [message["content"] for message in messages if message.get("role") == "system"]
    return any(isinstance(text, str) and text.strip() not in prompt for text in texts)


class TemplateNotes:
    """What happened to the prompts of an evaluation."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.clear()

    def clear(self) -> None:
        """Before another evaluation."""
        self._left_out = self._scored = self._opened = 0
        self._mark = ""

    def rendered(self, messages: Sequence[Mapping[str, Any]], prompt: str) -> None:
        """One prompt that a template made."""
        self._left_out += leaves_out_instruction(messages, prompt)
        if self._left_out == 1:
            warn_once("the chat template leaves the system instruction (or the task's description) out of the prompt")

    def scored(self, contexts: Iterable[str]) -> None:
        """Prompts whose continuations are scored."""
        marks = [opened_thought(context) for context in contexts]
        opened = [mark for mark in marks if mark]
        self._scored, self._opened = self._scored + len(marks), self._opened + len(opened)
        if opened:
            self._mark = opened[0]
            warn_once(
                f"prompts end in {self._mark}, which opens a thought, and the option after it is scored as the "
                "beginning of that thought; use enable_thinking=False, or a task that generates"
            )

    def notes(self) -> list[str]:
        """One sentence each, for the results."""
        notes = []
        if self._left_out:
            notes.append(
                f"dropped: the chat template leaves the system instruction (or the task's description) out of "
                f"{self._left_out} prompts"
            )
        if self._opened:
            notes.append(
                f"{self._opened} of {self._scored} scored prompts end in {self._mark}, which opens a thought: options "
                "are scored as the beginning of that thought"
            )
        return notes
