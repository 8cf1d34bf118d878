"""In the manner of timm's train.py: YAML defaults under argparse, a model by its name, EMA, args.yaml, summary.csv."""

import argparse
import copy
import csv
import logging
import os
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

_logger = logging.getLogger("train")
_models = {}


def register_model(function):
    _models[function.__name__] = function
    return function


@register_model
def tiny_convnet(num_classes=10, drop_rate=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate), nn.Linear(16, num_classes),
    )  # fmt: skip


@register_model
def tiny_mlp(num_classes=10, drop_rate=0.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.GELU(), nn.Dropout(drop_rate), nn.Linear(32, num_classes))


def create_model(name, **kwargs):
    return _models[name](**kwargs)


def read_config(path):
    """`key: value` lines of a flat YAML file."""
    found = {}
    for line in open(path):
        key, colon, value = line.split("#")[0].partition(":")
        if colon:
            found[key.strip().replace("-", "_")] = value.strip().strip("'\"")
    return found


config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("-c", "--config", default="", metavar="FILE")
parser = argparse.ArgumentParser(description="Training")
parser.add_argument("--model", default="tiny_mlp", type=str)
parser.add_argument("--num-classes", type=int, default=10)
parser.add_argument("-b", "--batch-size", type=int, default=8)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--drop", type=float, default=0.0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--clip-grad", type=float, default=None)
parser.add_argument("--model-ema-decay", type=float, default=0.9)
parser.add_argument("--amp", action="store_true", default=False)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--log-interval", type=int, default=1)
parser.add_argument("--output", default="output", type=str)


class ModelEma(nn.Module):
    def __init__(self, model, decay):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model):
        for old, new in zip(self.module.state_dict().values(), model.state_dict().values()):
            old.copy_(self.decay * old + (1.0 - self.decay) * new)

    def forward(self, x):
        return self.module(x)


class AverageMeter:
    def __init__(self):
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, args, amp_autocast, model_ema):
    losses = AverageMeter()
    model.train()
    for batch_idx, (input, target) in enumerate(loader):
        with amp_autocast():
            loss = loss_fn(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        model_ema.update(model)
        losses.update(loss.item(), input.size(0))
        if batch_idx % args.log_interval == 0:
            lr = optimizer.param_groups[0]["lr"]
            print(f"Train: {epoch} [{batch_idx:>4d}/{len(loader)}]  Loss: {losses.val!r} ({losses.avg:#.3g})  LR: {lr:.3e}")
    return {"loss": losses.avg}


def validate(model, loader, loss_fn, log_suffix=""):
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.no_grad():
        for input, target in loader:
            output = model(input)
            losses.update(loss_fn(output, target).item(), input.size(0))
            top1.update((output.argmax(1) == target).float().mean().item() * 100, input.size(0))
    print(f"Test{log_suffix}: Loss: {losses.avg:>6.3f}  Acc@1: {top1.avg:>7.3f}")
    return {"loss": losses.avg, "top1": top1.avg}


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        parser.set_defaults(**read_config(args_config.config))
    args = parser.parse_args(remaining)
    torch.manual_seed(args.seed)
    model = create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop)
    _logger.info("Model %s created, param count: %d", args.model, sum(m.numel() for m in model.parameters()))
    decay = [p for p in model.parameters() if p.ndim > 1]
    no_decay = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": args.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    amp_autocast = torch.autocast("cpu", torch.bfloat16) if args.amp else nullcontext
    model_ema = ModelEma(model, args.model_ema_decay)
    images = torch.randn(112, 3, 16, 16)
    labels = torch.randint(0, args.num_classes, (112,))
    loader_train = DataLoader(TensorDataset(images[:64], labels[:64]), args.batch_size, shuffle=True, drop_last=True)
    loader_eval = DataLoader(TensorDataset(images[64:], labels[64:]), 16)
    train_loss_fn = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    validate_loss_fn = nn.CrossEntropyLoss()

    output_dir = os.path.join(args.output, time.strftime("%Y") + "-" + args.model)
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, "args.yaml"), "w") as f:
        f.writelines(f"{key}: {value}\n" for key, value in sorted(vars(args).items()))
    best_metric, best_epoch = None, None
    for epoch in range(args.epochs):
        train_metrics = train_one_epoch(
            epoch, model, loader_train, optimizer, train_loss_fn, args, amp_autocast, model_ema
        )
        eval_metrics = validate(model, loader_eval, validate_loss_fn)
        ema_metrics = validate(model_ema, loader_eval, validate_loss_fn, log_suffix=" (EMA)")
        scheduler.step()
        row = {"epoch": epoch, **{"train_" + k: v for k, v in train_metrics.items()}}
        row.update({"eval_" + k: v for k, v in eval_metrics.items()})
        with open(os.path.join(output_dir, "summary.csv"), "a") as f:
            writer = csv.DictWriter(f, fieldnames=row)
            if epoch == 0:
                writer.writeheader()
            writer.writerow(row)
        state = {
            "epoch": epoch, "arch": args.model, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
            "state_dict_ema": model_ema.module.state_dict(), "metric": ema_metrics["top1"],
        }  # fmt: skip
        torch.save(state, os.path.join(output_dir, "tmp.pth.tar"))
        os.replace(os.path.join(output_dir, "tmp.pth.tar"), os.path.join(output_dir, "last.pth.tar"))
        if best_metric is None or ema_metrics["top1"] > best_metric:
            best_metric, best_epoch = ema_metrics["top1"], epoch
    print(f"*** Best metric: {best_metric} (epoch {best_epoch})")


if __name__ == "__main__":
    main()
