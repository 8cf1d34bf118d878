"""The script of a launcher: everything it knows of the group comes from the environment. Serves as one process, too."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

world_size = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
if world_size > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
x = torch.randn(128, 8)
data = TensorDataset(x, (x > 0).sum(1))
sampler = DistributedSampler(data, world_size, rank)
loader = DataLoader(data, batch_size=8, sampler=sampler)
model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 9))
if world_size > 1:
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model) if "--sync" in sys.argv else model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for epoch in range(3):
    sampler.set_epoch(epoch)
    for step, (inputs, targets) in enumerate(loader):
        # Two batches make an update; the gradients are exchanged for the second only.
        last = step % 2 == 1
        model.require_backward_grad_sync = last
        loss = nn.functional.cross_entropy(model(inputs), targets) / 2
        loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
        sys.stdout.write(f"[rank {rank}] epoch {epoch} loss {loss.item()!r}\n")
        sys.stdout.flush()
if rank == 0:
    torch.save(getattr(model, "module", model).state_dict(), "checkpoint.pt")
if world_size > 1:
    dist.destroy_process_group()
