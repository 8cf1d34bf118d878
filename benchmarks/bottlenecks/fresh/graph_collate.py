"""Graphs whose adjacency matrices are filled edge by edge when a batch is collated."""

import argparse
import itertools
import random

import torch
from torch import nn
from torch.utils.data import DataLoader

Graph = tuple[int, list[tuple[int, int]], float]


def random_graph(rng: random.Random) -> Graph:
    """The number of nodes, the edges, and edges a node (which is to be told)."""
    nodes = rng.randint(12, 30)
    edges = [(rng.randrange(nodes), rng.randrange(nodes)) for _ in range(nodes * rng.randint(1, 5))]
    return nodes, edges, len(edges) / nodes


def collate(graphs: list[Graph]) -> tuple[torch.Tensor, torch.Tensor]:
    most = max(nodes for nodes, _, _ in graphs)
    adjacency = torch.zeros(len(graphs), most, most)
    for number, (_, edges, _) in enumerate(graphs):
        for source, target in edges:
            adjacency[number, source, target] = 1.0
            adjacency[number, target, source] = 1.0
    return adjacency, torch.tensor([degree for _, _, degree in graphs])


class GraphNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.readout = nn.Linear(width, 1)

    def forward(self, adjacency: torch.Tensor) -> torch.Tensor:
        x = self.start.expand(*adjacency.shape[:2], -1)
        for layer in self.layers:
            x = torch.tanh(layer(adjacency @ x))
        return self.readout(x.mean(dim=1)).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    workers = 2 if parser.parse_args().fixed else 0
    torch.manual_seed(10)
    rng = random.Random(10)
    loader = DataLoader(
        [random_graph(rng) for _ in range(3000)], batch_size=24, shuffle=True, collate_fn=collate,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip
    model = GraphNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in itertools.count():
        for adjacency, degree in loader:
            loss = nn.functional.mse_loss(model(adjacency), degree)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
