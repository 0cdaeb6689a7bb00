#!/usr/bin/env bash
# Makes .venv and installs what is missing, then runs the tests. Arguments go to pytest;
# launch/test.sh -m "not slow" is the quick part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
# Two processes, each with whole test files, whose runs their tests share.
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
