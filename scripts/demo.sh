#!/usr/bin/env bash
# The main job on two example scripts: diagnose, tune, run stock and planned, compare. Real data, a few minutes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${UPSHIFT_DEMO:-$root/.upshift/demo}
mkdir -p "$work"
cp "$root/examples/char_gpt.py" "$root/examples/digits.py" "$work"
cd "$work"
title() { printf '\n== %s\n' "$*" >&2; }

one() { # NAME BUDGET "ARGUMENTS OF THE FULL JOB" "ARGUMENTS OF A SHORT RUN"
    local name=$1 budget=$2 full=$3 short=$4
    title "$name: where does the time go?"
    upshift diagnose --seconds 10 "$name.py" $full
    title "$name: what makes it faster, and is the result as good?"
    upshift tune --budget "${UPSHIFT_DEMO_BUDGET:-$budget}" "$name.py" $full
    title "$name: a short run as written, then one with the plan"
    rm -rf runs
    upshift run --runs runs --no-plan "$name.py" $short
    upshift run --runs runs "$name.py" $short
    upshift compare --names "as written,planned" --html ".upshift/reports/$name-compare.html" runs/*
}

one digits 105s "" "--epochs 2"
one char_gpt 120s "--sample 0" "--sample 0 --max-steps 30"
title "reports"
for page in .upshift/reports/*.html; do echo "$work/$page" >&2; done
