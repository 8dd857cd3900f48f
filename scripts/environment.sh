# Sourced by the scripts beside it: a virtual environment that belongs to this checkout.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The first Python >= 3.11 of those that usually exist. If $PYTHON is set, no other is tried.
find_python() {
    local python candidates=(python3.11 python3.12 python3.13 python3 python)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    if [[ -n ${PYTHON:-} ]]; then
        echo "error: PYTHON=$PYTHON is not a Python >= 3.11 that runs" >&2
    else
        echo "error: no Python >= 3.11 was found; name one with PYTHON=/path/to/python" >&2
    fi
    return 1
}

# ensure_environment FOLDER REQUIREMENT: makes the virtual environment FOLDER and installs
# REQUIREMENT, a pip requirement on this checkout, in it. An environment that exists is used again
# if it was made for the same requirement, pyproject.toml and checkout, by the same Python.
ensure_environment() {
    local folder=$1 requirement=$2 stamp=$1/installed-for log=$1/install.log
    local python version wanted
    python=$(find_python)
    # A virtual environment has the same version and prefix as the interpreter that made it.
    version=$("$python" -c 'import sys; print(sys.version.split()[0], "of", sys.base_prefix)')
    wanted="$requirement $(cksum <pyproject.toml) in $PWD, Python $version"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$folder/bin/python" -c '' 2>/dev/null; then
        echo "Using the environment $folder again (Python $version; remove the folder to start afresh)."
        return
    fi
    trap 'echo "Interrupted; the next run starts again." >&2; exit 130' INT
    rm -rf "$folder"
    mkdir "$folder"
    echo "Making the environment $folder with Python $version."
    "$python" -m venv "$folder" &>"$log" || installing_failed "$requirement" "$log"
    echo "Installing $requirement into it: a minute or two, less if pip has the packages in its cache."
    "$folder/bin/python" -m pip install --disable-pip-version-check --no-input \
        --editable "$requirement" 2>&1 | logged "$log" || installing_failed "$requirement" "$log"
    trap - INT
    echo "$wanted" >"$stamp"
}

# logged LOG: appends its input to LOG. Every ten seconds it prints the line that came last.
logged() (
    trap '' INT # pip has a last word to say, which belongs into the log
    local line="" last="starting" code printed=$SECONDS
    while true; do
        code=0
        IFS= read -r -t 10 line || code=$?
        if ((code == 0)); then
            echo "$line" >>"$1"
            last=$line
            [[ $line != *Retrying* ]] || last="the package index does not answer; pip asks again"
        elif ((code <= 128)); then # the end; above 128, nothing came in time
            return
        fi
        if ((SECONDS - printed >= 10)); then
            printed=$SECONDS
            echo "  $SECONDS s: $(cut -c -80 <<<"${last#"${last%%[![:space:]]*}"}")"
        fi
    done
)

# installing_failed REQUIREMENT LOG: says in one line what to do, and ends the script.
installing_failed() {
    local advice="see there what is wrong"
    if grep -qE 'Connection|connection|Temporary failure|ProxyError|timed out|SSLError' "$2"; then
        advice="the package index cannot be reached: check the network, or name an index with PIP_INDEX_URL=..., and run this again"
    elif grep -q 'ensurepip' "$2"; then
        advice="this Python lacks ensurepip: install it (Debian: apt install python3-venv), or name another with PYTHON=..."
    fi
    echo "error: $1 was not installed; $advice (pip's output: $2)" >&2
    exit 1
}
