# Sourced by the scripts beside it: a virtual environment of this checkout's own.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The first Python >= 3.11 of those that usually exist; $PYTHON, where set, is the only one asked.
find_python() {
    local python
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    echo "error: no Python >= 3.11 found; name one with PYTHON=/path/to/python" >&2
    return 1
}

# ensure_environment FOLDER REQUIREMENT: makes the virtual environment FOLDER and installs
# REQUIREMENT, a pip requirement on this checkout, in it. One that was made before for the same
# pyproject.toml is used again as it is.
ensure_environment() {
    local folder=$1 requirement=$2 stamp=$1/installed-for
    local wanted
    wanted="$requirement $(cksum <pyproject.toml)"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        echo "Using the environment $folder again (remove it to start afresh)."
        return
    fi
    local python
    python=$(find_python)
    echo "Making the environment $folder with $("$python" --version)."
    "$python" -m venv --clear "$folder"
    echo "Installing $requirement into it (about a minute where nothing is cached)."
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$requirement"
    echo "$wanted" >"$stamp"
}
