"""Train a ResNet-20 on CIFAR-10 with random crops and flips.

python examples/get_data.py cifar10
python examples/cifar_resnet.py
python examples/cifar_resnet.py --epochs 1 --limit 2560
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from get_data import DEFAULT_FOLDER, load_npz
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, Dataset

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


class CIFAR10(Dataset):
    def __init__(self, images, labels, augment: bool):
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        image = torch.from_numpy(self.images[i]).permute(2, 0, 1).float() / 255
        image = (image - MEAN) / STD
        if self.augment:
            image = F.pad(image, (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2,)).tolist()
            image = image[:, top : top + 32, left : left + 32]
            if torch.rand(()) < 0.5:
                image = image.flip(2)
        return image, self.labels[i]


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of `blocks` blocks each: 6 * blocks + 2 layers."""

    def __init__(self, blocks: int = 3, width: int = 16, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stages.append(BasicBlock(inputs, outputs, stride=2 if stage and block == 0 else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.stages(self.stem(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@torch.no_grad()
def evaluate(model, loader, device) -> float:
    model.eval()
    correct = 0
    for images, labels in loader:
        predictions = model(images.to(device)).argmax(1)
        correct += (predictions == labels.to(device)).sum().item()
    return correct / len(loader.dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(DEFAULT_FOLDER), help="folder that holds cifar10.npz")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--max-steps", type=int, help="stop after this many steps")
    parser.add_argument("--limit", type=int, help="use the first N training and test images only")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log-interval", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out-cifar-resnet")
    args = parser.parse_args()

    data = load_npz("cifar10", args.data)
    torch.manual_seed(args.seed)

    part = slice(args.limit)
    train_set = CIFAR10(data["train_images"][part], data["train_labels"][part], augment=True)
    test_set = CIFAR10(data["test_images"][part], data["test_labels"][part], augment=False)
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    test_loader = DataLoader(test_set, 500, num_workers=args.workers)

    model = ResNet().to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    # The rate drops to a tenth after half of the epochs, and again after three quarters.
    milestones = [math.ceil(args.epochs / 2), math.ceil(args.epochs * 3 / 4)]
    scheduler = MultiStepLR(optimizer, milestones, gamma=0.1)
    criterion = nn.CrossEntropyLoss()

    steps, accuracy = 0, 0.0
    for epoch in range(1, args.epochs + 1):
        model.train()
        started, running_loss, seen, correct = time.time(), 0.0, 0, 0
        for images, labels in train_loader:
            images, labels = images.to(args.device), labels.to(args.device)
            logits = model(images)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            steps += 1
            seen += len(labels)
            running_loss += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            if steps % args.log_interval == 0:
                print(
                    f"epoch {epoch} step {steps} loss {running_loss / seen:.4f} train accuracy {correct / seen:.4f}",
                    flush=True,
                )
            if steps == args.max_steps:
                break
        scheduler.step()
        accuracy = evaluate(model, test_loader, args.device)
        print(f"epoch {epoch} test accuracy {accuracy:.4f} ({time.time() - started:.0f} s)", flush=True)
        if steps == args.max_steps:
            break

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "accuracy": accuracy,
            "args": vars(args),
        },
        out / "checkpoint.pt",
    )
    print(f"saved {out / 'checkpoint.pt'}")


if __name__ == "__main__":
    main()
