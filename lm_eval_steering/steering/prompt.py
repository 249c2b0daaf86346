"""Prompting as an intervention: an instruction that names the language to answer in, in front of every prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

from lm_eval_steering import languages
from lm_eval_steering.errors import InterventionError, UnknownLanguageError

KIND = "prompt "  # what the name of such an intervention begins with in reports
ENGLISH, NATIVE = "english", "native"
PLACEHOLDER = "{language}"  # what the name of the language is put in place of
_BRACES = re.compile(r"\{\w*\}")


def check_instruction(given: Any) -> str:
    """An instruction without blanks at its ends.

    Raises:
        ValueError: if it is no text, or has a name in braces other than `{language}`.
    """
    if not isinstance(given, str):
        raise ValueError(f"instruction={given!r}: expected text, such as 'Answer in {PLACEHOLDER}.'")
    if unknown := [name for name in _BRACES.findall(given) if name != PLACEHOLDER]:
        raise ValueError(f"instruction={given!r}: unknown {unknown[0]}; expected {PLACEHOLDER} or none")
    return given.strip()


def _flag(given: Any) -> bool:
    word = str(given).lower()
    if word not in {"true", "false"}:
        raise ValueError(f"instruction_system={given!r}: expected True or False")
    return word == "true"


def _names(given: Any) -> Any:
    if given not in (ENGLISH, NATIVE):
        raise ValueError(f"instruction_names={given!r}: expected {ENGLISH} or {NATIVE}")
    return given


def name_of(language: str, names: str) -> str:
    """Name of a language in English or in itself.

    Raises:
        UnknownLanguageError: if its name in itself is not known.
    """
    return languages.native_name(language) if names == NATIVE else languages.english_name(language)


class Prompt(BaseModel):
    """An instruction in front of every prompt; `docs/prompting.md` says where it stands.

    Attributes:
        instruction: as it is sent. `{language}` is replaced by the language's name when the object is made; empty
            changes nothing.
        language: code of the language that it names.
        names: whether that name is in English or in the language itself.
        system: whether it is sent as system instruction of a chat template.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: Annotated[str, BeforeValidator(check_instruction)]
    language: str
    names: Annotated[str, BeforeValidator(_names)] = ENGLISH
    system: Annotated[bool, BeforeValidator(_flag)] = False

    @field_validator("language", mode="before")
    @classmethod
    def _one_language(cls, given: Any) -> str:
        if not isinstance(given, str) or "+" in given:
            raise ValueError(f"language={given!r}: an instruction names one language, such as fra_Latn")
        return languages.normalise(given)

    def model_post_init(self, _: Any) -> None:
        """Put the language's name in place."""
        if PLACEHOLDER in self.instruction:
            name = name_of(self.language, self.names)
            object.__setattr__(self, "instruction", self.instruction.replace(PLACEHOLDER, name))

    @property
    def template(self) -> str:
        """The instruction with `{language}` in place of the language's name, the same for every language."""
        try:
            name = name_of(self.language, self.names)
        except UnknownLanguageError:
            return self.instruction
        return self.instruction.replace(name, PLACEHOLDER)

    @property
    def kind(self) -> str:
        """The intervention without its language: `prompt "Answer in {language}."`."""
        parts = [f'{KIND}"{" ".join(self.template.split())}"']
        parts += ["native names"] if self.names == NATIVE else []
        parts += ["as system instruction"] if self.system else []
        return ", ".join(parts)

    def signature(self) -> str:
        """`prompt:"Answer in French."|lang:fra_Latn`; the text is JSON, without what separates parts and steps."""
        quoted = json.dumps(self.instruction, ensure_ascii=False).replace("|", "\\u007c").replace(";", "\\u003b")
        parts = [f"prompt:{quoted}"]
        parts += [f"names:{self.names}"] if self.names != ENGLISH else []
        parts += ["system:true"] if self.system else []
        return "|".join([*parts, f"lang:{self.language}"])


def fields_of_signature(fields: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a `Prompt` from the parts of its signature.

    Raises:
        InterventionError: if the instruction is no JSON text, or there is a part that no instruction has.
    """
    names = {"prompt": "instruction", "lang": "language", "names": "names", "system": "system"}
    if other := fields.keys() - names.keys():
        raise InterventionError(f"signature: cannot read {min(other)}: of an instruction, expected {', '.join(names)}")
    if "lang" not in fields:
        raise InterventionError(f"signature: prompt:{fields['prompt']} without lang:")
    try:
        instruction = json.loads(fields["prompt"])
    except ValueError:
        raise InterventionError(f"signature: cannot read prompt:{fields['prompt']}, expected quoted text") from None
    return {name: fields[key] for key, name in names.items() if key in fields} | {"instruction": instruction}
