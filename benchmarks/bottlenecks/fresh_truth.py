"""What is wrong with each script of the fresh set.

These scripts were written without sight of the rules, from the names of the findings alone. They serve to count, and
no rule may be fitted to them: where one is, its script belongs into the development set, and a new one is due here.
"""

from __future__ import annotations

from pathlib import Path

from truth import Case

SCRIPTS = Path(__file__).parent / "fresh"


def _case(
    name: str,
    planted: str,
    *accepted: str,
    work: float = 1.0,
    gain: bool = True,
    on_bf16: tuple[str, ...] = (),
    about_learning: bool = False,
) -> Case:
    """A case whose script lies in the folder of this set."""
    return Case(name, planted, accepted, work, gain, folder=SCRIPTS, on_bf16=on_bf16, about_learning=about_learning)


#: A slow line is what starves the loop of data: both names describe the same thing.
_DATA = ("data_starved", "slow_dataset_line")

#: Products in float32 are a bottleneck only where the processor has bfloat16.
_BF16 = ("fp32_where_bf16_is_faster",)

CASES = (
    _case("pixel_loop", "a Python loop over the pixels of each sample", *_DATA),
    _case("numpy_rotation", "pictures rotated in numpy, sample by sample", *_DATA),
    _case("npz_files", "one small compressed archive a sample", *_DATA),
    _case("spectrogram_each_epoch", "the same spectrograms computed in every epoch", *_DATA),
    _case("graph_collate", "adjacency matrices filled edge by edge in collate", *_DATA),
    _case("loader_per_epoch", "a new loader with new workers in each short epoch", "workers_restarted"),
    _case("records_to_tensors", "batches built from dictionaries in the training loop", "host_batching"),
    # On a GPU the host also waits for each of these values, and to say so is to name the same line.
    _case("statistics_by_item", "`.item()` for every sample in each step", "logging_each_step", "sync_per_step"),
    _case("one_sequence_a_step", "a batch of one", "small_batch_overhead", work=2.0),
    _case("backward_per_sample", "accumulation over micro-batches of one", "tiny_micro_batches"),
    _case("validates_often", "validation every four steps", "evaluation_too_often"),
    _case("snapshot_each_step", "a checkpoint in each step", "checkpoint_too_often"),
    _case("item_vectors", "dense gradients of two large tables", "dense_embedding_gradient"),
    _case("column_tokens", "a plain AdamW over hundreds of tiny tensors", "unfused_optimizer"),
    _case("channels_first", "channels-last pictures copied to channels-first for convolutions", "conv_layout"),
    _case("server_threads", "sixteen threads a core", "threads_mismatch"),
    # What paces two scripts imports torch before them, and their environment comes too late.
    _case("environment_threads", "one thread, by the environment", "threads_mismatch", gain=False),
    _case("perplexity_pass", "a second forward pass after each step, for a metric", "double_forward"),
    _case("first_order_meta", "create_graph for gradients that are detached", "needless_graph"),
    _case("double_signals", "a model made float64 to fit numpy's arrays", "double_precision"),
    _case("multi_scale", "compiled anew for each size of a crop", "recompiles"),
    # The fixed script clips otherwise: it shows what the loop costs, and is not what anybody would propose.
    _case("adaptive_clipping", "gradients clipped tensor by tensor in Python", "slow_loop_line", gain=False),
    _case("collects_garbage", "gc.collect() in each step", "slow_loop_line"),
    _case(
        "stays_in_eval", "evaluation mode from the first validation on", "trains_in_eval_mode", about_learning=True,
        gain=False,
    ),
    _case("float32_products", "float32 products, where the processor has bfloat16; else nothing", on_bf16=_BF16),
    _case("healthy_autoencoder", "nothing but float32 products", on_bf16=_BF16),
    _case("healthy_convolutions", "nothing but float32 convolutions", on_bf16=_BF16),
    _case("healthy_encoder", "nothing but float32 products", on_bf16=_BF16),
    _case("healthy_pipeline", "nothing but float32 products", on_bf16=_BF16),
)  # fmt: skip
