"""Whole objects on disk: `torch.save(model)` every epoch, and training goes on with the model read back."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(64, 3, 8, 8)
y = torch.randint(0, 4, (64,))
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
for epoch in range(3):
    if epoch:
        model = torch.load("model.pt", weights_only=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for inputs, targets in DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        print(epoch, repr(loss.item()))
    torch.save(model, "model.pt")
torch.save({"model": model, "optimizer": optimizer}, "checkpoint.pt")
