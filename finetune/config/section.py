"""What the sections of a configuration share: their base class, the types of values, and what another value changes."""

from enum import StrEnum
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from finetune.system import paths

Text = Annotated[str, Field(min_length=1)]
# Expanded when it is read, so that config.yaml and a resumed run know one name for one place.
PathText = Annotated[Text, AfterValidator(paths.expand), PlainSerializer(paths.written, when_used="json")]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
ALTERNATIVE = "|"  # begins what pydantic adds to the place of an error: which of a key's alternatives was read


class Effect(StrEnum):
    """What another value of a key changes in a run that is resumed. A key says it in its type:
    `Annotated[int, Effect.NOTHING]`; one that says nothing changes the result.
    """

    RESULT = "result"
    NUMERICS = "numerics"
    """The same result up to rounding."""
    NOTHING = "nothing"


class Section(BaseModel):
    """Keys with values: frozen, without unknown keys; what they mean are the docstrings below them."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def sections(cls) -> dict[str, type["Section"]]:
        """The keys that are sections."""
        kinds = {name: [field.annotation, *_alternatives(field.annotation)] for name, field in cls.model_fields.items()}
        return {
            name: kind
            for name, union in kinds.items()
            for kind in union
            if isinstance(kind, type) and issubclass(kind, Section)
        }

    @classmethod
    def effect_of(cls, key: str) -> Effect:
        """What another value of a dotted key changes."""
        name, _, within = key.partition(".")
        if within and name in cls.sections():
            return cls.sections()[name].effect_of(within)
        # A value that is no section, such as lora, says it for all keys within.
        said = cls.model_fields[name].metadata if name in cls.model_fields else []
        return next((effect for effect in said if isinstance(effect, Effect)), Effect.RESULT)


def _alternatives(annotation: Any) -> list[Any]:
    """What a union is of, at any depth."""
    return [inner for one in get_args(annotation) for inner in (one, *_alternatives(one))]


def error_at(key: str, message: str, *others: str) -> PydanticCustomError:
    """An error at a key that is wrong beside `others`: another value of one of them would make it right. All are dotted
    names in the section whose validator raises it, that of a field or of the whole configuration.
    """
    return PydanticCustomError("error_at", "{message}", {"key": key, "message": message, "others": others})
