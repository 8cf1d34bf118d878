"""Accelerate: prepare, accumulate, clip, a scheduler, gather for the metric, save. For `accelerate launch`, or alone."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
set_seed(0)
x = torch.randn(192, 16)
y = (x[:, 0] > 0).long()
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
train, test = TensorDataset(x[:128], y[:128]), TensorDataset(x[128:], y[128:])
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=24)
model, optimizer, loader, held_out, scheduler = accelerator.prepare(
    model, optimizer, DataLoader(train, 8, shuffle=True), DataLoader(test, 32), scheduler
)
for epoch in range(3):
    model.train()
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        sys.stdout.write(f"{accelerator.process_index} {epoch} {loss.item()!r}\n")
        sys.stdout.flush()
    model.eval()
    right = 0
    for inputs, targets in held_out:
        with torch.no_grad():
            predicted = model(inputs).argmax(-1)
        predicted, targets = accelerator.gather_for_metrics((predicted, targets))
        right += (predicted == targets).sum().item()
    accelerator.print(f"epoch {epoch}: eval accuracy: {right / len(test):.4f}")
accelerator.wait_for_everyone()
accelerator.save(accelerator.unwrap_model(model).state_dict(), "checkpoint.pt")
accelerator.end_training()
