#!/usr/bin/env bash
# Makes .venv and installs what is missing, then runs the tests. Arguments go to pytest;
# launch/test.sh -m "not slow" is the quick part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
exec python -m pytest "$@"
