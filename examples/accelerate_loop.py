"""A plain loop with accelerate, on packs, without logits: python accelerate_loop.py MODEL ROWS.jsonl"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import codeact
from codeact.text.conversations import Sample, encode_conversations

model_name, rows = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
encoded = encode_conversations(rows, tokenizer, max_length=512)
samples = [sample for sample in encoded if isinstance(sample, Sample)]

model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32").train()
codeact.isolate(model, max_length=512)
fused = codeact.fuse_loss(model)  # False where the head is no plain linear layer
dataset = codeact.PackDataset(samples, capacity=512)
loader = DataLoader(dataset, batch_size=1, shuffle=True, collate_fn=codeact.PackCollator(supervised_only=fused))

accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(2):
    dataset.set_epoch(epoch)  # packed and shuffled anew
    for batch in loader:
        count = int((batch["shift_labels"] != -100).sum())
        extra = {"fused_loss": True} if fused else {}
        loss = model(**batch, num_items_in_batch=count, **extra).loss  # a mean over the answers' tokens
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.4f}, {len(dataset)} packs of {len(samples)} samples")
