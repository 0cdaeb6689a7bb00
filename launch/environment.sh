# Sourced by the other scripts, in the repository's root: activates .venv, which is made on
# the first run and brought up to date whenever requirements.txt changes.
# RLVER_PYTHON names the interpreter (Python 3.11 or 3.12); RLVER_VENV another place.
venv="${RLVER_VENV:-.venv}"
find_python() {
  for candidate in ${RLVER_PYTHON:-} python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "launch: no Python 3.11 to 3.13 was found; set RLVER_PYTHON to one." >&2
  return 2
}
installed="$venv/requirements.installed"
if ! cmp -s requirements.txt "$installed"; then
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$venv"
  fi
  echo "Installing requirements into $venv (about 2 GB, a few minutes the first time) ..." >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$installed"
fi
source "$venv/bin/activate"
