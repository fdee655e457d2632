"""TRL's SFTTrainer with codeact's planner: python trl_sft.py MODEL ROWS.jsonl OUTPUT"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import codeact.integrations.trl

codeact.integrations.trl.install()  # from here on TRL packs with it: the same packs, in a fraction of the time

model_name, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
records = codeact.open_records(rows, codeact.Columns(question="instruction", answer="output"))
texts = [{"prompt": row.question, "completion": row.answer} for row in records if isinstance(row, codeact.Record)]

model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
codeact.isolate(model, max_length=512)  # TRL itself keeps the samples of a pack apart with FlashAttention only

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output,
        max_steps=2,
        per_device_train_batch_size=1,
        max_length=512,
        packing=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=Dataset.from_list(texts),
    processing_class=tokenizer,
)
print("packs:", len(trainer.train_dataset))
print("loss:", trainer.train().training_loss)
