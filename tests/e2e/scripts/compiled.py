"""A model the script compiles itself, and a compiled function that calls a model."""

import torch
from torch import nn

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x) + x.sum())


model = Net()
compiled = torch.compile(model, backend="aot_eager")
whole = torch.compile(nn.Sequential(nn.Linear(6, 1)), backend="aot_eager")


@torch.compile(backend="aot_eager", fullgraph=True)
def loss_of(x, y):
    return nn.functional.mse_loss(model(x), y)


optimizer = torch.optim.Adam([*model.parameters(), *whole.parameters()])
for _ in range(4):
    x, y = torch.randn(5, 6), torch.randn(5, 1)
    loss = nn.functional.mse_loss(compiled(x), y) + loss_of(x, y) + whole(x).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(repr(loss.item()))
print(list(compiled.state_dict())[:1], torch._dynamo.utils.counters["stats"])
print(dict(torch._dynamo.utils.counters["graph_break"]))
