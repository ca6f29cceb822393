# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# Shared by the scripts: where the cache is, how a missing package is said, how a long step is shown.
# Sourced, never run.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -n "${AIRLOCK_CACHE:-}${XDG_CACHE_HOME:-}${HOME:-}" ] || { echo "error: HOME is not set; set it, or AIRLOCK_CACHE" >&2; exit 1; }
cache=${AIRLOCK_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/airlock}
# What cargo makes goes to the cache too, unless the user says otherwise.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
bin_dir=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release

# fail WHAT DO: one line saying what happened and what to do, exit 1.
fail() {
    echo "error: $1; $2" >&2
    exit 1
}

mkdir -p "$cache" 2>/dev/null || fail "the cache folder $cache cannot be made" "set AIRLOCK_CACHE to a folder of yours"

wanted=()

# want WHY PACKAGE...: notes the packages that are missing, saying why they are needed.
want() {
    local why=$1 package
    shift
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed && continue
        echo "      missing: $package, $why" >&2
        wanted+=("$package")
    done
}

# install_wanted: installs them from apt; without root it prints the one command to run and fails.
install_wanted() {
    [ ${#wanted[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        fail "installing packages takes root" "run: sudo apt-get install --no-install-recommends -y ${wanted[*]}"
    fi
    step "installing ${wanted[*]}" apt_install "${wanted[@]}"
    wanted=()
}

# need_packages WHY PACKAGE...: both of the above.
need_packages() {
    want "$@"
    install_wanted
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get -o DPkg::Lock::Timeout=300 install --no-install-recommends -y "$@")
    # A new machine has no package lists; an old one may have stale ones. Try with what is there first.
    "${install[@]}" || { apt-get update && "${install[@]}"; }
}

# need_rust COMPONENT...: cargo, a C linker for it, and these components.
need_rust() {
    local component
    [ -z "${HOME:-}" ] || PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || fail "there is no cargo" "install the Rust toolchain: https://rustup.rs"
    for component in "$@"; do
        cargo "$component" --version >/dev/null 2>&1 || fail "cargo $component is missing" "run: rustup component add $component"
    done
    want "which rustc links with" gcc libc6-dev
}

step_group=''
stop_step() { [ -z "$step_group" ] || kill -- "-$step_group" 2>/dev/null || true; }
trap stop_step EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# step TEXT COMMAND...: runs COMMAND with its output kept in a log, shows TEXT with the seconds gone by, and on
# failure prints the end of that log and exits. Interrupted, it takes the command down with it.
step() {
    run_step "$@"
    [ "$step_status" = 0 ] || fail "this step failed: $1" "the whole log is $step_log"
}

# run_step TEXT COMMAND...: the same, but leaves the status in step_status. (A return value would need the caller to
# test it, and bash then ignores `set -e` within COMMAND.)
run_step() {
    local text=$1 log start shown=0 gone
    shift
    step_status=0
    mkdir -p "$cache/logs"
    log=$cache/logs/$(echo "$text" | tr -c 'a-zA-Z0-9\n' '-' | cut -c1-60).log
    start=$SECONDS
    [ -t 2 ] || echo "      $text" >&2
    set -m # a process group of its own, to be ended as a whole
    "$@" >"$log" 2>&1 </dev/null &
    step_group=$!
    set +m
    while kill -0 "$step_group" 2>/dev/null; do
        gone=$((SECONDS - start))
        if [ -t 2 ]; then
            printf '\r\033[K%4ds %s: %.50s' "$gone" "$text" "$(tail -c 300 "$log" | tr '\r' '\n' | tail -n 1 | tr -cd '[:print:]')" >&2
        elif [ $((gone - shown)) -ge 30 ]; then
            shown=$gone
            printf '%4ds %s ...\n' "$gone" "$text" >&2
        fi
        sleep 0.1
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
    wait "$step_group" || step_status=$?
    step_group="" step_log=$log
    [ "$step_status" = 0 ] || tail -n 30 "$log" >&2
    printf '%4ds %s\n' $((SECONDS - start)) "$text" >&2
}

# cached NAME: whether kernels/NAME or images/NAME is whole.
cached() { [ -e "$cache/$1/kernel.json" ] || [ -e "$cache/$1/image.json" ]; }

# point LINK TARGET: makes or moves a symbolic link in one step, so that nobody sees it missing.
point() {
    ln -sfn "$2" "$1.new.$$"
    mv -T "$1.new.$$" "$1"
}

# remove_outdated KEEP PATTERN: removes what earlier versions of a script left beside KEEP, a day after they were made:
# something may still be starting from them.
remove_outdated() {
    find "${1%/*}" -maxdepth 1 -name "$2" ! -path "$1" -mtime +0 -exec rm -rf {} +
}
