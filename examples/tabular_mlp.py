"""Predict the price of a diamond from its measures and grades with a multi-layer perceptron.

python examples/get_data.py diamonds
python examples/tabular_mlp.py
python examples/tabular_mlp.py --epochs 2
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from get_data import DEFAULT_FOLDER, load_npz
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TabularMLP(nn.Module):
    """An embedding for each categorical column, joined to the numeric columns, then dense layers."""

    def __init__(self, numeric: int, cardinalities: list[int], hidden: list[int], dropout: float):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, min(8, (n + 1) // 2)) for n in cardinalities)
        width = numeric + sum(embedding.embedding_dim for embedding in self.embeddings)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, numeric, categorical):
        parts = [embedding(categorical[:, i]) for i, embedding in enumerate(self.embeddings)]
        return self.layers(torch.cat([numeric, *parts], dim=1)).squeeze(1)


def make_dataset(rows: np.ndarray, numeric, categorical, target) -> TensorDataset:
    return TensorDataset(
        torch.from_numpy(numeric[rows]), torch.from_numpy(categorical[rows]), torch.from_numpy(target[rows])
    )


@torch.no_grad()
def evaluate(model, loader, criterion, scale: float, offset: float, device) -> tuple[float, float]:
    """Mean loss, and mean absolute error in dollars."""
    model.eval()
    loss, error, seen = 0.0, 0.0, 0
    for numeric, categorical, target in loader:
        numeric, categorical, target = numeric.to(device), categorical.to(device), target.to(device)
        output = model(numeric, categorical)
        loss += criterion(output, target).item() * len(target)
        dollars = (output * scale + offset).exp() - (target * scale + offset).exp()
        error += dollars.abs().sum().item()
        seen += len(target)
    return loss / seen, error / seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(DEFAULT_FOLDER), help="folder that holds diamonds.npz")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--limit", type=int, help="use the first N rows only")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out-tabular-mlp")
    args = parser.parse_args()

    data = load_npz("diamonds", args.data)
    torch.manual_seed(args.seed)

    numeric, categorical = data["numeric"][: args.limit], data["categorical"][: args.limit]
    log_price = np.log(data["price"][: args.limit])
    train_rows, test_rows = train_test_split(np.arange(len(log_price)), test_size=0.2, random_state=args.seed)
    numeric = StandardScaler().fit(numeric[train_rows]).transform(numeric).astype(np.float32)
    offset, scale = float(log_price[train_rows].mean()), float(log_price[train_rows].std())
    target = ((log_price - offset) / scale).astype(np.float32)

    train_set = make_dataset(train_rows, numeric, categorical, target)
    test_set = make_dataset(test_rows, numeric, categorical, target)
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=1024)

    cardinalities = [len(data[column]) for column in ("cut", "color", "clarity")]
    model = TabularMLP(numeric.shape[1], cardinalities, args.hidden, args.dropout).to(args.device)
    criterion = nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    test_loss = error = float("inf")
    for epoch in range(1, args.epochs + 1):
        model.train()
        running = 0.0
        for x_numeric, x_categorical, y in train_loader:
            x_numeric, x_categorical = x_numeric.to(args.device), x_categorical.to(args.device)
            y = y.to(args.device)
            optimizer.zero_grad()
            loss = criterion(model(x_numeric, x_categorical), y)
            loss.backward()
            optimizer.step()
            running += loss.item() * len(y)
        scheduler.step()
        test_loss, error = evaluate(model, test_loader, criterion, scale, offset, args.device)
        print(
            f"epoch {epoch}/{args.epochs} train loss {running / len(train_set):.5f} "
            f"test loss {test_loss:.5f} mean error ${error:.0f}",
            flush=True,
        )

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "test_loss": test_loss,
        "mean_error": error,
        "args": vars(args),
    }
    torch.save(checkpoint, out / "checkpoint.pt")
    print(f"saved {out / 'checkpoint.pt'}")


if __name__ == "__main__":
    main()
