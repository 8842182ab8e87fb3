"""`train.py --overfit N`: whether a few examples can be learned at all."""

from __future__ import annotations

from functools import partial

from data import PaliGemmaDataset, collate
from finetune.config.schema import RunConfig
from finetune.evaluation.evaluate import generate_answers
from finetune.preflight.plan import plan_run
from finetune.preflight.probe import learn_by_heart, trial_config
from finetune.system.console import new_table, show
from finetune.training.examples import open_examples, open_processor
from finetune.training.setup import adapt, open_model, show_trained
from model import PaliGemmaConfig, fetch


def overfit(config: RunConfig, count: int) -> None:
    """Whether learning works at all: the first examples, learned by heart. Nothing is written.

    Raises:
        ValueError: it does not; says what to look at.
    """
    config = trial_config(config, count)
    directory = fetch(config.model.path, config.model.revision)
    processor = open_processor(directory, config.data)
    examples = open_examples(config, "train", processor)
    records = examples.valid
    if not 0 < count <= len(records):
        raise ValueError(f"--overfit {count}: expected 1 to {len(records):,}, the examples of data.train")
    _, plan, _ = plan_run(config, PaliGemmaConfig.from_directory(directory), examples.longest)
    model = open_model(directory, config)
    records = records.select(range(count))
    dataset = PaliGemmaDataset(records, processor, config.data.answers, skipped=examples.skipped)
    adapt(model, config)
    show_trained(model)
    wanted = [
        example["input_ids"][example["token_type_ids"] == 1] for example in map(dataset.__getitem__, range(count))
    ]

    def ask() -> list[tuple[str, str, str]]:
        answers = generate_answers(model, processor, records, max(map(len, wanted)), config.evaluation.batch_size)
        texts = (processor.decode(ids) for ids in wanted)
        return list(zip(records["question"], texts, (answer.text for answer in answers.values()), strict=True))

    trial = learn_by_heart(config, model, dataset, plan.mode, partial(collate, pad_id=processor.pad_id), ask)
    table = new_table("question", "wanted", "answered")
    for row in trial.rows:
        table.add_row(*row)
    show(table)
    found = (
        f"{trial.right} of {count} answered as wanted after {len(trial.losses)} steps, loss {trial.losses[0]:.3f} -> "
        f"{trial.losses[-1]:.3f}"
    )
    if not trial.learned:
        raise ValueError(
            f"it has not learned them: {found}. Look at train.learning_rate ({config.train.learning_rate}), at "
            "lora.targets (what is trained is listed above), and with --inspect at the examples"
        )
    show(f"it learns: {found}")
