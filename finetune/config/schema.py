"""One YAML file is one run: its schema, and the reading of it with errors that say where and what instead.

Sections are frozen pydantic models that refuse unknown keys and convert nothing: true is no 1, "8" no 8; only a whole
number stands for a float. `~` and environment variables in paths are expanded (system/paths.py); how scalars are
read (2e-5, 1e5, off) is in `strict_yaml`. Help and the JSON schema for editors come from the models: `python -m
finetune.config [--schema]`. Not here: whether paths exist (but for lora.start_from), whether a run fits.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill, indent
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from finetune.adapters import start_from
from finetune.config import strict_yaml
from finetune.lora.linear import LoRAConfig
from finetune.system import paths

Text = Annotated[str, Field(min_length=1)]
# Expanded when it is read, so that config.yaml and a run's continuation know one name for one place.
PathText = Annotated[Text, AfterValidator(paths.expand), PlainSerializer(paths.written, when_used="json")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """What is wrong with a configuration: every problem on a line of its own, with file and line or the override."""


def _refuse_float16(value: object) -> object:
    if value in ("float16", "fp16", "half"):
        reason = "Gemma's activations overflow in fp16; use bfloat16, or float32 on a card without bfloat16"
        raise ValueError(f"{value} is refused: {reason}")
    return value


def _fault(key: str, message: str) -> PydanticCustomError:
    """An error at a key within the section that is being checked."""
    return PydanticCustomError("fault", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """Keys and, within CHANGES, what a run's continuation would change by another value of each: the result, the
    numerics (the same result up to rounding), or nothing. Those of a section within say it themselves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
    CHANGES: ClassVar[dict[str, str]]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        said = [name for names in cls.CHANGES.values() for name in names.split()]
        assert sorted(said) == sorted(set(cls.model_fields) - cls.sections().keys()), f"{cls.__name__}.CHANGES: {said}"

    @classmethod
    def sections(cls) -> dict[str, type["Section"]]:
        """The keys that are sections."""
        kinds = {name: (field.annotation, *get_args(field.annotation)) for name, field in cls.model_fields.items()}
        return {
            name: kind
            for name, union in kinds.items()
            for kind in union
            if isinstance(kind, type) and issubclass(kind, Section)
        }


class ModelConfig(Section):
    """The network to start from."""

    CHANGES = {"result": "path revision weights dtype quantize", "numerics": "device"}

    path: PathText
    """Checkpoint: a directory or a Hub id, such as google/paligemma-3b-pt-224."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub id."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random: seeded initial weights made from config.json alone."""
    dtype: Annotated[Literal["bfloat16", "float32"], BeforeValidator(_refuse_float16)] = "bfloat16"
    """Type of the base weights and of the arithmetic. Adapters are float32 always."""
    quantize: Literal["nf4"] | None = None
    """nf4: keep the decoder's frozen weights in four bits (needs bitsandbytes); null: as they are."""
    device: Annotated[str, Field(pattern="^(auto|cpu|mps|cuda(:[0-9]+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto takes cuda, then mps, then cpu."""


class Source(Section):
    """Examples: from the official VQA files (questions, annotations, images), or from a jsonl file (and images)."""

    CHANGES = {"result": "questions annotations images jsonl fraction count sample_by"}

    questions: PathText | None = None
    """Official questions file (JSON)."""
    annotations: PathText | None = None
    """Official annotations file (JSON) with the answers of those questions."""
    images: PathText | None = None
    """Directory of the images."""
    jsonl: PathText | None = None
    """File of lines {"image": ..., "prefix": ..., "suffix": ...}."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Take this share of the examples, drawn with train.seed."""
    count: Count | None = None
    """Take this many examples, drawn with train.seed."""
    sample_by: Literal["image", "question"] = "image"
    """Draw whole images with all their questions, or single questions (which touches many more images)."""

    @field_validator("jsonl")
    @classmethod
    def _one_kind(cls, jsonl: str | None, info: ValidationInfo) -> str | None:
        if info.data.keys() >= {"questions", "annotations", "images"}:
            questions, annotations, images = info.data["questions"], info.data["annotations"], info.data["images"]
            if (jsonl and (questions or annotations)) or not (jsonl or (questions and images)):
                raise ValueError("expected either questions and images (and annotations), or jsonl (and images)")
        return jsonl

    @field_validator("count")
    @classmethod
    def _one_limit(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and info.data.get("fraction") is not None:
            raise ValueError(f"count ({count}) excludes fraction ({info.data['fraction']}): give one of them")
        return count


class DataConfig(Section):
    """What is learned from."""

    # What is left out changes the result only where a run could not have gone on.
    CHANGES = {
        "result": "prompt answers max_text_tokens truncate_answers",
        "nothing": "on_error skip_at_most workers",
    }

    train: Source
    """Examples to train on."""
    validation: Source | None = None
    """Examples to evaluate on."""
    prompt: Text = "answer en {question}"
    """Prompt of the official files' questions; {question} is where the question goes."""
    answers: Literal["rotate", "majority"] = "rotate"
    """rotate: another one of a question's answers at each visit; majority: the most frequent one always."""
    max_text_tokens: Annotated[int, Field(ge=3)] | Literal["auto"] = "auto"
    """The most tokens that prefix, newline, suffix and <eos> may take together; a longer record cannot be used. auto:
    what the longest one takes."""
    truncate_answers: bool = False
    """Cut the end of an answer that exceeds max_text_tokens, instead of refusing its record. A prompt is never cut."""
    on_error: Literal["fail", "skip"] = "fail"
    """When a record cannot be used (a broken picture, no answer): fail, or skip it and learn from another instead,
    and list it in OUTPUT/skipped_train.jsonl or skipped_validation.jsonl.
    """
    skip_at_most: BelowOne = 0.01
    """Share of the records that may be skipped; beyond, the run stops."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that prepare examples; 0: the training process itself."""

    @field_validator("train")
    @classmethod
    def _answered(cls, train: Source) -> Source:
        if train.questions and not train.annotations:
            raise _fault("annotations", "training needs the answers: give the annotations of questions")
        return train

    @field_validator("truncate_answers")
    @classmethod
    def _cuts_somewhere(cls, truncate_answers: bool, info: ValidationInfo) -> bool:
        if truncate_answers and info.data.get("max_text_tokens") == "auto":
            raise ValueError("answers are cut at max_text_tokens, which is auto: give it a number, such as 128")
        return truncate_answers

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str) -> str:
        if "{question}" not in prompt or "\n" in prompt:
            raise ValueError(f"expected one line that contains {{question}}, got {prompt!r}")
        return prompt


class TrainConfig(Section):
    """How it is learned. A step is one update of the weights, by batch_size examples."""

    CHANGES = {
        "result": "epochs max_steps batch_size learning_rate schedule warmup weight_decay beta1 beta2 max_grad_norm "
        "seed eval_every",
        "numerics": "micro_batch recompute",
        "nothing": "log_every save_every keep_checkpoints on_full_disk",
    }

    epochs: Positive | None = None
    """Passes over the training examples; this or max_steps."""
    max_steps: Count | None = None
    """Steps; this or epochs."""
    batch_size: Count = 64
    """Examples per step, over all micro-batches."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Examples at once on the device; memory, not the result, depends on it. auto: as the plan finds best."""
    recompute: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """The first N decoder layers are recomputed in the backward pass instead of saving their activations, for less
    memory and more time; 0: none. auto: as few as the plan finds necessary."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up: down to 0, or constant."""
    warmup: BelowOne = 0.05
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    beta1: BelowOne = 0.9
    """Decay of the running mean of the gradient."""
    beta2: BelowOne = 0.999
    """Decay of the running mean of its square."""
    max_grad_norm: Positive = 1.0
    """Norm to which larger gradients are clipped."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of sampling, order, adapter start, dropout and random weights."""
    log_every: Count = 10
    """Steps between lines in metrics.jsonl."""
    save_every: Count = 100
    """Steps between checkpoints."""
    eval_every: Count | None = None
    """Steps between evaluations on data.validation; null: none during training."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep."""
    on_full_disk: Literal["stop", "go_on"] = "stop"
    """When a checkpoint finds no room: stop the run, or go on without it. Those before it stand in either case. A
    result that finds none always stops the run."""

    @field_validator("max_steps")
    @classmethod
    def _one_length(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and info.data["epochs"] is None and max_steps is None:
            raise ValueError("neither epochs nor max_steps is given: how long is the run? Give one, such as epochs: 3")
        if "epochs" in info.data and info.data["epochs"] is not None and max_steps is not None:
            raise ValueError(
                f"got {max_steps} with epochs {info.data['epochs']}; expected one of the two, null the other"
            )
        return max_steps

    @field_validator("micro_batch")
    @classmethod
    def _part_of_batch(cls, micro_batch: int | Literal["auto"], info: ValidationInfo) -> int | Literal["auto"]:
        if micro_batch != "auto" and micro_batch > info.data.get("batch_size", micro_batch):
            raise ValueError(f"micro_batch ({micro_batch}) must not exceed batch_size ({info.data['batch_size']})")
        return micro_batch


class MemoryConfig(Section):
    """What the plan may count on."""

    CHANGES = {"numerics": "budget_gib"}

    budget_gib: Positive | None = None
    """GiB that the run may take on its device; null: what is free there."""


class EvaluationConfig(Section):
    """How answers are generated, during training and afterwards."""

    CHANGES = {"result": "count max_new_tokens", "numerics": "batch_size"}

    count: Count | None = 512
    """Validation questions answered at each evaluation during training; null: all."""
    batch_size: Count = 16
    """Questions at once on the device."""
    max_new_tokens: Count | Literal["auto"] = "auto"
    """The most tokens of a generated answer. auto: as many as the longest answer in data.train has, <eos> included."""


class TrackingConfig(Section):
    """Weights & Biases; metrics.jsonl is written in any case."""

    CHANGES = {"nothing": "wandb project name"}

    wandb: Literal["off", "offline", "online"] = "off"
    """offline writes files to upload later."""
    project: Text = "paligemma-lora"
    """Project there."""
    name: Text | None = None
    """Name of the run there; null: the name of the output directory."""


class RunConfig(Section):
    """Everything that defines a run."""

    CHANGES = {"result": "lora", "nothing": "output"}

    model: ModelConfig
    data: DataConfig
    lora: LoRAConfig | None = LoRAConfig()
    """The adapter; null: all parameters are trained, without one."""
    train: TrainConfig
    memory: MemoryConfig = MemoryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: PathText
    """Directory of the run, such as runs/NAME."""
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("lora")
    @classmethod
    def _can_train(cls, lora: LoRAConfig | None, info: ValidationInfo) -> LoRAConfig | None:
        if lora is None and "model" in info.data and info.data["model"].quantize:
            raise ValueError("null trains the base weights themselves, and packed ones (model.quantize) cannot be")
        return lora

    @field_validator("train")
    @classmethod
    def _can_evaluate(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if train.eval_every and "data" in info.data:
            validation = info.data["data"].validation
            if validation is None or (validation.questions and not validation.annotations):
                raise _fault("eval_every", "evaluating needs data.validation, with annotations where it has questions")
        return train


def what_changes(key: str) -> str:
    """What another value of a dotted key changes in a run: "result", "numerics" (rounding) or "nothing"."""
    section: type[Section] = RunConfig
    *above, name = key.split(".")
    for place, part in enumerate(above):
        if part not in section.sections():
            name = above[place]  # within a value that declares for all of it, such as lora
            break
        section = section.sections()[part]
    return next((kind for kind, names in section.CHANGES.items() if name in names.split()), "result")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a YAML file with overrides `section.key=value` laid over it. ConfigError lists all problems."""
    try:
        document = strict_yaml.Document(Path(path).read_bytes(), str(path), count_lines=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    for override in overrides:
        try:
            for keys, value in parse_overrides([override]).items():
                document.lay_over(keys, value, f"override {override!r}")
        except ConfigError as error:
            document.faults.append(str(error))
    lora = document.data.get("lora") if isinstance(document.data, dict) else None
    if isinstance(lora, dict) and isinstance(lora.get("start_from"), str):
        try:
            document.data["lora"] = start_from.complete(lora)
        except ValueError as error:
            document.fault(("lora", "start_from"), str(error))
    try:
        config = RunConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        explained: set[tuple[str | int, ...]] = set()
        errors = error.errors(include_url=False)
        misspelt = {details["loc"][:-1] for details in errors if details["type"] == "extra_forbidden"}
        for details in errors:
            above = details["loc"][:-1]
            if details["type"] == "value_error" and above in misspelt and details["loc"] not in document.origins:
                continue  # of a key that is not there, in a section with one that is not known: perhaps the same key
            within = (details["ctx"]["key"],) if details["type"] == "fault" else ()
            place = _without_alternative(details["loc"] + within)
            if place not in explained:
                document.fault(place, _explain(place, details))
            explained.add(place)
    if document.faults:
        raise ConfigError("\n".join(document.faults))
    return config


def parse_overrides(overrides: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """`["data.train.count=100"]` -> `{("data", "train", "count"): 100}`. Values are YAML: `lora=null`, `key=[a, b]`."""
    values: dict[tuple[str, ...], Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+){,9}", name):
            raise ConfigError(f"override {override!r}: expected section.key=value, such as train.max_steps=100")
        document = strict_yaml.Document(text, f"override {override!r}")
        if document.faults:
            raise ConfigError("\n".join(document.faults))
        values[tuple(name.split("."))] = document.data
    return values


def dump_config(config: RunConfig) -> str:
    """YAML with every key, which loads to an equal configuration."""
    return strict_yaml.dump(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema of the file, for editors that complete and check."""
    return RunConfig.model_json_schema()


def describe() -> str:
    """Help: every key with its type, default and meaning."""
    lines = []
    for name, field in _fields().items():
        default = f" = {json.dumps(field['default'])}" if "default" in field and "properties" not in field else ""
        lines.append(f"{name}: {_kind(field)}{' (required)' if field['required'] else default}")
        lines.append(indent(fill(field["description"], 110), "    "))
    return "\n".join(lines)


@cache
def _fields() -> dict[str, dict[str, Any]]:
    """Dotted name of every key -> its JSON schema (of a section: the section's too) and whether it is `required`."""
    schema = json_schema()

    def below(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, field in section["properties"].items():
            refs = [part["$ref"] for part in (field, *field.get("anyOf", ())) if "$ref" in part]
            inner = schema["$defs"][refs[0].rpartition("/")[2]] if refs else {}
            yield prefix + name, inner | field | {"required": name in section.get("required", ())}
            if refs:
                yield from below(inner, f"{prefix}{name}.")

    return dict(below(schema, ""))


def _kind(field: Mapping[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "anyOf" in field:
        return " or ".join(_kind(part) for part in field["anyOf"])
    if "$ref" in field:
        return "section"
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return " | ".join(field["enum"])
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if field["type"] == "object":
        return f"mapping of names to {_kind(field['additionalProperties'])}"
    word = {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(field["type"], field["type"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "pattern": "matching"}
    limits = [f"{sign} {field[limit]}" for limit, sign in signs.items() if limit in field]
    return f"{word} {', '.join(limits)}".strip()


def _without_alternative(keys: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The key alone, where pydantic adds which of a key's alternatives a value fails to be."""
    field = _fields().get(".".join(map(str, keys[:-1])), {})
    return keys[:-1] if "anyOf" in field and "properties" not in field and field.get("type") != "array" else keys


def _explain(keys: tuple[str | int, ...], details: ErrorDetails) -> str:
    """One of pydantic's errors in words: what was given, what was expected, what may have been meant."""
    fields, name, given = _fields(), ".".join(map(str, keys)), details.get("input")
    if details["type"] == "missing":
        return f"required, but not given: {fields[name]['description']}"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        siblings = [key.rpartition(".")[2] for key in fields if key.rpartition(".")[0] == name.rpartition(".")[0]]
        elsewhere = [key for key in fields if key.rpartition(".")[2] == keys[-1]]
        meant = elsewhere or difflib.get_close_matches(str(keys[-1]), siblings, 1)
        return "unknown key; " + (f"did you mean {' or '.join(meant)}?" if meant else f"expected {', '.join(siblings)}")
    if details["type"] in ("fault", "value_error"):
        return details["msg"].removeprefix("Value error, ")
    expected = details["msg"].removeprefix("Input should be ")
    if name in fields:
        expected = _kind(fields[name])
        meant = difflib.get_close_matches(str(given), fields[name].get("enum", ()), 1)
        expected += f"; did you mean {meant[0]}?" if meant else ""
        expected += ", in quotes" if "text" in expected and isinstance(given, bool | int | float | dict) else ""
    return f"got {json.dumps(given, ensure_ascii=False)[:200]}; expected {expected}"
