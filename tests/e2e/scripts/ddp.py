"""Data-parallel training on the CPU. With `--poison R`, rank R has an infinite loss in its fourth step."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

poisoned = int(sys.argv[sys.argv.index("--poison") + 1]) if "--poison" in sys.argv else -1
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
random = torch.Generator().manual_seed(rank)
for step in range(6):
    x = torch.randn(16, 8, generator=random)
    loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    if rank == poisoned and step == 3:
        loss = loss * float("inf")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{rank} {step} {loss.item()!r}\n", end="", flush=True)
print(f"{rank} {sum(p.double().sum().item() for p in model.parameters())!r}\n", end="", flush=True)
dist.destroy_process_group()
