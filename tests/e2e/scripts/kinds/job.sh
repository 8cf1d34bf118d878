#!/bin/sh
# A job as it is handed to a scheduler: settings, then two trainings one after the other.
set -eu
here=$(dirname "$0")
export RUN_NAME=job OMP_NUM_THREADS=1
for config in tiny_mlp tiny_convnet; do
    echo "== $config"
    python "$here/timm_style.py" -c "$here/timm_style.yaml" --model "$config" --output "out/$config"
done
