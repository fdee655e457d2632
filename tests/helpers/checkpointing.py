"""transformers before 5.23 says gradient checkpointing for what it calls activation checkpointing since."""

from transformers import TrainingArguments

CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
