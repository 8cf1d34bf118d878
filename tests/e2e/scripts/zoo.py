"""Small trainings of many kinds. Each prints its losses and a hash of its parameters, nothing else."""

import copy
import hashlib
import io
import pickle
import random
import threading

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset
from torch.utils.checkpoint import checkpoint

STEPS = 6


def digest(*modules):
    found = hashlib.sha256()
    for module in modules:
        tensors = module.state_dict().values() if isinstance(module, nn.Module) else module
        for tensor in tensors:
            found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()[:16]


def mlp(*extra, width=12, dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), *extra, nn.Linear(width, 1)).to(dtype)


def data(n=48, dtype=torch.float32):
    return torch.randn(n, 6, dtype=dtype), torch.randn(n, 1, dtype=dtype)


def plain(model, optimizer, batches, criterion=F.mse_loss, after=lambda: None):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def repeat(n=STEPS):
    x, y = data()
    return [(x, y)] * n


def accumulation():
    model = mlp(nn.Dropout(0.2))
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(3):
            x, y = data(8)
            loss = F.mse_loss(model(x), y) / 3
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses, digest(model)


def gan(n_critic=1):
    g, d = nn.Linear(4, 6), mlp()
    og, od = torch.optim.Adam(g.parameters()), torch.optim.Adam(d.parameters())
    losses = []
    for i in range(STEPS * n_critic):
        od.zero_grad()
        loss_d = d(g(torch.randn(8, 4)).detach()).mean() - d(torch.randn(8, 6)).mean()
        loss_d.backward()
        od.step()
        losses.append(loss_d.item())
        if i % n_critic == 0:
            og.zero_grad()
            loss_g = -d(g(torch.randn(8, 4))).mean()
            loss_g.backward()
            og.step()
            losses.append(loss_g.item())
    return losses, digest(g, d)


def critics():
    return gan(5)


def lbfgs():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    x, y = data()
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(STEPS):
        losses.append(optimizer.step(closure).item())
    return losses, digest(model)


def double_precision():
    model = mlp(dtype=torch.float64)
    x, y = data(dtype=torch.float64)
    return plain(model, torch.optim.Adagrad(model.parameters()), [(x, y)] * STEPS), digest(model)


def several_roots():
    encoder, decoder = nn.Linear(6, 3), nn.Linear(3, 6)
    optimizer = torch.optim.RMSprop([*encoder.parameters(), *decoder.parameters()])
    criterion = nn.SmoothL1Loss()
    losses = plain(lambda x: decoder(encoder(x)), optimizer, [(x, x) for x, _ in repeat()], criterion)
    return losses, digest(encoder, decoder)


def backward_of_several():
    a, b = nn.Linear(6, 1), nn.Linear(6, 1)
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    losses = []
    for x, y in repeat():
        optimizer.zero_grad(set_to_none=False)
        first, second = F.mse_loss(a(x), y), F.l1_loss(b(x), y)
        torch.autograd.backward(value for value in (first, second))
        optimizer.step()
        optimizer.zero_grad()
        first, second = F.mse_loss(a(x), y), F.l1_loss(b(x), y)
        torch.autograd.backward([first, second], [torch.tensor(1.0), torch.tensor(0.5)])
        optimizer.step()
        optimizer.zero_grad()
        edge = torch.autograd.graph.get_gradient_edge(F.mse_loss(a(x), y))
        torch.autograd.backward(edge)
        a(x).backward(torch.ones(len(x), 1))
        optimizer.step()
        losses += [first.item(), second.item()]
    return losses, digest(a, b)


def functional():
    weight = torch.randn(6, 1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.05)
    losses = plain(lambda x: torch.tanh(x @ weight), optimizer, repeat(), nn.MSELoss())
    return losses, digest([weight])


class Squares(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.full((6,), float(i)) + torch.rand(6) * 0.1, torch.tensor([float(i % 3)])


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(20):
            yield torch.full((6,), i / 10), torch.tensor([random.random()])


class Backwards(Sampler):
    def __iter__(self):
        return iter(range(19, -1, -1))

    def __len__(self):
        return 20


class Doubled(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield 2 * x, y


def collate(items):
    return torch.stack([x for x, _ in items]) + 1, torch.stack([y for _, y in items])


def loaders():
    torch.use_deterministic_algorithms(True)
    found = []
    for loader in (
        DataLoader(Squares(), 4, True),
        DataLoader(Squares(), 4, False, Backwards(), collate_fn=collate, drop_last=True),
        DataLoader(Stream(), batch_size=5),
        Doubled(Squares(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3)),
        DataLoader(TensorDataset(*data(20)), batch_sampler=[[0, 1, 2], [3, 19]]),
    ):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            found += plain(model, optimizer, loader)
        found.append(int(digest(model), 16))
    torch.use_deterministic_algorithms(False)
    return found, "-"


def schedulers():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    both = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warm, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)], [3]
    )
    losses = plain(model, optimizer, repeat(8), after=both.step)
    return [*losses, *both.get_last_lr()], digest(model)


def disabled_scaler():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for x, y in repeat():
        with torch.autocast("cpu", enabled=False):
            loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, digest(model)


def double_backward():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for x, y in repeat():
        x = x.clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = F.mse_loss(out, y) + slope.norm(dim=1).sub(1).square().mean()
        optimizer.zero_grad()
        loss.backward(create_graph=True)
        penalty = sum(p.grad.square().sum() for p in model.parameters()) * 1e-3
        penalty.backward()
        optimizer.step()
        for p in model.parameters():
            p.grad = None
        losses += [loss.item(), penalty.item()]
    return losses, digest(model)


def copies():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    losses = plain(model, optimizer, repeat(3))
    model, optimizer = copy.deepcopy((model, optimizer))
    losses += plain(model, optimizer, repeat(3))
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    losses += plain(model, optimizer, repeat(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model, optimizer = mlp(), None
    model.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(state["optimizer"])
    file = io.BytesIO()
    torch.save(model, file)
    assert pickle.loads(pickle.dumps(torch.save)) is torch.save
    return losses + plain(model, optimizer, repeat(3)), digest(model) + str(len(file.getvalue()))


def teacher():
    model = mlp(nn.BatchNorm1d(12))
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for x, y in repeat():
        with torch.no_grad():
            target = ema(x)
        loss = F.mse_loss(model(x), target) + F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(ema.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.1)
        losses.append(loss.item())
        model.eval()
        with torch.inference_mode():
            losses.append(F.mse_loss(model(x), y).item())
        model.train()
    return losses, digest(model, ema)


def hooks():
    model = mlp()
    seen = []
    model[0].register_forward_hook(lambda module, args, out: out * 1.5)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].register_full_backward_hook(lambda module, grads, outs: seen.append(outs[0].sum().item()))
    losses = plain(model, torch.optim.SGD(model.parameters(), lr=0.01), repeat())
    return losses + seen, digest(model)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(checkpoint(self.embed, tokens, use_reentrant=False).tanh())


def tied_and_checkpointed():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = [(torch.randint(9, (4, 7)), torch.randint(9, (28,))) for _ in range(STEPS)]
    losses = plain(lambda x: model(x).flatten(0, 1), optimizer, batches, nn.CrossEntropyLoss())
    return losses, digest(model)


def frozen_norm():
    model = mlp(nn.BatchNorm1d(12), nn.Dropout(0.5)).eval()
    return plain(model, torch.optim.Adam(model.parameters()), repeat()), digest(model)


def thread():
    found = []
    worker = threading.Thread(target=lambda: found.append(accumulation()))
    worker.start()
    worker.join()
    return found[0]


def seeds():
    np.random.seed(4)
    random.seed(4)
    x = torch.from_numpy(np.random.rand(20, 6).astype("float32")) + random.random()
    model = mlp()
    return plain(model, torch.optim.SGD(model.parameters(), lr=0.1), [(x, x[:, :1])] * STEPS), digest(model)


def step_that_raises():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    losses = plain(model, optimizer, repeat(2))
    model[0].weight.grad = torch.zeros_like(model[0].weight).to_sparse()
    try:
        optimizer.step()
    except RuntimeError as error:
        print(type(error).__name__)
    return losses + plain(model, optimizer, repeat(3)), digest(model)


KINDS = (
    accumulation, gan, critics, lbfgs, double_precision, several_roots, backward_of_several, functional, loaders,
    schedulers, disabled_scaler, double_backward, copies, teacher, hooks, tied_and_checkpointed, frozen_norm, seeds,
    step_that_raises, thread,
)  # fmt: skip

# No main guard: this is module level.
for number, kind in enumerate(KINDS):
    torch.manual_seed(number)
    random.seed(number)
    losses, found = kind()
    print(kind.__name__, repr(losses), found, flush=True)
for number in range(3):
    torch.manual_seed(number)
    parameter = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.square().sum().backward()
    optimizer.step()
    print("module_level", number, repr(parameter.tolist()))
print("random", torch.rand(1).item(), random.random(), np.random.rand())
