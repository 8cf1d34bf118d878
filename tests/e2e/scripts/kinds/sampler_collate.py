"""Sentences of different length: a batch sampler that groups by length, a collate function that pads, a validation."""

import random

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler


class Sentences(Dataset):
    def __init__(self, size, seed):
        self.items = []
        draw = random.Random(seed)
        for _ in range(size):
            tokens = [draw.randrange(1, 30) for _ in range(draw.randrange(3, 12))]
            self.items.append((torch.tensor(tokens), sum(tokens) % 2))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Bucketed(Sampler):
    def __init__(self, data, batch_size):
        self.lengths, self.batch_size = [len(tokens) for tokens, _ in data], batch_size

    def __iter__(self):
        order = sorted(range(len(self.lengths)), key=lambda i: (self.lengths[i], random.random()))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self):
        return -(-len(self.lengths) // self.batch_size)


def collate(items):
    tokens, labels = zip(*items)
    return {
        "tokens": pad_sequence(tokens, batch_first=True),
        "lengths": torch.tensor([len(item) for item in tokens]),
        "labels": torch.tensor(labels),
    }


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12, padding_idx=0)
        self.lstm = nn.LSTM(12, 16, batch_first=True, bidirectional=True)
        self.out = nn.Linear(32, 2)

    def forward(self, batch):
        packed = pack_padded_sequence(
            self.embedding(batch["tokens"]), batch["lengths"], batch_first=True, enforce_sorted=False
        )
        hidden = self.lstm(packed)[1][0]
        return self.out(torch.cat([hidden[0], hidden[1]], 1))


torch.manual_seed(0)
random.seed(0)
training, validation = Sentences(90, 1), Sentences(30, 2)
loader = DataLoader(training, batch_sampler=Bucketed(training, 10), collate_fn=collate)
held_out = DataLoader(validation, batch_size=15, collate_fn=collate)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for epoch in range(3):
    model.train()
    for batch in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), batch["labels"])
        loss.backward()
        optimizer.step()
        print(f"train loss {loss.item()!r}")
    model.eval()
    with torch.no_grad():
        right = sum((model(batch).argmax(1) == batch["labels"]).sum().item() for batch in held_out)
    print(f"epoch {epoch} val accuracy: {right / len(validation):.4f}")
torch.save(model.state_dict(), "checkpoint.pt")
