"""Turns dictionaries into tensors one by one, in the loop that trains."""

import argparse
import random
from collections.abc import Iterator

import torch
from torch import nn

FIELDS = ("age", "height", "weight", "income", "visits", "clicks", "days", "spent")


def make_records(count: int) -> list[dict[str, float]]:
    rng = random.Random(25)
    records = [{field: rng.gauss(0, 1) for field in FIELDS} for _ in range(count)]
    for record in records:
        record["bought"] = float(record["clicks"] + record["spent"] * record["visits"] > 0)
    return records


def batches(records: list[dict[str, float]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        rows, labels = [], []
        for record in random.sample(records, size):
            rows.append(torch.stack([torch.tensor(record[field]) for field in FIELDS]))
            labels.append(torch.tensor([record["bought"]]))
        yield torch.stack(rows), torch.stack(labels)


def ready_batches(records: list[dict[str, float]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.tensor([[record[field] for field in FIELDS] for record in records])
    labels = torch.tensor([[record["bought"]] for record in records])
    while True:
        picked = torch.randint(0, len(records), (size,))
        yield rows[picked], labels[picked]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(25)
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    source = (ready_batches if args.fixed else batches)(make_records(5000), 128)
    for step, (rows, labels) in enumerate(source):
        loss = nn.functional.binary_cross_entropy_with_logits(model(rows), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(step, f"{loss.item():.3f}")


if __name__ == "__main__":
    main()
