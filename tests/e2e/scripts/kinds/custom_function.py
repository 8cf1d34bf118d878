"""A quantizer with a straight-through gradient: a custom autograd.Function inside a convolutional network."""

import torch
from torch import nn


class Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, levels):
        ctx.save_for_backward(x)
        return torch.round(x.clamp(-1, 1) * levels) / levels

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1), None


class QuantizedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, x):
        x = Quantize.apply(self.norm(self.conv(x)), 7)
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


torch.manual_seed(3)
images, labels = torch.rand(96, 1, 8, 8), torch.randint(0, 4, (96,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 16, shuffle=True)
model = QuantizedNet()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
for epoch in range(4):
    for image, label in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        print(repr(loss.item()))
torch.save(model.state_dict(), "checkpoint.pt")
