from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from upshift.measure import facts
from upshift.records import ScriptFacts


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Own(nn.Module):
    def forward(self, x):
        return Scale.apply(x)


def test_model_facts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
    found = facts.model_facts(model, (torch.zeros(2, 3, 8, 8), {"mask": torch.zeros(2)}), {"n": 3})
    assert found.name == "Sequential"
    assert found.parameters == 3 * 4 * 9 + 4 + 4 * 2 + 2 + 2 * 2 + 2
    assert found.layers == {"Conv2d": 1, "Linear": 2, "ReLU": 1}
    assert (found.dtypes, found.device, found.trained) == (("float32",), "cpu", True)
    assert found.input_shapes == ((2, 3, 8, 8), (2,))
    assert not found.compiled and not found.channels_last and not found.custom_autograd


def test_shared_parameters_count_once() -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = model[0].weight
    assert facts.model_facts(model).parameters == 9


def test_channels_last_is_told_from_a_kernel_that_fits_both() -> None:
    assert facts.model_facts(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)).channels_last
    assert not facts.model_facts(nn.Conv2d(3, 4, 1)).channels_last
    assert facts.model_facts(nn.Conv3d(3, 4, 3).to(memory_format=torch.channels_last_3d)).channels_last


def test_frozen_mixed_lazy_compiled_and_custom() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert not facts.model_facts(frozen).trained
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16)])
    assert facts.model_facts(mixed).dtypes == ("bfloat16", "float32")
    assert facts.model_facts(nn.LazyLinear(3)).parameters == 0
    assert facts.model_facts(nn.ReLU()).parameters == 0
    compiled = nn.Linear(2, 2)
    compiled.compile()
    assert facts.model_facts(compiled).compiled
    assert facts.model_facts(torch.compile(nn.Linear(2, 2))).compiled
    assert facts.model_facts(Own()).custom_autograd


@pytest.mark.parametrize(
    ("optimizer", "options", "fused", "foreach"),
    [
        (torch.optim.AdamW, {}, None, None),
        (torch.optim.AdamW, {"fused": True}, True, None),
        (torch.optim.SGD, {"lr": 0.1, "foreach": False}, None, False),
        (torch.optim.LBFGS, {}, None, None),
    ],
)
def test_optimizer_facts(optimizer, options, fused, foreach) -> None:
    model = nn.Linear(3, 4)
    found = facts.optimizer_facts(optimizer(model.parameters(), **options))
    assert (found.name, found.parameters, found.tensors) == (optimizer.__name__, 16, 2)
    assert (found.fused, found.foreach) == (fused, foreach)
    assert found.closure is (optimizer is torch.optim.LBFGS)
    assert not found.sparse and found.device == "cpu" and found.dtypes == ("float32",)


def test_groups_that_differ_are_unknown_and_sparse_gradients_are_seen() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    groups = [{"params": layers[0].parameters(), "foreach": True}, {"params": layers[1].parameters()}]
    assert facts.optimizer_facts(torch.optim.SGD(groups, lr=0.1)).foreach is None
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    assert facts.optimizer_facts(optimizer).sparse


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


class Broken(TensorDataset):
    def __len__(self) -> int:
        raise RuntimeError("not yet")


def test_loader_facts() -> None:
    data = TensorDataset(torch.zeros(10, 2))
    found = facts.loader_facts(DataLoader(data, batch_size=4, num_workers=2, persistent_workers=True), training=True)
    assert (found.name, found.dataset, found.training) == ("DataLoader", "TensorDataset", True)
    assert (found.workers, found.batch_size, found.samples, found.persistent) == (2, 4, 10, True)
    assert found.prefetch == 2 and not found.iterable and not found.pinned and not found.custom_fetch


def test_custom_fetching_is_seen() -> None:
    data = TensorDataset(torch.zeros(10, 2))
    sampler = SequentialSampler(data)

    class Buckets(BatchSampler):
        pass

    def custom(**options: object) -> bool:
        return facts.loader_facts(DataLoader(data, **options), training=False).custom_fetch  # type: ignore[arg-type]

    assert not custom() and not custom(shuffle=True) and not custom(batch_size=None)
    assert not custom(batch_sampler=BatchSampler(sampler, 3, False))
    assert custom(batch_sampler=Buckets(sampler, 3, False))
    assert custom(collate_fn=lambda items: items) and custom(worker_init_fn=lambda i: None)
    own = DataLoader(data, batch_sampler=Buckets(sampler, 3, False))
    assert facts.loader_facts(own, True).batch_size == 3


def test_streams_and_broken_lengths_have_no_length() -> None:
    assert facts.loader_facts(DataLoader(Stream(), batch_size=4), True).samples is None
    assert facts.loader_facts(DataLoader(Stream()), True).iterable
    broken = DataLoader(Broken(torch.zeros(3)), sampler=[0, 1])
    assert facts.loader_facts(broken, True).samples is None


def test_flush_denormal_is_read_from_the_processor() -> None:
    before = facts.flushes_denormals()
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormals")
        assert facts.flushes_denormals()
        torch.set_flush_denormal(False)
        assert not facts.flushes_denormals()
    finally:
        torch.set_flush_denormal(before)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("7f00 r-xp /usr/lib/libtcmalloc_minimal.so.4\n7f01 /lib/libc.so.6\n", "tcmalloc"),
        ("7f00 r-xp /usr/lib/libjemalloc.so.2\n7f01 /lib/libc.so.6\n", "jemalloc"),
        ("7f01 r-xp /lib/x86_64-linux-gnu/libc.so.6\n", "glibc"),
        ("7f01 r-xp /lib/ld-musl-x86_64.so.1\n", "musl"),
        ("", ""),
    ],
)
def test_allocator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/maps").write_text(text)
    assert facts.allocator(tmp_path) == name


@pytest.mark.parametrize(
    ("source", "guarded"),
    [
        ("if __name__ == '__main__':\n    main()\n", True),
        ("if '__main__' == __name__ and True:\n    main()\n", True),
        ('import os\nif __name__ == "__main__": pass\n', True),
        ("# if __name__ == '__main__':\nmain()\n", False),
        ("def f():\n    if __name__ == '__main__':\n        pass\n", False),
        ("if __name__ != '__main__':\n    pass\n", False),
        ("s = \"if __name__ == '__main__'\"\n", False),
        ("def broken(:\n", False),
        ("", False),
    ],
)
def test_main_guard(tmp_path: Path, source: str, guarded: bool) -> None:
    file = tmp_path / "train.py"
    file.write_text(source)
    assert facts.main_guard(file) is guarded
    assert facts.main_guard(str(file)) is guarded


def test_main_guard_of_what_cannot_be_read(tmp_path: Path) -> None:
    assert not facts.main_guard(tmp_path / "none.py")
    (tmp_path / "nul.py").write_bytes(b"\0\xff")
    assert not facts.main_guard(tmp_path / "nul.py")


def test_process_facts_fill_script_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", sys)
    for name in facts.FRAMEWORKS:
        if name != "lightning":
            monkeypatch.delitem(sys.modules, name, raising=False)
    file = tmp_path / "train.py"
    file.write_text("if __name__ == '__main__':\n    pass\n")
    found = ScriptFacts(**facts.process_facts(file))
    assert found.threads == torch.get_num_threads() and found.cores >= 1
    assert found.frameworks == ("lightning",) and found.main_guard
    assert "main_guard" not in facts.process_facts() and "main_guard" not in facts.process_facts("")


class OwnDropout(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(4, 2)
        self.dropout = nn.Dropout(0.1)


def test_layers_that_act_differently_in_evaluation() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.LSTM(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert facts.mode_layers(plain) == ()
    model = nn.Sequential(nn.Dropout2d(0.1), nn.LSTM(2, 2, num_layers=2, dropout=0.1), nn.BatchNorm1d(2), OwnDropout())
    assert facts.mode_layers(model) == ("BatchNorm1d", "Dropout", "Dropout2d", "LSTM")


def test_learning_rates_of_all_groups_or_none() -> None:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.2}])
    assert facts.learning_rates([optimizer]) == (0.1, 0.2)
    optimizer.param_groups[1]["lr"] = "auto"
    assert facts.learning_rates([optimizer]) is None
    optimizer.param_groups[1]["lr"] = torch.zeros((), device="meta")
    assert facts.learning_rates([optimizer]) is None
    del optimizer.param_groups[1]["lr"]
    assert facts.learning_rates([optimizer]) is None
