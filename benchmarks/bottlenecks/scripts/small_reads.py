"""Records in one large file, read field by field without a buffer."""

import argparse
import itertools
import struct
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

FIELDS = 96


class Records(Dataset):
    def __init__(self, name: str, n: int, keep: bool) -> None:
        self.name = name
        self.n = n
        self.kept = [self.read(index) for index in range(n)] if keep else None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(index) if self.kept is None else self.kept[index]

    def read(self, index: int) -> torch.Tensor:
        values = []
        with open(self.name, "rb", buffering=0) as file:
            for field in range(FIELDS):
                file.seek(4 * (index * FIELDS + field))
                values.append(struct.unpack("f", file.read(4))[0])
        return torch.tensor(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    n = 4000
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(torch.randn(n, FIELDS).numpy().tobytes())
    loader = DataLoader(Records(file.name, n, args.fixed), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(FIELDS, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, FIELDS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    for _ in itertools.count():
        for record in loader:
            loss = nn.functional.l1_loss(model(record), record)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
