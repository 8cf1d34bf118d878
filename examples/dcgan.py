"""Train a DCGAN that draws clothes, on Fashion-MNIST.

    python examples/get_data.py fashion
    python examples/dcgan.py
    python examples/dcgan.py --epochs 1 --max-steps 50

The two networks take turns, each with its own optimizer.
"""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from get_data import DEFAULT_FOLDER, load_npz
from torch.utils.data import DataLoader, Dataset


class Clothes(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = torch.from_numpy(self.images[i]).float()[None] / 127.5 - 1
        return F.pad(image, (2, 2, 2, 2), value=-1.0)  # 28 x 28 -> 32 x 32, so that it halves evenly


class Generator(nn.Module):
    def __init__(self, latent: int, width: int):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(latent, 4 * width, 4, 1, 0, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(True),
            # 4 x 4
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(True),
            # 8 x 8
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            # 16 x 16
            nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            # 16 x 16
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            # 8 x 8
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2, inplace=True),
            # 4 x 4
            nn.Conv2d(4 * width, 1, 4, 1, 0, bias=False),
        )

    def forward(self, x):
        return self.main(x).view(-1)


def init_weights(module):
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def make_grid(images: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """(N, 1, H, W) in -1..1 -> one uint8 picture of N / columns rows."""
    n, _, h, w = images.shape
    grid = images.view(n // columns, columns, h, w).permute(0, 2, 1, 3).reshape(-1, columns * w)
    return ((grid + 1) * 127.5).round().to(torch.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(DEFAULT_FOLDER), help="folder that holds fashion.npz")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--max-steps", type=int, help="stop after this many steps")
    parser.add_argument("--limit", type=int, help="use the first N images only")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--latent", type=int, default=100)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--log-interval", type=int, default=25)
    parser.add_argument("--seed", type=int, default=999)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out-dcgan")
    args = parser.parse_args()

    images = load_npz("fashion", args.data)["train_images"][: args.limit]
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    loader = DataLoader(Clothes(images), batch_size=args.batch_size, shuffle=True, drop_last=True)

    net_g = Generator(args.latent, args.width).to(device)
    net_d = Discriminator(args.width).to(device)
    net_g.apply(init_weights)
    net_d.apply(init_weights)
    criterion = nn.BCEWithLogitsLoss()
    optimizer_g = torch.optim.Adam(net_g.parameters(), lr=args.lr, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(net_d.parameters(), lr=args.lr, betas=(0.5, 0.999))
    fixed_noise = torch.randn(64, args.latent, 1, 1, device=device)

    step = 0
    for epoch in range(1, args.epochs + 1):
        for real in loader:
            real = real.to(device)
            ones = torch.ones(len(real), device=device)
            zeros = torch.zeros(len(real), device=device)

            # Discriminator: tell real images from generated ones.
            net_d.zero_grad()
            loss_real = criterion(net_d(real), ones)
            loss_real.backward()
            noise = torch.randn(len(real), args.latent, 1, 1, device=device)
            fake = net_g(noise)
            loss_fake = criterion(net_d(fake.detach()), zeros)
            loss_fake.backward()
            optimizer_d.step()

            # Generator: have them taken for real.
            net_g.zero_grad()
            loss_g = criterion(net_d(fake), ones)
            loss_g.backward()
            optimizer_g.step()

            step += 1
            if step % args.log_interval == 0:
                loss_d = loss_real.item() + loss_fake.item()
                print(f"epoch {epoch} step {step} loss_d {loss_d:.4f} loss_g {loss_g.item():.4f}", flush=True)
            if step == args.max_steps:
                break
        if step == args.max_steps:
            break

    net_g.eval()
    with torch.no_grad():
        grid = make_grid(net_g(fixed_noise).cpu())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(grid, out / "samples.pt")
    checkpoint = {
        "generator": net_g.state_dict(),
        "discriminator": net_d.state_dict(),
        "optimizer_g": optimizer_g.state_dict(),
        "optimizer_d": optimizer_d.state_dict(),
        "args": vars(args),
    }
    torch.save(checkpoint, out / "checkpoint.pt")
    print(f"saved {out / 'checkpoint.pt'} and {out / 'samples.pt'}")


if __name__ == "__main__":
    main()
