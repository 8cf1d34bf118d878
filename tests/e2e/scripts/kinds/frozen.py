"""Fine-tuning: a frozen backbone in evaluation mode and a new head; later the last block is thawed."""

import torch
from torch import nn

torch.manual_seed(0)
backbone = nn.Sequential(
    nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
    nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    nn.Flatten(),
)
head = nn.Linear(16, 3)
model = nn.Sequential(backbone, head)
for parameter in backbone.parameters():
    parameter.requires_grad = False
optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2)
images, labels = torch.rand(96, 3, 16, 16), torch.randint(0, 3, (96,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 16, shuffle=True)

for epoch in range(4):
    if epoch == 2:
        for parameter in backbone[1].parameters():
            parameter.requires_grad = True
        optimizer.add_param_group({"params": backbone[1].parameters(), "lr": 1e-3})
    model.train()
    backbone.eval()
    for image, label in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        print(epoch, repr(loss.item()))
torch.save(model.state_dict(), "checkpoint.pt")
