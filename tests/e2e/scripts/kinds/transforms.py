"""Random augmentation in the dataset, with torch's and Python's random numbers, and no workers."""

import random

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Augmented(Dataset):
    def __init__(self):
        self.images, self.labels = torch.rand(80, 3, 12, 12), torch.randint(0, 5, (80,))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if random.random() < 0.5:
            image = image.flip(-1)
        top, left = torch.randint(0, 5, (2,)).tolist()
        image = nn.functional.pad(image, (2, 2, 2, 2))[:, top : top + 12, left : left + 12]
        return image + 0.05 * torch.randn_like(image), self.labels[index]


torch.manual_seed(0)
random.seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
loader = DataLoader(Augmented(), batch_size=10, shuffle=True)
for epoch in range(3):
    for image, label in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        print(epoch, repr(loss.item()))
torch.save(model.state_dict(), "checkpoint.pt")
