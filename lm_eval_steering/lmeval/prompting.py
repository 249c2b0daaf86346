"""The instruction of an intervention by prompting: where it stands in a prompt, and the proof that it was sent.

lm-eval builds its requests as ever, and its samples show them without the instruction, so that they pair with those of
every other run. The model puts it in front: of the first user message of a chat template, or of its system message,
else of the whole prompt after BOS, followed by a newline. A text without a prompt comes after the instruction alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.utils import has_bos_prefix

from lm_eval_steering.errors import DidNotHappenError, InterventionError
from lm_eval_steering.steering.prompt import Prompt

END = "\n"  # between the instruction and what follows
_MARK = "\N{SYMBOL FOR SUBSTITUTE FORM TWO}"  # stands for a message, to see what a template puts in front of it


class Prompting:
    """The instruction in force, and the prompts that carry it.

    Attributes:
        prompt: the instruction; None where there is none.
        sent: number of prompts that the model was given, each with the instruction in its tokens.
    """

    def __init__(self, prompt: Prompt | None, tokenizer: Any, beginning: str) -> None:
        """Nothing was sent yet.

        Args:
            prompt: the instruction, if any.
            tokenizer: of the model.
            beginning: text of the token that prompts begin with.

        Raises:
            InterventionError: if it is to be a system instruction and the model has no chat template.
        """
        self.prompt, self.sent = prompt, 0
        self._tokenizer, self._beginning = tokenizer, beginning
        self._suspended = False
        self._rendered: dict[str, str] = {}  # prompts that a chat template made -> the same with the instruction
        self._heads: tuple[str, ...] | None = None
        if prompt is not None and prompt.system and not getattr(tokenizer, "chat_template", None):
            raise InterventionError(
                "instruction_system=True (system: true in a plan): the model's tokenizer has no chat template; leave "
                "it out, and the instruction stands in front of the prompt"
            )

    @property
    def active(self) -> bool:
        """Whether prompts are changed: an empty instruction changes none."""
        return self.prompt is not None and bool(self.prompt.instruction) and not self._suspended

    @property
    def instruction(self) -> str:
        """The text; empty where there is none."""
        return self.prompt.instruction if self.prompt is not None else ""

    @property
    def key(self) -> str:
        """What tells the prompts of this instruction from those of another one."""
        return self.prompt.signature() if self.active and self.prompt is not None else ""

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, prompts are those of the unsteered model."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    # --- where the instruction stands -------------------------------------------------------------------------------

    def with_instruction(self, context: str) -> str:
        """A prompt, not empty, as it is sent.

        Raises:
            InterventionError: if it is to be in a chat template, and lm-eval did not put the prompt into one here.
        """
        if not self.active:
            return context
        if context in self._rendered:
            return self._rendered[context]
        if self.prompt is not None and self.prompt.system:
            raise InterventionError(
                "instruction_system=True (system: true in a plan): the prompt is in no chat template; pass "
                "--apply_chat_template without --cache_requests, or leave it out"
            )
        if any(context.startswith(head) for head in self._template_heads()):
            raise InterventionError(
                "instruction=: the prompt was put into a chat template by another process; run without "
                "--cache_requests, so that the instruction can be put into the user's message"
            )
        begun = self._beginning if has_bos_prefix(context, self._beginning) else ""
        return f"{begun}{self.instruction}{END}{context[len(begun) :]}"

    def render(
        self, messages: Sequence[Mapping[str, str]], plain: str, render: Callable[[list[dict[str, str]]], str]
    ) -> None:
        """Note what a chat template makes of messages with the instruction.

        Args:
            messages: of lm-eval.
            plain: what it makes of them.
            render: messages -> text.

        Raises:
            InterventionError: if the template leaves the instruction out.
        """
        if not self.active or self.prompt is None:
            return
        changed = [dict(message) for message in messages]
        role = "system" if self.prompt.system else "user"
        place = next((number for number, message in enumerate(changed) if message["role"] == role), None)
        if place is not None:
            changed[place]["content"] = f"{self.instruction}{END}{changed[place]['content']}"
        else:
            changed.insert(0, {"role": role, "content": self.instruction})
        text = render(changed)
        if _without_blanks(self.instruction) not in _without_blanks(text):
            raise InterventionError(
                f"instruction={self.instruction!r}: the chat template leaves the {role} message's text out of the "
                f"prompt{'; leave instruction_system (system: true) out' if self.prompt.system else ''}"
            )
        self._rendered[plain] = text

    def _template_heads(self) -> tuple[str, ...]:
        """What the chat template puts in front of its first message, beyond BOS."""
        if self._heads is None:
            heads = []
            for role in ("user", "system") if getattr(self._tokenizer, "chat_template", None) else ():
                messages = [{"role": role, "content": _MARK}]
                messages += [{"role": "user", "content": "."}] if role == "system" else []
                try:
                    text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
                except Exception:  # a template may refuse a role in whatever way it likes
                    continue
                heads.append(text.partition(_MARK)[0] if _MARK in text else "")
            self._heads = tuple(head for head in heads if head.replace(self._beginning, "").strip())
        return self._heads

    # --- evidence ---------------------------------------------------------------------------------------------------

    def prove(self, prompts: Iterable[Sequence[int]]) -> None:
        """Count prompts that the model is about to read, each of which must have the instruction in its text.

        Args:
            prompts: tokens of each, as they are fed.

        Raises:
            DidNotHappenError: if one has not, such as a prompt that is cut at the beginning to fit the model.
        """
        if not self.active:
            return
        wanted = self._text_of(self._tokenizer.encode(self.instruction, add_special_tokens=False))
        carries: dict[tuple[int, ...], bool] = {}
        number = missing = 0
        for tokens in map(tuple, prompts):
            if tokens not in carries:
                carries[tokens] = wanted in self._text_of(tokens)
            number, missing = number + 1, missing + (not carries[tokens])
        if missing:
            raise DidNotHappenError(
                f"{missing} of {number} prompts do not carry the instruction {self.instruction!r}: prompts that are "
                "longer than the model's context lose their beginning; use fewer examples, or a larger max_length="
            )
        self.sent += number

    def _text_of(self, tokens: Sequence[int]) -> str:
        return _without_blanks(str(self._tokenizer.decode(list(tokens), skip_special_tokens=False)))

    @contextmanager
    def proven(self, requests: Sequence[Any]) -> Iterator[None]:
        """Around the answers to some requests: afterwards prompts with the instruction were sent.

        Raises:
            DidNotHappenError: if none was.
        """
        before = self.sent
        yield
        if self.active and requests and self.sent == before:
            raise DidNotHappenError(
                f"{len(requests)} requests were answered and no prompt carried the instruction {self.instruction!r}"
            )

    def evidence(self) -> dict[str, Any]:
        """How many prompts carried the instruction; empty where there is none."""
        return {} if self.prompt is None else {"prompts": self.sent}


def _without_blanks(text: str) -> str:
    return "".join(text.split())


class AskedKeys(CacheHook):
    """Gives partial answers to the request cache under what lm-eval asked, not under what was sent."""

    def __init__(self, hook: CacheHook, asked: Mapping[str, str]) -> None:
        """Nothing is answered yet.

        Args:
            hook: of the request cache.
            asked: prompt as it is sent -> prompt of lm-eval.
        """
        self.dbdict = hook.dbdict
        self._hook, self._asked = hook, asked

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """What lm-eval calls with each answer."""
        context, *rest = req
        self._hook.add_partial(attr, (self._asked.get(context, context), *rest), res)
