"""What is wrong with each script, and which findings are right to come first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from upshift.hardware.machine import bf16_native

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Case:
    """One script.

    `accepted` are the rules that name its bottleneck; none for a clean script, where no major finding may come.
    `work` is what a step of the fixed script does, in steps of the script as it is. `gain` says whether the fix is
    what the finding proposes, so that the achieved gain can be held against the predicted one.
    """

    name: str
    planted: str
    accepted: tuple[str, ...] = ()
    work: float = 1.0
    gain: bool = True
    folder: Path = SCRIPTS
    on_bf16: tuple[str, ...] = ()
    about_learning: bool = False

    @property
    def file(self) -> Path:
        """The script."""
        return self.folder / f"{self.name}.py"

    @property
    def expected(self) -> tuple[str, ...]:
        """The rules that are right on this machine."""
        return self.on_bf16 if self.on_bf16 and bf16_native() else self.accepted

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong with it on this machine."""
        return not self.expected


_DATA = ("data_starved", "slow_dataset_line")

CASES = (
    Case("slow_transform", "a slow transform of each sample", _DATA),
    Case("slow_collate", "a slow collate function", _DATA),
    Case("text_parsing", "text parsed whenever it is read", _DATA),
    Case("tiny_files", "one small file a sample", _DATA),
    Case("small_reads", "unbuffered reads of a few bytes", _DATA),
    Case("workers_restarted", "workers started anew in short epochs", ("workers_restarted",)),
    Case("hand_made_batches", "batches stacked by a Python loop", ("host_batching",)),
    Case("strided_table", "rows gathered across a stride", ("host_batching", "slow_loop_line")),
    Case("slow_preprocessing", "text encoded in the training loop", ("host_batching",)),
    Case("chatty_log", "a log line for every tensor in every step", ("logging_each_step",)),
    Case("printing", "tensors printed in every step", ("logging_each_step",)),
    Case("metrics_by_item", "hundreds of values read in every step", ("logging_each_step",)),
    Case("metrics_fsync", "a write to disk awaited in every step", ("logging_each_step", "slow_loop_line")),
    Case("tiny_batch", "a batch of two", ("small_batch_overhead",), work=2.0),
    Case("tiny_micro_batches", "accumulation over micro-batches of two", ("tiny_micro_batches",)),
    Case("loop_over_time", "a Python loop over time steps", ("python_loop",)),
    Case("loop_in_loss", "a Python loop over pairs in the loss", ("python_loop",)),
    Case("evaluates_often", "evaluation every ten steps", ("evaluation_too_often",)),
    Case("saves_often", "a checkpoint every five steps", ("checkpoint_too_often",)),
    Case("contended_lock", "a lock that another thread holds", ("slow_loop_line",)),
    Case("dense_embedding", "a dense gradient of a large table", ("dense_embedding_gradient",)),
    Case("many_small_parameters", "a plain Adam over hundreds of tensors", ("unfused_optimizer",)),
    Case("clipping_by_loop", "gradients of hundreds of tensors clipped one by one", ("slow_loop_line",), gain=False),
    Case("contiguous_convolutions", "convolutions in the default format", ("conv_layout",)),
    Case("too_many_threads", "eight threads a core", ("threads_mismatch",)),
    Case("one_thread", "one thread on several cores", ("threads_mismatch",)),
    Case("needless_graph", "create_graph without use", ("needless_graph",)),
    Case("double_forward", "a second forward pass in every step", ("double_forward",)),
    Case("double_precision", "float64 by accident", ("double_precision",)),
    Case("recompiles", "compiled for fixed shapes, fed with many", ("recompiles",)),
    Case("page_faults", "large buffers returned to the system", ("allocator_churn",)),
    Case("locked_store", "a lock in the dataset that loader workers queue for", _DATA),
    Case("prediction_log", "every prediction written to a flushed log", ("logging_each_step",)),
    Case("leaky_integrator", "a Python loop over time steps whose cost is mostly in backward", ("python_loop",)),
    Case("averaged_copy", "the state deep-copied in each step to average it", ("slow_loop_line",)),
    Case("clean_products", "nothing"),
    Case("clean_regression", "nothing"),
    Case("clean_loader", "nothing"),
    Case("clean_accumulation", "nothing"),
)
