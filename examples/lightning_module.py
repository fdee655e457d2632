"""A LightningModule on packs, without logits: python lightning_module.py MODEL ROWS.jsonl"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import codeact
from codeact.text.conversations import Sample, encode_conversations


class Packed(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").train()
        codeact.isolate(self.model, max_length=512)
        self.fused = codeact.fuse_loss(self.model)  # False where the head is no plain linear layer

    def training_step(self, batch, _):
        count = int((batch["shift_labels"] != -100).sum())
        extra = {"fused_loss": True} if self.fused else {}
        loss = self.model(**batch, num_items_in_batch=count, **extra).loss  # a mean over the answers' tokens
        self.log("loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class NewPacks(lightning.Callback):
    def on_train_epoch_start(self, trainer, module):
        trainer.train_dataloader.dataset.set_epoch(trainer.current_epoch)  # packed and shuffled anew


model_name, rows = sys.argv[1:]
encoded = encode_conversations(rows, AutoTokenizer.from_pretrained(model_name), max_length=512)
samples = [sample for sample in encoded if isinstance(sample, Sample)]
module = Packed(model_name)
dataset = codeact.PackDataset(samples, capacity=512)
loader = DataLoader(dataset, batch_size=1, shuffle=True, collate_fn=codeact.PackCollator(supervised_only=module.fused))
trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    callbacks=[NewPacks()],
)  # fmt: skip
trainer.fit(module, loader)
print(f"loss {trainer.callback_metrics['loss']:.4f}, {len(dataset)} packs of {len(samples)} samples")
