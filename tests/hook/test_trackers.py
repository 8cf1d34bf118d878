"""Trackers are off and remote stores are not written to, shown on stand-ins of the libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import upshift.hook.isolate as isolate
from upshift.hook.isolate.trackers import RemoteWriteRefused, trial_environment

SOURCE = Path(isolate.__file__).parents[3]

LIBRARIES = {
    "huggingface_hub/__init__.py": "from .hf_api import HfApi, upload_file, model_info, create_repo",
    "huggingface_hub/hf_api.py": """
class HfApi:
    endpoint = 'https://hub'
    def upload_file(self, path): return 'written'
    def create_repo(self, name): return 'written'
    def super_squash_history(self, name): return 'written'
    def model_info(self, name): return 'read'
    def list_models(self): return 'read'
    def hf_hub_download(self, name): return 'read'
api = HfApi()
upload_file = api.upload_file
create_repo = api.create_repo
model_info = api.model_info
""",
    "huggingface_hub/hub_mixin.py": """
class ModelHubMixin:
    def push_to_hub(self): return 'written'
    def save_pretrained(self): return 'local'
""",
    "botocore/__init__.py": "",
    "botocore/client.py": """
class BaseClient:
    def _make_api_call(self, operation_name, api_params): return operation_name
""",
    "aiobotocore/__init__.py": "",
    "aiobotocore/client.py": """
class AioBaseClient:
    async def _make_api_call(self, operation_name, api_params): return operation_name
""",
    "boto3/__init__.py": "",
    "boto3/s3/__init__.py": "",
    "boto3/s3/inject.py": """
def upload_file(self, *a): return 'written'
def bucket_upload_file(self, *a): return 'written'
def download_file(self, *a): return 'read'
""",
    "google/cloud/storage/__init__.py": "from .blob import Blob",
    "google/cloud/storage/blob.py": """
class Blob:
    def upload_from_filename(self, name): return 'written'
    def _initiate_resumable_upload(self): return 'written'
    def open(self, mode='r'): return self._initiate_resumable_upload() if 'w' in mode else 'read'
    def download_to_filename(self, name): return 'read'
""",
    "azure/storage/blob/__init__.py": """
class BlobClient:
    def upload_blob(self, data): return 'written'
    def download_blob(self): return 'read'
class ContainerClient:
    def delete_blob(self, name): return 'written'
    def list_blobs(self): return 'read'
""",
    "wandb/__init__.py": "def init(project=None, mode=None): return mode",
    "swanlab/__init__.py": "def init(*, mode=None): return mode",
    "mlflow/__init__.py": "from mlflow.tracking import set_tracking_uri, get_tracking_uri, MlflowClient",
    "mlflow/tracking/__init__.py": """
from mlflow.tracking._tracking_service.utils import set_tracking_uri, get_tracking_uri
from mlflow.tracking._tracking_service import utils
class MlflowClient:
    def __init__(self, tracking_uri=None): self.uri = utils._resolve_tracking_uri(tracking_uri)
""",
    "mlflow/tracking/_tracking_service/__init__.py": "",
    "mlflow/tracking/_tracking_service/utils.py": """
import os
uri = None
def set_tracking_uri(new):
    global uri
    uri = new
def get_tracking_uri(): return uri or os.environ.get('MLFLOW_TRACKING_URI')
def _resolve_tracking_uri(given=None): return given or get_tracking_uri()
""",
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("libraries")
    for name, text in LIBRARIES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def run(libraries: Path, code: str) -> Any:
    """What `code` stored in `out` in a fresh process; `do(f, ...)` gives a result or an error's name."""
    preamble = """
import json, sys
from pathlib import Path
from upshift.hook.isolate import trackers
out = {}
def do(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except trackers.RemoteWriteRefused as error:
        assert '--allow-remote-writes' in str(error)
        return 'refused'
"""
    done = subprocess.run(
        [sys.executable, "-c", preamble + code + "\nprint(json.dumps(out))"],
        env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{libraries}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CALLS = """
assert not {'huggingface_hub', 'botocore', 'google', 'azure', 'wandb', 'mlflow'} & set(sys.modules)
import asyncio, huggingface_hub, huggingface_hub.hub_mixin, botocore.client, aiobotocore.client, boto3.s3.inject
import google.cloud.storage, azure.storage.blob
api, blob = huggingface_hub.HfApi(), google.cloud.storage.Blob()
aws, container = botocore.client.BaseClient(), azure.storage.blob.ContainerClient()
out = {
    'hub': [do(api.upload_file, 'x'), do(api.create_repo, 'x'), do(api.super_squash_history, 'x')],
    'hub functions': [do(huggingface_hub.upload_file, 'x'), do(huggingface_hub.create_repo, 'x')],
    'hub reads': [do(api.model_info, 'x'), do(huggingface_hub.model_info, 'x'), do(api.list_models), api.endpoint,
                  do(api.hf_hub_download, 'x')],
    'mixin': [do(huggingface_hub.hub_mixin.ModelHubMixin().push_to_hub),
              do(huggingface_hub.hub_mixin.ModelHubMixin().save_pretrained)],
    'aws': [do(aws._make_api_call, name, {}) for name in
            ('PutObject', 'UploadPart', 'DeleteObjects', 'GetObject', 'ListObjectsV2', 'CreateSession', 'AssumeRole')],
    'async aws': do(lambda: asyncio.run(aiobotocore.client.AioBaseClient()._make_api_call('PutObject', {}))),
    'async reads': do(lambda: asyncio.run(aiobotocore.client.AioBaseClient()._make_api_call('GetObject', {}))),
    'boto3': [do(boto3.s3.inject.upload_file, None), do(boto3.s3.inject.bucket_upload_file, None),
              do(boto3.s3.inject.download_file, None)],
    'google': [do(blob.upload_from_filename, 'x'), do(blob.open, 'wb'), do(blob.open),
               do(blob.download_to_filename, 'x')],
    'azure': [do(azure.storage.blob.BlobClient().upload_blob, b''), do(container.delete_blob, 'x'),
              do(azure.storage.blob.BlobClient().download_blob), do(container.list_blobs)],
}
"""


def test_remote_writes_are_refused_and_reads_go_on(libraries: Path) -> None:
    assert run(libraries, "trackers.refuse_remote_writes(False)" + CALLS) == {
        "hub": ["refused"] * 3,
        "hub functions": ["refused"] * 2,
        "hub reads": ["read", "read", "read", "https://hub", "read"],
        "mixin": ["refused", "local"],
        "aws": ["refused", "refused", "refused", "GetObject", "ListObjectsV2", "CreateSession", "AssumeRole"],
        "async aws": "refused",
        "async reads": "GetObject",
        "boto3": ["refused", "refused", "read"],
        "google": ["refused", "refused", "read", "read"],
        "azure": ["refused", "refused", "read", "read"],
    }


def test_remote_writes_that_are_allowed(libraries: Path) -> None:
    found = run(libraries, "trackers.refuse_remote_writes(True)" + CALLS)
    assert "refused" not in json.dumps(found)


def test_libraries_imported_before(libraries: Path) -> None:
    code = """
import huggingface_hub
trackers.refuse_remote_writes(False)
out = do(huggingface_hub.HfApi().upload_file, 'x')
"""
    assert run(libraries, code) == "refused"


def test_trackers_stay_off_against_the_scripts_wish(libraries: Path, tmp_path: Path) -> None:
    local = trial_environment(tmp_path)["MLFLOW_TRACKING_URI"]
    code = f"""
trackers.switch_off_trackers(Path({str(tmp_path)!r}))
import wandb, swanlab, mlflow
out = {{'wandb': [wandb.init(mode='online'), wandb.init('project'), swanlab.init(mode='cloud')], 'mlflow': []}}
for uri in ('https://server:5000', 'databricks', 'postgresql://db/x', 'sqlite:///mine.db', './mlruns', 'file:///m'):
    mlflow.set_tracking_uri(uri)
    out['mlflow'].append(mlflow.get_tracking_uri())
out['clients'] = [mlflow.MlflowClient(tracking_uri='http://server').uri, mlflow.MlflowClient('./m').uri]
"""
    assert run(libraries, code) == {
        "wandb": ["disabled"] * 3,
        "mlflow": [local, local, local, "sqlite:///mine.db", "./mlruns", "file:///m"],
        "clients": [local, "./m"],
    }


def test_the_environment_of_trials(tmp_path: Path) -> None:
    found = trial_environment(tmp_path / "with space")
    assert found["WANDB_MODE"] == "disabled" and found["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert found["MLFLOW_TRACKING_URI"] == (tmp_path / "with space" / "mlruns").as_uri()
    assert all(isinstance(value, str) and value for value in found.values())
    assert not list(tmp_path.iterdir())


def test_a_refusal_names_the_call_and_the_remedy() -> None:
    error = RemoteWriteRefused("HfApi.upload_file")
    assert "HfApi.upload_file" in error.message and "--allow-remote-writes" in error.remedy
