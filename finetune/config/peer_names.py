"""Keys of PEFT, Hugging Face's TrainingArguments, TRL, axolotl, LLaMA-Factory and unsloth -> our keys that mean the
same, and what the value becomes where it is another quantity. `describe.py` answers an unknown key with them.

A name counts wherever it is unknown: at the top of a file, in one of our sections, and in a section that only the peers
have, such as `training_args`. One with a dot counts at that place alone. Not here: our own keys at a wrong place.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """What a key of the peers is in this project."""

    keys: tuple[str, ...]
    """Our keys with the same meaning; none: the project has no such choice."""
    note: str = ""
    """What the value becomes; without keys: why there is none, and what to do."""

    def __str__(self) -> str:
        if not self.keys:
            return self.note
        return f"did you mean {' or '.join(self.keys)}{self.note and f' ({self.note})'}?"


_ACCUMULATION = (
    "a step takes train.batch_size examples, so on one device accumulation steps = train.batch_size / train.micro_batch"
)
_AT_ONCE = "examples at once on the device; a step takes train.batch_size examples, over all micro-batches"
_STEPS = "a number of steps"
_TOKENS = "tokens of prefix and suffix together; those of the image do not count"
_TARGETS = "a list of SCOPE.COMPONENT, such as language.q_proj; all-linear is [language.*, vision.*, connector.*]"
_LAYERS = "a number of decoder layers; auto takes as few as necessary"
_SOURCE = "jsonl, parquet, disk or hub; or questions, annotations and images"

# Names that peers use; our keys; note.
ROWS = (
    # The base
    ("base_model model_name_or_path model_name pretrained_model_name_or_path model_id", "model.path", ""),
    ("model.name model.id model.name_or_path", "model.path", ""),
    ("model_revision base_model_revision", "model.revision", ""),
    ("bf16 torch_dtype mixed_precision precision bnb_4bit_compute_dtype", "model.dtype", "bfloat16 or float32"),
    ("fp16 float16 half", "model.dtype", "bfloat16 or float32: Gemma's activations overflow in float16"),
    ("load_in_4bit quantization_bit quantization bnb_4bit_quant_type", "model.quantize", "nf4: four bits"),
    ("quantization_config bnb_config bitsandbytes", "model.quantize", "nf4: four bits"),
    ("bnb_4bit_use_double_quant", "", "the scales of nf4 (model.quantize) are always quantised too: leave it out"),
    ("load_in_8bit", "model.quantize", "nf4: four bits; there are no eight"),
    ("device_map use_cpu no_cuda", "model.device", "auto, cpu, cuda, cuda:N or mps"),
    ("trust_remote_code", "", "no code of a checkpoint is ever run: leave it out"),
    (
        "attn_implementation flash_attention flash_attn",
        "",
        "there is one attention, which needs no choice: leave it out",
    ),
    ("image_resolution image_max_pixels resolution", "image.size", "height and width in pixels"),
    # The adapter
    ("r lora_r lora_rank", "lora.rank", ""),
    ("lora_alpha", "lora.alpha", ""),
    ("lora_dropout", "lora.dropout", ""),
    ("target_modules lora_target lora_target_modules lora_target_linear", "lora.targets", _TARGETS),
    ("layers_to_transform", "lora.targets", "language.17.* is all of layer 17"),
    ("finetune_vision_layers freeze_vision_tower", "lora.targets", "with vision.* the vision tower is adapted too"),
    ("finetune_language_layers", "lora.targets", "language.* is the decoder"),
    ("freeze_multi_modal_projector", "lora.targets", "with connector.* the projector is adapted too"),
    ("lora_modules_to_save additional_target", "lora.modules_to_save", ""),
    ("use_rslora", "lora.rslora", ""),
    ("lora_model_dir adapter_name_or_path", "lora.start_from", ""),
    ("adapter finetuning_type", "lora", "the section trains an adapter; lora: null trains all parameters"),
    ("use_dora", "", "DoRA is not implemented, rank-stabilised scaling (lora.rslora) is: leave it out"),
    ("init_lora_weights", "", "A is drawn and B is zero, unless lora.start_from names an adapter: leave it out"),
    ("loraplus_lr_ratio", "", "A and B have one learning rate, train.learning_rate: leave it out"),
    ("bias", "", "the biases of adapted linears stay frozen: leave it out"),
    ("peft_type task_type", "", "an adapter is always LoRA, and the task to generate the suffix: leave it out"),
    ("mm_projector_lr projector_lr", "connector.learning_rate", ""),
    # Examples
    ("datasets dataset train_dataset dataset_name dataset_path data_path data_files", "data.train", _SOURCE),
    ("train_file train_data", "data.train", _SOURCE),
    ("eval_dataset validation_dataset test_datasets eval_file validation_file", "data.validation", _SOURCE),
    ("data.eval data.val data.test val", "data.validation", _SOURCE),
    ("val_set_size val_size", "data.validation", "auto holds out a tenth of the images of data.train"),
    (
        "interleave_probs interleave_probabilities mixture_weights sampling_weights dataset_weights",
        "data.train",
        "a list of sources, each with a weight",
    ),
    ("dataset_dir image_dir image_folder images_dir media_dir", "data.train.images", "a directory"),
    ("max_samples max_train_samples", "data.train.count", ""),
    ("max_eval_samples", "evaluation.count", "or data.validation.count, to have no more of them"),
    (
        "max_seq_length max_seq_len max_length sequence_len cutoff_len model_max_length",
        "data.max_text_tokens",
        _TOKENS,
    ),
    ("dataloader_num_workers num_workers preprocessing_num_workers dataset_num_proc", "data.workers", ""),
    ("prompt_template template", "data.prompt", "such as answer en {question}"),
    ("packing sample_packing", "", "examples are not packed: leave it out"),
    (
        "train_on_inputs completion_only_loss assistant_only_loss",
        "",
        "the loss is that of the suffix alone: leave it out",
    ),
    # Training
    ("lr learning_rate", "train.learning_rate", ""),
    ("gradient_accumulation_steps grad_accum_steps accumulate_grad_batches", "train.micro_batch", _ACCUMULATION),
    ("per_device_train_batch_size per_gpu_train_batch_size micro_batch_size", "train.micro_batch", _AT_ONCE),
    ("auto_find_batch_size", "train.micro_batch", "auto, the default, finds it"),
    (
        "train_batch_size global_batch_size effective_batch_size",
        "train.batch_size",
        "examples per step, over all micro-batches",
    ),
    ("num_train_epochs num_epochs max_epochs", "train.epochs", ""),
    ("max_train_steps num_train_steps total_steps", "train.max_steps", ""),
    ("warmup_ratio lr_warmup_ratio", "train.warmup", ""),
    ("warmup_steps lr_warmup_steps num_warmup_steps", "train.warmup", "as a share of all steps, such as 0.05"),
    ("lr_scheduler_type lr_scheduler scheduler", "train.schedule", "cosine, linear or constant"),
    ("adam_beta1", "train.beta1", ""),
    ("adam_beta2", "train.beta2", ""),
    ("neftune_noise_alpha label_smoothing_factor group_by_length", "", "not implemented: leave it out"),
    ("adam_epsilon", "", "AdamW has PyTorch's epsilon: leave it out"),
    ("gradient_clipping gradient_clip_val clip_grad_norm max_norm", "train.max_grad_norm", ""),
    (
        "optim optimizer",
        "",
        "AdamW is the only optimizer, and train.learning_rate its learning rate: leave it out",
    ),
    ("gradient_checkpointing use_gradient_checkpointing activation_checkpointing", "train.recompute", _LAYERS),
    ("gradient_checkpointing_kwargs", "train.recompute", _LAYERS),
    ("seed data_seed random_state random_seed", "train.seed", ""),
    ("save_steps save_strategy save_interval", "train.save_every", _STEPS),
    ("eval_steps eval_strategy evaluation_strategy", "train.eval_every", _STEPS),
    ("logging_steps log_steps logging_strategy log_interval", "train.log_every", _STEPS),
    ("save_total_limit", "train.keep_checkpoints", ""),
    (
        "load_best_model_at_end metric_for_best_model",
        "train.eval_every",
        "the step with the best metric of its task is kept",
    ),
    ("early_stopping_patience early_stopping patience", "train.patience", "in evaluations"),
    ("do_train do_eval", "train.eval_every", "train.py trains, and evaluates every so many steps"),
    ("resume_from_checkpoint auto_resume_from_checkpoints", "", "a run resumes by itself, or from --resume CHECKPOINT"),
    ("deepspeed fsdp", "", "several processes are the launcher's: accelerate launch (configs/accelerate)"),
    # Preferences
    ("beta pref_beta dpo_beta simpo_beta rl_beta", "preference.beta", ""),
    ("loss_type pref_loss dpo_loss", "preference.loss", "sigmoid, hinge or ipo"),
    ("dpo_label_smoothing label_smoothing", "preference.label_smoothing", "of the loss sigmoid"),
    ("rpo_alpha pref_ftx", "preference.rpo_alpha", "0: none"),
    ("ref_model ref_adapter_name ref_model_name_or_path", "train.reference", "start, base, or an adapter's directory"),
    ("precompute_ref_log_probs precompute_ref_logps", "preference.precompute", ""),
    ("rl rlhf_type stage trainer_type", "train.objective", "dpo, reward, or supervised"),
    ("dpo dpo_config preferences", "preference", ""),
    # Rewards
    ("num_generations rloo_k", "reward.samples", "answers drawn of each example"),
    ("kl_coef", "reward.kl", ""),
    ("max_completion_length response_length max_new_tokens", "evaluation.max_new_tokens", "also of drawn answers"),
    ("rloo rloo_config reward_funcs", "reward", "what an answer is worth is the metric of the task (data.train.task)"),
    # Evaluation
    ("per_device_eval_batch_size eval_batch_size", "evaluation.batch_size", ""),
    ("generation_max_length", "evaluation.max_new_tokens", "tokens of the answer alone"),
    # Output
    ("output_dir", "output", ""),
    ("overwrite_output_dir", "output", "a directory that does not exist starts a new run"),
    ("report_to", "tracking.wandb tracking.tensorboard", "offline or online for the first, true for the second"),
    ("use_wandb wandb_mode", "tracking.wandb", "off, offline or online"),
    ("wandb_project", "tracking.project", ""),
    ("run_name wandb_name wandb_run_name", "tracking.name", ""),
    ("logging_dir", "tracking.tensorboard", "true writes to the run's directory"),
    ("push_to_hub hub_model_id", "", "a finished run is pushed by: python -m finetune push RUN --repo OWNER/NAME"),
    # Whole sections
    ("training_args training_arguments training trainer hyperparameters sft sft_config", "train", ""),
    ("peft peft_config lora_config adapter_config", "lora", ""),
    ("model_args model_config", "model", ""),
    ("data_args dataset_args data_config", "data", ""),
    ("eval generation generation_config", "evaluation", ""),
    ("logging tracker", "tracking", ""),
)

PEER_NAMES = {name: Counterpart(tuple(ours.split()), note) for names, ours, note in ROWS for name in names.split()}

# Our key -> values that peers give it, and what they are here.
PEER_VALUES = {
    "lora.targets": {
        "all-linear": "[language.*, vision.*, connector.*] (or [language.*], which is the decoder alone)",
        "all": "[language.*, vision.*, connector.*]",
    },
}
