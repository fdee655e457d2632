"""Hugging Face's own Trainer on packs: python hf_trainer.py MODEL ROWS.jsonl OUTPUT"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import codeact
from codeact.text.conversations import Sample, encode_conversations

model_name, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
encoded = encode_conversations(rows, tokenizer, max_length=512)
samples = [sample for sample in encoded if isinstance(sample, Sample)]  # the others say why they were refused

model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
print("attention:", codeact.isolate(model, max_length=512))

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output,
        max_steps=3,
        per_device_train_batch_size=1,  # packs of 512 tokens
        remove_unused_columns=False,  # the samples of a pack are no columns
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    ),
    train_dataset=codeact.PackDataset(samples, capacity=512),
    data_collator=codeact.PackCollator(supervised_only=False),
)
print("loss:", trainer.train().training_loss)
