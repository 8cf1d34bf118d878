"""Hugging Face Trainer: a small BERT from its configuration, accumulation, evaluation, checkpoints."""

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed,
)  # fmt: skip


class Sentences(Dataset):
    def __init__(self, size, seed):
        draw = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 50, (size, 12), generator=draw)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index, 0] % 2}


class Say(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print({name: repr(value) for name, value in logs.items() if "loss" in name or "accuracy" in name})


set_seed(0)
config = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
)
arguments = TrainingArguments(
    "out", num_train_epochs=2, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-3,
    logging_steps=1, eval_strategy="epoch", save_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True,
)  # fmt: skip
model = BertForSequenceClassification(config)
trainer = Trainer(
    model, arguments, train_dataset=Sentences(160, 1), eval_dataset=Sentences(32, 2), callbacks=[Say()],
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
)  # fmt: skip
trainer.remove_callback(PrinterCallback)  # it prints times
trainer.train()
torch.save(model.state_dict(), "checkpoint.pt")
