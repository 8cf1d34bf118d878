"""Train a variational auto-encoder on MNIST.

python examples/get_data.py mnist
python examples/vae.py
python examples/vae.py --epochs 1 --limit 6000
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from get_data import DEFAULT_FOLDER, load_npz
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

PIXELS = 28 * 28


class Digits(Dataset):
    """MNIST as stored, bytes; every image becomes a float tensor when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = torch.from_numpy(self.images[index]).unsqueeze(0)
        image = image.to(torch.float32).div(255)
        return image, int(self.labels[index])


class VAE(nn.Module):
    def __init__(self, hidden: int, latent: int):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, hidden // 2), nn.ReLU())
        self.to_mean = nn.Linear(hidden // 2, latent)
        self.to_logvar = nn.Linear(hidden // 2, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden // 2),
            nn.ReLU(),
            nn.Linear(hidden // 2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, PIXELS),
            nn.Sigmoid(),
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.encoder(x.flatten(1))
        return self.to_mean(h), self.to_logvar(h)

    def sample(self, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        """Draw from N(mean, exp(logvar)) in a way that gradients pass through."""
        std = (logvar / 2).exp()
        return mean + std * torch.randn_like(std)

    def forward(self, x: torch.Tensor):
        mean, logvar = self.encode(x)
        return self.decoder(self.sample(mean, logvar)), mean, logvar


def negative_elbo(reconstruction, x, mean, logvar):
    """Reconstruction error plus the divergence from a standard normal, both summed over the batch."""
    bce = F.binary_cross_entropy(reconstruction, x.flatten(1), reduction="sum")
    kl = 0.5 * torch.sum(mean.pow(2) + logvar.exp() - 1 - logvar)
    return bce + kl


def train_epoch(model, loader, optimizer, device, epoch: int, log_interval: int) -> float:
    model.train()
    total, seen = 0.0, 0
    for i, (x, _) in enumerate(loader):
        x = x.to(device)
        optimizer.zero_grad()
        reconstruction, mean, logvar = model(x)
        loss = negative_elbo(reconstruction, x, mean, logvar)
        loss.backward()
        optimizer.step()
        total += loss.item()
        seen += len(x)
        if i % log_interval == 0:
            print(f"epoch {epoch} [{seen}/{len(loader.dataset)}] loss {loss.item() / len(x):.4f}", flush=True)
    return total / seen


def test_epoch(model, loader, device) -> float:
    model.eval()
    total = 0.0
    with torch.no_grad():
        for x, _ in loader:
            x = x.to(device)
            reconstruction, mean, logvar = model(x)
            total += negative_elbo(reconstruction, x, mean, logvar).item()
    return total / len(loader.dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(DEFAULT_FOLDER), help="folder that holds mnist.npz")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--limit", type=int, help="use the first N training and test images only")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--log-interval", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out-vae")
    args = parser.parse_args()

    data = load_npz("mnist", args.data)
    torch.manual_seed(args.seed)

    train_set = Digits(data["train_images"][: args.limit], data["train_labels"][: args.limit])
    test_set = Digits(data["test_images"][: args.limit], data["test_labels"][: args.limit])
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=args.batch_size, shuffle=False)

    model = VAE(args.hidden, args.latent).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    test_loss = float("inf")
    for epoch in range(1, args.epochs + 1):
        train_loss = train_epoch(model, train_loader, optimizer, args.device, epoch, args.log_interval)
        test_loss = test_epoch(model, test_loader, args.device)
        print(f"epoch {epoch} train loss {train_loss:.4f} test loss {test_loss:.4f}", flush=True)

    with torch.no_grad():
        z = torch.randn(64, args.latent, device=args.device)
        samples = model.decoder(z).view(64, 1, 28, 28).cpu()
    torch.save(samples, out / "samples.pt")
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "test_loss": test_loss,
        "args": vars(args),
    }
    torch.save(checkpoint, out / "checkpoint.pt")
    print(f"saved {out / 'checkpoint.pt'}")


if __name__ == "__main__":
    main()
