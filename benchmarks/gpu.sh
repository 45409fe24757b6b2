#!/usr/bin/env bash
# All GPU measurements of training in one go (some minutes on one card): benchmarks/gpu.sh [RESULT.json]
# Needs the extra `bench`. Random weights, no download; see benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TQDM_DISABLE=1 \
    "${PYTHON:-.venv/bin/python}" benchmarks/gpu.py --out "${1:-gpu.json}"
