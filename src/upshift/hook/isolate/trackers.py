"""Keep trials off the network services a script reports to: experiment trackers and remote stores.

Trackers are switched off or pointed at a local folder, so that the script runs on without them. Writes to
remote stores are refused, because a script that pushes a model is better stopped than fooled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from upshift.errors import UpshiftError
from upshift.hook.imports import AfterImport

__all__ = ["RemoteWriteRefused", "refuse_remote_writes", "switch_off_trackers", "trial_environment"]


class RemoteWriteRefused(UpshiftError):
    """The script tried to write to a remote store in a trial."""

    def __init__(self, call: str) -> None:
        super().__init__(
            f"the script writes to a remote store ({call}), which trials do not do unasked",
            remedy="Let trials write there with --allow-remote-writes, or leave the upload out.",
        )


def _local_mlflow(scratch: Path) -> str:
    return (scratch / "mlruns").absolute().as_uri()


def trial_environment(scratch: Path) -> dict[str, str]:
    """Environment variables that switch experiment trackers off in a trial.

    TensorBoard, Aim and DVCLive write files, which isolation sends to scratch.

    Args:
        scratch: folder for what trackers insist on storing; need not exist.
    """
    offline = str((scratch / "trackers").absolute())
    return {
        "WANDB_MODE": "disabled",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": _local_mlflow(scratch),
        "MLFLOW_REGISTRY_URI": _local_mlflow(scratch),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3.13 and later refuse folders without it
        "COMET_DISABLED": "true",
        "COMET_MODE": "DISABLED",  # as transformers reads it
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": offline,
        "NEPTUNE_MODE": "offline",  # "debug" in Neptune 1.x is "disabled" in Neptune 3.x; both know "offline"
        "NEPTUNE_LOG_DIRECTORY": offline,
        "CLEARML_OFFLINE_MODE": "1",
        "SWANLAB_MODE": "disabled",
        "CODECARBON_SAVE_TO_API": "false",
        "POLYAXON_NO_OP": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }


def switch_off_trackers(scratch: Path) -> None:
    """Keep trackers off even where the script sets a mode or server itself, which beats the environment.

    Covers `wandb.init(mode=...)`, `swanlab.init(mode=...)` and MLflow's tracking URIs, once imported.

    Args:
        scratch: as for `trial_environment`.
    """

    def disabled(module: ModuleType) -> None:
        init = getattr(module, "init", None)
        if not callable(init):
            return

        @functools.wraps(init)
        def replacement(*arguments: Any, **options: Any) -> Any:
            return init(*arguments, **{**options, "mode": "disabled"})

        module.init = replacement  # type: ignore[attr-defined]

    def local(module: ModuleType) -> None:
        for name in ("set_tracking_uri", "_resolve_tracking_uri"):
            original = getattr(module, name, None)
            if callable(original):
                setattr(module, name, _locally(original, _local_mlflow(scratch)))

    after = AfterImport()
    after.on("wandb", disabled)
    after.on("swanlab", disabled)
    after.on("mlflow.tracking._tracking_service.utils", local)


def _locally(function: Callable[..., Any], local: str) -> Callable[..., Any]:
    """`function(uri)`, with `local` for a URI that leads to a server."""

    @functools.wraps(function)
    def replacement(*arguments: Any, **options: Any) -> Any:
        def mapped(uri: Any) -> Any:
            remote = isinstance(uri, str) and urlsplit(uri).scheme not in ("", "file", "sqlite")
            return local if remote or uri == "databricks" else uri

        return function(*map(mapped, arguments), **{name: mapped(value) for name, value in options.items()})

    return replacement


# Methods that change a remote store: module, class, names.
_HF = (
    r"(upload|create|delete|update|move|super_squash|merge|add|edit|comment|change|rename|hide|duplicate|preupload|copy"
    r"|request_space|set_space|restart|pause|resume|scale|run)_.*|push_to_hub"
)
_METHODS = (
    ("huggingface_hub.hf_api", "HfApi", _HF),
    ("huggingface_hub.hub_mixin", "ModelHubMixin", r"push_to_hub"),
    ("huggingface_hub.repository", "Repository", r"git_push|push_to_hub"),
    ("transformers.utils.hub", "PushToHubMixin", r"push_to_hub"),
    (
        "google.cloud.storage.blob",
        "Blob",
        r"upload_from_.*|_?(create|initiate)_resumable_upload.*|_do_upload|delete|rewrite|compose|patch|update"
        r"|update_storage_class|make_(public|private)",
    ),
    (
        "google.cloud.storage.bucket",
        "Bucket",
        r"create|delete|delete_blobs?|copy_blob|rename_blob|patch|update|make_(public|private)",
    ),
    (
        "azure.storage.blob",
        "BlobClient",
        r"(upload|stage|commit|append|delete|create|start_copy|set|clear|resize|undelete)_.*",
    ),
    ("azure.storage.blob", "ContainerClient", r"(upload|delete|create|set)_.*"),
    ("azure.storage.blob", "BlobServiceClient", r"(delete|create|set|undelete)_.*"),
)
_AWS_WRITES = re.compile(
    r"(Put|Upload|Create|Complete|Copy|Delete|Update|Write|Publish|Send|BatchWrite|Restore|Rename)"
)
_AWS_READS = frozenset(("CreateSession", "CreateToken", "CreateTokenWithIAM"))  # used to sign in


def refuse_remote_writes(allow: bool) -> None:
    """Make known ways to write to a remote store raise `RemoteWriteRefused`; nothing if `allow`.

    Covers huggingface_hub (and `push_to_hub` of transformers), boto3, botocore, aiobotocore,
    google-cloud-storage and azure-storage-blob, once the script imports them. Reading from them goes on.
    """
    if allow:
        return
    after = AfterImport()
    by_module: dict[str, list[tuple[str, str]]] = {}
    for module, owner, names in _METHODS:
        by_module.setdefault(module, []).append((owner, names))
    for module, entries in by_module.items():
        after.on(module, functools.partial(_refuse_methods, entries))
    after.on("botocore.client", functools.partial(_refuse_operations, "BaseClient"))
    after.on("aiobotocore.client", functools.partial(_refuse_operations, "AioBaseClient"))
    after.on("boto3.s3.inject", _refuse_transfers)


def _refusal(call: str, original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def refuse(*_: Any, **__: Any) -> Any:
        raise RemoteWriteRefused(call)

    return refuse


def _refuse_methods(entries: list[tuple[str, str]], module: ModuleType) -> None:
    for class_name, names in entries:
        owner = getattr(module, class_name, None)
        if not isinstance(owner, type):
            continue
        pattern = re.compile(names)
        for name in dir(owner):
            if pattern.fullmatch(name) and callable(getattr(owner, name)):
                setattr(owner, name, _refusal(f"{class_name}.{name}", getattr(owner, name)))
        # `upload_file = api.upload_file` in the module was bound before us.
        for name, value in list(vars(module).items()):
            if pattern.fullmatch(name) and isinstance(getattr(value, "__self__", None), owner):
                setattr(module, name, _refusal(name, value))


def _refuse_operations(class_name: str, module: ModuleType) -> None:
    owner = getattr(module, class_name, None)
    original = getattr(owner, "_make_api_call", None)
    if owner is None or original is None:
        return

    @functools.wraps(original)
    def checked(self: Any, operation_name: str, *arguments: Any, **options: Any) -> Any:
        if _AWS_WRITES.match(operation_name) and operation_name not in _AWS_READS:
            raise RemoteWriteRefused(f"AWS {operation_name}")
        return original(self, operation_name, *arguments, **options)

    owner._make_api_call = checked


def _refuse_transfers(module: ModuleType) -> None:
    # They can hand over to a transfer library in C, past botocore.
    for name, value in list(vars(module).items()):
        if re.match(r"((bucket|object)_)?(upload|copy)", name) and callable(value):
            setattr(module, name, _refusal(f"boto3 {name}", value))
