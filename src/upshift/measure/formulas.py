"""FLOP formulas PyTorch's own registry lacks, and which operations are heavy without one.

A formula takes the arguments of the ATen overload and its output, and returns floating-point operations, a
multiplication and an addition counting as two. Recurrent layers: the products of the inputs and of the hidden states
with their weights; the gates' elementwise arithmetic is not counted. Attention: the two products of Vaswani et al.
2017 forward, five (one of them the recomputed scores, Dao et al. 2022) backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Formula = Callable[..., int]

#: Namespaces whose operations are PyTorch's own; any other is a custom operation that may do anything.
OWN_NAMESPACES = frozenset(
    {"aten", "prim", "prims", "profiler", "inductor", "debugprims", "rngprims", "c10d", "_c10d_functional", "_dtensor"}
)

#: Beginnings of the names of ATen operations that do much arithmetic and have no formula here.
HEAVY = (
    "linalg_", "_linalg", "fft_", "_fft", "cdist", "_cdist", "lu_", "cholesky", "triangular_solve", "geqrf", "ormqr",
    "_grouped_mm", "_scaled_grouped_mm", "_int_mm", "_weight_int", "_sparse", "sparse_", "_cslt", "_spdiags",
    "_native_multi_head_attention", "_transformer_encoder_layer", "_ctc_loss", "miopen_rnn", "_mps_lstm", "lstm_mps",
    "_scaled_dot_product", "_flash_attention", "_efficient_attention", "mkldnn_rnn", "_cudnn_rnn", "mkldnn_",
    "miopen_", "quantized_", "_segment_reduce", "_trilinear", "einsum",
)  # fmt: skip


def _mv(matrix: Any, vector: Any, *_: Any, **__: Any) -> int:
    return 2 * int(matrix.numel())


def _addmv(_bias: Any, matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * int(matrix.numel())


def _dot(left: Any, *_: Any, **__: Any) -> int:
    return 2 * int(left.numel())


def _rnn_onednn(layer_input: Any, w_input: Any, w_hidden: Any, *_: Any, **__: Any) -> int:
    """oneDNN: one layer, one direction. Input (time, batch, features); weights (gates * hidden, features | hidden)."""
    steps = layer_input.numel() // layer_input.shape[-1]
    return 2 * int(steps) * int(w_input.numel() + w_hidden.numel())


def _rnn_onednn_backward(*args: Any, **kwargs: Any) -> int:
    return 2 * _rnn_onednn(*args, **kwargs)


def _rnn_cudnn(layer_input: Any, weights: Any, *_: Any, **__: Any) -> int:
    """cuDNN: all layers and directions. Every weight matrix meets every time step of every sequence once."""
    steps = layer_input.numel() // layer_input.shape[-1]
    return 2 * int(steps) * int(sum(item.numel() for item in weights if item.dim() >= 2))


def _rnn_cudnn_backward(*args: Any, **kwargs: Any) -> int:
    return 2 * _rnn_cudnn(*args, **kwargs)


def _attention(query: Any, key: Any, value: Any, products: tuple[int, int]) -> int:
    """Query (..., L, E), key (..., S, E), value (..., S, V): products over E and over V, each 2 * L * S * width."""
    leading = query.numel() // (query.shape[-1] * query.shape[-2])
    pairs = int(query.shape[-2]) * int(key.shape[-2])
    return 2 * int(leading) * pairs * (products[0] * int(query.shape[-1]) + products[1] * int(value.shape[-1]))


def _attention_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _attention(query, key, value, (1, 1))


def _attention_cpu_backward(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # Over E: the scores again, and the gradients of query and key. Over V: those of the weights and of value.
    return _attention(query, key, value, (3, 2))


def registry() -> dict[Any, Formula]:
    """Overload packet -> formula on tensors: PyTorch's own, and those above for what it lacks."""
    import torch
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    extra: dict[str, Formula] = {
        "mv": _mv,
        "addmv": _addmv,
        "addmv_": _addmv,
        "dot": _dot,
        "vdot": _dot,
        "mkldnn_rnn_layer": _rnn_onednn,
        "mkldnn_rnn_layer_backward": _rnn_onednn_backward,
        "_cudnn_rnn": _rnn_cudnn,
        "_cudnn_rnn_backward": _rnn_cudnn_backward,
        "_scaled_dot_product_flash_attention_for_cpu": _attention_cpu,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_cpu_backward,
        "_addmm_activation": flop_registry[aten.addmm],
    }
    found: dict[Any, Formula] = {getattr(aten, name): formula for name, formula in extra.items() if hasattr(aten, name)}
    found.update(flop_registry)
    return found


def causal_fraction(rows: int, columns: int) -> float:
    """Part of the (rows, columns) scores a causal mask leaves: row i sees columns 0..i."""
    if rows <= 0 or columns <= 0:
        return 1.0
    full = max(0, rows - columns)
    short = rows - full
    return (short * (short + 1) / 2 + full * columns) / (rows * columns)


def is_heavy(namespace: str, name: str) -> bool:
    """Whether an operation without formula may do so much arithmetic that the count is only a lower bound."""
    if namespace not in OWN_NAMESPACES:
        return True
    return namespace == "aten" and name.startswith(HEAVY)


def elementwise_cost(name: str) -> int | None:
    """Operations per element of an optimizer's update, by operation name; None for what is no arithmetic.

    Fused kernels: counted from the update rules of Kingma and Ba 2015 and of Loshchilov and Hutter 2019.
    """
    base = name.removeprefix("_foreach_").rstrip("_")
    fused = {"_fused_adam": 13, "_fused_adamw": 14, "_fused_sgd": 4, "_fused_adagrad": 6}
    if base in fused:
        return fused[base]
    triple = ("addcmul", "addcdiv", "lerp")
    single = (
        "add", "sub", "mul", "div", "sqrt", "rsqrt", "pow", "square", "neg", "sign", "maximum", "minimum", "norm",
        "linalg_vector_norm", "clamp_min", "clamp_max", "clamp", "reciprocal", "abs", "exp", "log", "sum", "max",
    )  # fmt: skip
    if base in triple:
        return 3
    return 1 if base in single else None
