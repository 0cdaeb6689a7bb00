#!/usr/bin/env bash
# Makes .venv and installs what is missing, then trains: launch/run.sh --config=configs/grpo.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
exec python -m rlver_jax.main "$@"
