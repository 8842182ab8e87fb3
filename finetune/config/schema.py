"""One YAML file is one run: its keys, their types, defaults and meaning, and which of them exclude each other.

Sections are frozen pydantic models that refuse unknown keys and convert nothing: true is no 1, "8" no 8; only a whole
number stands for a float. A key whose change a run may be resumed with says so in its type (`Effect`). Help and the
JSON schema for editors come from the models (`describe.py`). Not here: reading a file (`load.py`), whether paths exist,
whether a run fits.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from finetune.config.section import BelowOne, Count, CountOrZero, Effect, PathText, Positive, Section, Text, error_at
from finetune.config.source import Source, Sources, SourcesOrAuto
from finetune.lora.config import LoRAConfig

CONNECTOR = "connector.*"  # a target: all of it
SPLITS = ("train", "validation")  # of the data


def _refuse_float16(value: object) -> object:
    if value in ("float16", "fp16", "half"):
        reason = "Gemma's activations overflow in fp16; use bfloat16, or float32 on a card without bfloat16"
        raise ValueError(f"{value} is refused: {reason}")
    return value


class ModelConfig(Section):
    """The network to start from."""

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
    connector: Literal["linear", "mlp", "dense_sci", "dense_dci", "resampler", "pixel_shuffle"] | None = None
    """What is between vision tower and decoder. One that is named is trained in full, beside the adapters, and put in
    the place of the checkpoint's where that is the published linear one. null: the checkpoint's own, as lora says.
    """
    device: Annotated[str, Field(pattern="^(auto|cpu|mps|cuda(:[0-9]+)?)$"), Effect.NUMERICS] = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto takes cuda, then mps, then cpu."""


class ConnectorOptions(Section):
    """How the connector that model.connector names is made and trained."""

    learning_rate: Positive | None = None
    """Peak learning rate of what is trained of the connector; null: train.learning_rate."""
    start: Literal["pretrained", "random"] = "pretrained"
    """pretrained: take from the checkpoint's projector what it determines: for linear, mlp and dense ones everything,
    so that training starts at the pretrained network. random: draw all of it.
    """
    start_from: PathText | None = None
    """Directory of an adapter, or of a run, with the same connector, whose values training starts with."""
    latents: Count = 64
    """resampler: learned queries, and so tokens of an image."""
    depth: Count = 3
    """resampler: layers."""
    factor: Annotated[int, Field(ge=2)] = 2
    """pixel_shuffle: a square of factor x factor patches becomes one token; 2 and 4 are usual."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Of what is drawn; null: train.seed."""


class ImageOptions(Section):
    """What the vision tower sees of an image. null: as the checkpoint has it."""

    size: Count | None = None
    """Height and width in pixels, such as 336 or 448 for a checkpoint of 224: its position embedding is interpolated.
    Adapting the vision tower too (lora.targets: vision.*) lets it get used to that.
    """
    aspect: Literal["squash", "pad"] | None = None
    """How an image becomes square: squash, as published, or pad with grey."""
    tiles: Literal[1, 4] | None = None
    """4: the vision tower sees the four quarters of an image, and the whole, for five times as many image tokens."""


class DataConfig(Section):
    """What is learned from."""

    train: Sources
    """Examples to train on: a source, or a list of sources that take turns (a mixture)."""
    validation: SourcesOrAuto | None = None
    """Examples to evaluate on, likewise, each source of a list by a task of its own. auto: a tenth of the images of
    each source of data.train, drawn with train.seed, with all examples about them, which are not trained on.
    """
    prompt: Text = "answer en {question}"
    """Prompt of the official files' questions; {question} is where the question goes."""
    answers: Literal["rotate", "majority", "all"] = "rotate"
    """rotate: another one of a question's answers in each epoch; majority: the most frequent one always; all: every
    distinct one in each epoch, in one row, weighted by how many annotators gave it.
    """
    max_text_tokens: Annotated[int, Field(ge=3)] | Literal["auto"] = "auto"
    """The most tokens that prefix, newline, suffix and <eos> may take together (with answers: all, and of pairs, every
    suffix); a longer record cannot be used. auto: what the longest one takes."""
    truncate_answers: bool = False
    """Cut the end of an answer that exceeds max_text_tokens, instead of refusing its record. A prompt is never cut."""
    on_error: Annotated[Literal["fail", "skip"], Effect.NOTHING] = "fail"
    """When a record cannot be used (a broken image, no answer): fail, or skip it and learn from another instead,
    and list it in OUTPUT/skipped_train.jsonl or skipped_validation.jsonl.
    """
    skip_at_most: Annotated[BelowOne, Effect.NOTHING] = 0.01
    """Share of the records that may be skipped; where it is exceeded, the run stops."""
    workers: Annotated[CountOrZero, Effect.NOTHING] = 2
    """Processes that prepare examples; 0: the training process itself."""

    def sources(self, split: str) -> tuple[Source, ...]:
        """Those of "train" or "validation"; where that is held out of data.train, those of data.train."""
        given = getattr(self, split)
        if given == "auto":
            given = self.train
        return () if given is None else (given,) if isinstance(given, Source) else given

    def only(self, split: str) -> Source:
        """The one source of a split. ValueError where there are none, several, or those of the other split."""
        given = getattr(self, split)
        if not isinstance(given, Source):
            raise ValueError(f"data.{split} is {given!r:.100}; expected a single source")
        return given

    def places(self, split: str) -> dict[str, Source]:
        """The same by their keys: data.train, or data.train.0 and so on."""
        sources = self.sources(split)
        if len(sources) == 1 and not isinstance(getattr(self, split), tuple):
            return {f"data.{split}": sources[0]}
        return {f"data.{split}.{number}": source for number, source in enumerate(sources)}

    def title(self, split: str) -> str:
        """The names of the files or data sets of "train" or "validation"; "" where there are none."""
        listed = " and ".join(dict.fromkeys(source.title for source in self.sources(split)))
        return f"a tenth of {listed}" if getattr(self, split) == "auto" else listed

    @property
    def prompt_of_all(self) -> str | None:
        """The prompt of every training question; None where examples have prompts of their own."""
        return self.prompt if all(source.questions for source in self.sources("train")) else None

    @field_validator("train", "validation")
    @classmethod
    def _are_told_apart(cls, given: SourcesOrAuto | None, info: ValidationInfo) -> SourcesOrAuto | None:
        split = info.field_name
        if not isinstance(given, tuple):
            for key in ("name", "weight"):
                if isinstance(given, Source) and getattr(given, key) is not None:
                    raise error_at(f"{split}.{key}", "it is for a list of sources: leave it out", str(split))
            return given
        names = [source.called for source in given]
        for number, name in enumerate(names):
            if (first := names.index(name)) < number:
                both = f"data.{split}.{number} and data.{split}.{first} are both called {name}: give one of them a name"
                raise error_at(f"{split}.{number}.name", both, f"{split}.{first}.name")
        weighted = [source.weight is not None for source in given]
        if split == "validation" and any(weighted):
            key = f"{split}.{weighted.index(True)}.weight"
            raise error_at(key, "every validation source is answered in full: leave it out, or give count", split)
        if any(weighted) and not all(weighted):
            key = f"{split}.{weighted.index(False)}.weight"
            raise error_at(
                key, "another source has a weight: give each one, or none", f"{split}.{weighted.index(True)}.weight"
            )
        return given

    @field_validator("train")
    @classmethod
    def _answered(cls, train: Sources) -> Sources:
        several = isinstance(train, tuple)
        for number, source in enumerate(train if isinstance(train, tuple) else (train,)):
            if source.questions and not source.annotations:
                key = f"train.{number}" if several else "train"
                message = "training needs the answers: give the annotations of questions"
                raise error_at(f"{key}.annotations", message, f"{key}.questions")
        return train

    @field_validator("truncate_answers")
    @classmethod
    def _cuts_somewhere(cls, truncate_answers: bool, info: ValidationInfo) -> bool:
        if truncate_answers and info.data.get("max_text_tokens") == "auto":
            raise error_at(
                "truncate_answers",
                "answers are cut at max_text_tokens, which is auto: give it a number, such as 128",
                "max_text_tokens",
            )
        return truncate_answers

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str) -> str:
        if "{question}" not in prompt or "\n" in prompt:
            raise ValueError(f"expected one line that contains {{question}}, got {prompt!r}")
        return prompt


class TrainConfig(Section):
    """How it is learned. A step is one update of the weights, by batch_size examples."""

    objective: Literal["supervised", "dpo", "reward"] = "supervised"
    """supervised: the answers are learned. dpo: of each pair, to prefer the chosen answer to the rejected one (section
    preference). reward: of the answers that the network draws itself, those that the metric of the task values more
    (section reward).
    """
    reference: PathText = "start"
    """The network that dpo and reward measure gains from. start: as training starts; base: without any adapter; or the
    directory of an adapter, or of a run, with the same settings.
    """
    epochs: Positive | None = None
    """Passes over the training examples; this or max_steps."""
    max_steps: Count | None = None
    """Steps; this or epochs."""
    batch_size: Count = 64
    """Examples per step, over all micro-batches."""
    micro_batch: Annotated[Count | Literal["auto"], Effect.NUMERICS] = "auto"
    """Examples at once on the device; memory, not the result, depends on it. auto: as the plan finds best."""
    recompute: Annotated[CountOrZero | Literal["auto"], Effect.NUMERICS] = "auto"
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
    log_every: Annotated[Count, Effect.NOTHING] = 10
    """Steps between lines in metrics.jsonl."""
    save_every: Annotated[Count, Effect.NOTHING] = 100
    """Steps between checkpoints."""
    eval_every: Count | Literal["auto"] | None = "auto"
    """Steps between evaluations on data.validation. auto: those of an epoch, and at most 20 evaluations in a run; none
    where there is no data.validation. null: none during training."""
    patience: Count | None = None
    """Stop early after so many evaluations in a row without a better result; null: train to the end."""
    keep_checkpoints: Annotated[Count, Effect.NOTHING] = 2
    """Newest checkpoints to keep."""
    on_full_disk: Annotated[Literal["stop", "go_on"], Effect.NOTHING] = "stop"
    """When a checkpoint finds no room: stop the run, or continue without it. Earlier ones stay in either case. Where
    the result finds no room, the run always stops."""

    @field_validator("max_steps")
    @classmethod
    def _one_length(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and info.data["epochs"] is None and max_steps is None:
            raise error_at(
                "max_steps",
                "neither epochs nor max_steps is given: how long is the run? Give one, such as epochs: 3",
                "epochs",
            )
        if "epochs" in info.data and info.data["epochs"] is not None and max_steps is not None:
            raise error_at(
                "max_steps",
                f"got {max_steps} with epochs {info.data['epochs']}; expected one of the two, null the other",
                "epochs",
            )
        return max_steps

    @field_validator("micro_batch")
    @classmethod
    def _part_of_batch(cls, micro_batch: int | Literal["auto"], info: ValidationInfo) -> int | Literal["auto"]:
        if micro_batch != "auto" and micro_batch > info.data.get("batch_size", micro_batch):
            exceeded = f"micro_batch ({micro_batch}) must not exceed batch_size ({info.data['batch_size']})"
            raise error_at("micro_batch", exceeded, "batch_size")
        return micro_batch


class PreferenceOptions(Section):
    """How train.objective=dpo learns from pairs of a chosen and a rejected answer."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Of a pair, whose margin is by how much more the chosen answer gained over the reference than the rejected one, in
    log-probability: sigmoid, -log sigmoid(beta * margin) (DPO, arXiv 2305.18290); hinge, max(0, 1 - beta * margin)
    (SLiC, arXiv 2305.10425); ipo, (margin per token - 1 / (2 * beta))^2 (arXiv 2310.12036).
    """
    beta: Positive = 0.1
    """How closely the network is held to the reference: the larger, the closer."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round; of the loss sigmoid alone."""
    rpo_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's cross-entropy, in nats per token, which is added (RPO, arXiv 2404.19733): without
    it something else may become likelier than either answer.
    """
    precompute: Annotated[bool, Effect.NUMERICS] = True
    """Compute the reference's log-probabilities once, before the first step, and keep them in
    OUTPUT/reference.safetensors. false: at every step again, which is faster in less than an epoch.
    """

    @field_validator("label_smoothing")
    @classmethod
    def _is_smoothed(cls, label_smoothing: float, info: ValidationInfo) -> float:
        if label_smoothing and info.data.get("loss") != "sigmoid":
            message = f"got {label_smoothing:g}; only the loss sigmoid is smoothed: leave it out, or take that loss"
            raise error_at("label_smoothing", message, "loss")
        return label_smoothing


class RewardOptions(Section):
    """How train.objective=reward learns from what the network's own answers are worth, 0 to 1, by the metric of the
    task that data.train names (REINFORCE, arXiv 2302.08242).
    """

    samples: Annotated[int, Field(ge=2)] = 4
    """Answers drawn of each example in a step, of at most evaluation.max_new_tokens. Each one is compared with the mean
    of the others (RLOO, arXiv 2402.14740), so that there are two at least.
    """
    temperature: Positive = 1.0
    """They are drawn from softmax(logits / temperature), which is also what their log-probabilities are of."""
    kl: Annotated[float, Field(ge=0)] = 0.05
    """How closely the network is held to the reference: what an answer is worth less for each nat that its
    log-probability gained over the reference.
    """


class Stage(Section):
    """A part of a run that comes before it and trains the connector alone, with all else as the run has it. It is a run
    of its own in OUTPUT/stages/NAME, and the next one starts with its connector.
    """

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")]
    """Of its directory, such as align."""
    epochs: Positive | None = None
    """Passes over the training examples; this or max_steps."""
    max_steps: Count | None = None
    """Steps; this or epochs."""
    learning_rate: Positive | None = None
    """Peak learning rate; null: connector.learning_rate."""

    @field_validator("max_steps")
    @classmethod
    def _one_length(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if (max_steps is None) == (info.data.get("epochs") is None):
            given = f"got {max_steps} with epochs {info.data['epochs']}; " if max_steps else ""
            expected = "expected either max_steps or epochs, which say how long the stage is"
            raise error_at("max_steps", given + expected, "epochs")
        return max_steps


class MemoryConfig(Section):
    """What the plan may count on."""

    budget_gib: Annotated[Positive | None, Effect.NUMERICS] = None
    """GiB that the run may take on its device; null: what is free there."""


class EvaluationConfig(Section):
    """How answers are generated, during training and afterwards."""

    count: Count | None = 512
    """Validation questions answered at each evaluation during training; null: all."""
    batch_size: Annotated[Count, Effect.NUMERICS] = 16
    """Questions at once on the device."""
    max_new_tokens: Count | Literal["auto"] = "auto"
    """The most tokens of a generated answer. auto: as many as the longest answer in data.train has, <eos> included."""


class TrackingConfig(Section):
    """Weights & Biases and TensorBoard; metrics.jsonl is written in any case."""

    wandb: Annotated[Literal["off", "offline", "online"], Effect.NOTHING] = "off"
    """offline writes files to upload later."""
    project: Annotated[Text, Effect.NOTHING] = "paligemma-lora"
    """Project there."""
    name: Annotated[Text | None, Effect.NOTHING] = None
    """Name of the run there; null: the name of the output directory."""
    tensorboard: Annotated[bool, Effect.NOTHING] = False
    """Write OUTPUT/tensorboard, for TensorBoard; needs its package: pip install -e ".[tensorboard]"."""


class RunConfig(Section):
    """Everything that defines a run."""

    model: ModelConfig
    image: ImageOptions = ImageOptions()
    connector: ConnectorOptions = ConnectorOptions()
    data: DataConfig
    lora: LoRAConfig | None = LoRAConfig()
    """The adapter; null: all parameters are trained, without one."""
    stages: tuple[Stage, ...] = ()
    """What is trained before the run itself, in this order: the connector that model.connector names, alone."""
    train: TrainConfig
    preference: PreferenceOptions = PreferenceOptions()
    reward: RewardOptions = RewardOptions()
    memory: MemoryConfig = MemoryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: Annotated[PathText, Effect.NOTHING]
    """Directory of the run, such as runs/NAME."""
    tracking: TrackingConfig = TrackingConfig()

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates while it trains."""
        unanswered = any(source.questions and not source.annotations for source in self.data.sources("validation"))
        return self.data.validation is not None and not unanswered and self.train.eval_every is not None

    @property
    def learned_answers(self) -> Literal["rotate", "majority", "all", "pair", "prompt"]:
        """Which answers of a record an example of data.train has, as `PaliGemmaDataset` knows them."""
        of_objective: dict[str, Literal["pair", "prompt"]] = {"dpo": "pair", "reward": "prompt"}
        return of_objective.get(self.train.objective, self.data.answers)

    @field_validator("lora")
    @classmethod
    def _can_train(cls, lora: LoRAConfig | None, info: ValidationInfo) -> LoRAConfig | None:
        if lora is None and "model" in info.data and info.data["model"].quantize:
            raise error_at(
                "lora",
                "null trains the base weights themselves, and packed ones (model.quantize) cannot be",
                "model.quantize",
            )
        if lora and "model" in info.data and info.data["model"].connector and CONNECTOR not in lora.modules_to_save:
            return dataclasses.replace(lora, modules_to_save=(*lora.modules_to_save, CONNECTOR))
        return lora

    @field_validator("connector")
    @classmethod
    def _is_named(cls, connector: ConnectorOptions, info: ValidationInfo) -> ConnectorOptions:
        given = connector.model_dump(exclude_defaults=True, exclude={"learning_rate"})
        if given and "model" in info.data and info.data["model"].connector is None:
            key = min(given)
            raise error_at(
                f"connector.{key}",
                f"got {given[key]}, which is how a connector is made, and model.connector names none: name it, or "
                "leave this out",
                "model.connector",
            )
        return connector

    @field_validator("stages")
    @classmethod
    def _trains_a_connector(cls, stages: tuple[Stage, ...], info: ValidationInfo) -> tuple[Stage, ...]:
        names = [stage.name for stage in stages]
        if stages and "model" in info.data and info.data["model"].connector is None:
            raise error_at(
                "stages",
                f"got {', '.join(names)}; stages train the connector alone, and model.connector names none: name it, "
                "or leave stages out",
                "model.connector",
            )
        if stages and "lora" in info.data and info.data["lora"] is None:
            raise error_at(
                "stages",
                f"got {', '.join(names)}; stages train the connector beside a frozen base, and lora: null trains all "
                "of it: leave stages out, or train an adapter",
                "lora",
            )
        lora = info.data.get("lora")
        if stages and lora and lora.start_from:
            raise error_at(
                "stages",
                f"got {', '.join(names)}; stages train a new connector, and the adapter that lora.start_from names has "
                "one: leave stages out, or lora.start_from",
                "lora.start_from",
            )
        for number, name in enumerate(names):
            if (first := names.index(name)) < number:
                raise error_at(
                    f"stages.{number}.name",
                    f"got {name}, which stages.{first} is called; expected a name of its own for every stage",
                    f"stages.{first}.name",
                )
        return stages

    @field_validator("train")
    @classmethod
    def _can_evaluate(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if "data" not in info.data:
            return train
        data = info.data["data"]
        unanswered = [source for source in data.sources("validation") if source.questions and not source.annotations]
        for key in ("eval_every", "patience"):
            given = getattr(train, key)
            if given in (None, "auto") or (data.validation and not unanswered):
                continue
            raise error_at(
                f"train.{key}",
                f"evaluating needs data.validation, with annotations where it has questions; or set train.{key}=null",
                "data.validation",
                "data.validation.annotations",
                "data.validation.questions",
            )
        return train

    @field_validator("train")
    @classmethod
    def _has_what_it_compares(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if train.objective == "supervised":
            if train.reference != "start":
                raise error_at(
                    "train.reference",
                    f"got {train.reference}; nothing is compared with it where train.objective is supervised: leave it "
                    "out, or set train.objective",
                    "train.objective",
                )
            return train
        if "lora" in info.data and info.data["lora"] is None:
            raise error_at(
                "train.objective",
                f"{train.objective} compares the network with what it was, which lora: null would keep a second time: "
                "train an adapter",
                "lora",
            )
        if info.data.get("stages"):
            raise error_at(
                "stages",
                f"stages learn from answers, and train.objective is {train.objective}: train them in a run of their "
                "own, and begin with its result (lora.start_from)",
                "train.objective",
            )
        if "data" not in info.data:
            return train
        data = info.data["data"]
        if data.answers != "rotate":
            raise error_at(
                "data.answers",
                f"got {data.answers}; with train.objective={train.objective} it has no meaning: leave it out",
                "train.objective",
            )
        official = next((key for key, source in data.places("train").items() if source.questions), None)
        if official and train.objective == "dpo":
            raise error_at(
                f"{official}.questions",
                "VQA's files have no rejected answers, and train.objective=dpo learns from pairs: give pairs, such as "
                "python -m data.preferences makes from a run's answers",
                "train.objective",
            )
        return train

    @field_validator("preference", "reward")
    @classmethod
    def _is_for_its_objective(cls, options: Section, info: ValidationInfo) -> Section:
        section, given = str(info.field_name), options.model_dump(exclude_defaults=True)
        expected = {"preference": "dpo", "reward": "reward"}[section]
        if given and "train" in info.data and (objective := info.data["train"].objective) != expected:
            key = min(given)
            raise error_at(
                f"{section}.{key}",
                f"got {given[key]}, and train.objective is {objective}: set it to {expected}, or leave this out",
                "train.objective",
            )
        return options

    @model_validator(mode="after")
    def _trains_the_connector(self) -> "RunConfig":
        rate, lora = self.connector.learning_rate, self.lora
        trained = (*lora.targets, *lora.modules_to_save) if lora else (CONNECTOR,)
        if rate is not None and not any(target.startswith("connector.") for target in trained):
            raise error_at(
                "connector.learning_rate",
                f"got {rate:g}, and nothing of the connector is trained: name it (model.connector), adapt it "
                "(lora.targets), or leave the rate out",
                "model.connector",
                "lora.targets",
                "lora.modules_to_save",
            )
        return self
