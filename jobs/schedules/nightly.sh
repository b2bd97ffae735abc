#!/usr/bin/env bash
# One night's regression gate: what cron, systemd, a workflow or a CronJob starts   (jobs/schedules/README.md)
#
#   nightly.sh [SUITE] [key=value ...]
#
# SUITE is nightly unless said; what follows goes on to `pagemill regression`. Environment:
#   PAGEMILL_BIN             folder of python and ray, absolute [/opt/pagemill/bin]
#   PAGEMILL_RESULTS         results, absolute; where nodes are submitted to, they all see it
#   PAGEMILL_CACHE           cache, absolute [pagemill's own]
#   PAGEMILL_TRACKING_URI    MLflow's, where baselines live [a local one below the results]
#   PAGEMILL_GIT_SHA         names the commit where the checkout has no .git
#   PAGEMILL_...             what a suite reads besides (conf/suite, conf/model); goes along to a cluster
#   RAY_API_SERVER_ADDRESS   a cluster's dashboard: the gate is submitted there; empty or unset: it runs here
#   RAY_AUTH_TOKEN_PATH      the cluster's token, mode 0600 [~/.ray/pagemill_token]; or RAY_AUTH_TOKEN itself
#
# A try is called pagemill-SUITE-DATE-COMMIT-NUMBER, which is the submission id too, and its last line is kept
# as <results>/nightly/<name>.json. One that came to a verdict is not run again: its exit code is passed on. One
# that did not is followed by the next number. Exit codes are pagemill's: 0 passed, 1 a regression, 2 refused,
# 3 incomplete, 4 a bug, 130 interrupted. Standard output is pagemill's one JSON line, all else goes to standard
# error.
set -Eeuo pipefail
shopt -s inherit_errexit
trap 'say "line $LINENO failed"; exit 4' ERR # of a gate, 1 would mean a regression

readonly MOST_TRIES=9 MOST_SILENCES=20
say() { printf 'nightly: %s\n' "$*" >&2; }
refuse() {
    say "$1"
    exit 2
}

suite=nightly
if [[ $# -gt 0 && $1 != *=* ]]; then
    suite=$1
    shift
fi
[[ $suite =~ ^[A-Za-z0-9_-]+$ ]] || refuse "suite $suite: expected letters, digits, _ and -"
bin=${PAGEMILL_BIN:-/opt/pagemill/bin}
results=${PAGEMILL_RESULTS:-}
cache=${PAGEMILL_CACHE:-}
cluster=${RAY_API_SERVER_ADDRESS:-}
[[ $bin == /* && -x $bin/python ]] || refuse "PAGEMILL_BIN=$bin: expected an absolute folder with python in it"
[[ $results == /* ]] || refuse "PAGEMILL_RESULTS=$results: expected an absolute folder"
[[ -z $cache || $cache == /* ]] || refuse "PAGEMILL_CACHE=$cache: expected an absolute folder"
checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd -- "$checkout" # `python -m` takes the checkout's code, so the commit in the name is what is judged

words=("suite=$suite" action=check "paths.results=$results")
[[ -z $cache ]] || words+=("paths.cache=$cache")
[[ -z ${PAGEMILL_TRACKING_URI:-} ]] || words+=(tracking=server "tracking.uri=$PAGEMILL_TRACKING_URI")
if [[ -n $cluster ]]; then
    [[ -x $bin/ray ]] || refuse "PAGEMILL_BIN=$bin: has no ray, and RAY_API_SERVER_ADDRESS names a cluster"
    words+=(cluster=ray cluster.address=auto)
    export RAY_AUTH_MODE=token
    if [[ -z ${RAY_AUTH_TOKEN:-} ]]; then
        unset RAY_AUTH_TOKEN
        export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-${HOME:-}/.ray/pagemill_token}
        [[ -r $RAY_AUTH_TOKEN_PATH ]] || refuse "$RAY_AUTH_TOKEN_PATH: no token there; see jobs/README.md, A token"
        mode=$(stat -L -c %a -- "$RAY_AUTH_TOKEN_PATH")
        [[ $mode == [46]00 ]] || refuse "$RAY_AUTH_TOKEN_PATH: mode $mode lets others read it; chmod 600 it"
    fi
fi
words+=("$@")

commit=${PAGEMILL_GIT_SHA:-$(git rev-parse HEAD 2>/dev/null || true)}
[[ $commit =~ ^[A-Za-z0-9]*$ ]] || refuse "PAGEMILL_GIT_SHA=$commit: expected letters and digits"
[[ -n $commit ]] || say "$checkout: not a checkout that git reads; the commit is called unknown"
export PAGEMILL_GIT_SHA=$commit
name=pagemill-$suite-$(date -u +%Y%m%d)-${commit:0:12}
[[ -n $commit ]] || name+=unknown
kept=$results/nightly
{ mkdir -p -- "$kept" && : >>"$kept/lock"; } || refuse "PAGEMILL_RESULTS=$results: cannot be written"

# Two gates at once would slow each other down. The kernel frees the lock when the last process of a gate ends,
# however it ends; the file's text only says who that was.
exec 9>>"$kept/lock"
held=$(<"$kept/lock")
if ! flock --nonblock 9; then
    if [[ $held == "$name"-* ]]; then
        say "$held is on its way already"
        exit 0
    fi
    refuse "${held:-another one} is still on its way, so $name is not begun"
fi
[[ -z $held ]] || say "$held died; its lock is taken over"
trap ': >"$kept/lock"' EXIT

# Set code, and the files of the verdict, to what a try's last line says; empty where it does not.
read_line() {
    code="" files=()
    [[ -s $1 ]] || return 0
    mapfile -t files < <("$bin/python" -c '
import json, sys
try:
    line = dict(json.load(open(sys.argv[1])))
except (OSError, ValueError, TypeError):
    line = {}
for key in ("exit_code", "summary", "junit", "report"):
    print("" if line.get(key) is None else line[key])' "$1")
    code=${files[0]:-}
    files=("${files[@]:1}")
}

# Run a try here; its output is left in $1.
run_here() {
    "$bin/python" -m jobs.regression "${words[@]}" >"$1" || true
}

# Have the cluster run a try, or join one that was submitted before; its output is left in $1.
run_there() {
    local out=$1 status="" silences=0 variables=() variable told
    for variable in "${!PAGEMILL_@}"; do
        [[ $variable =~ _(BIN|RESULTS|CACHE|TRACKING_URI)$ ]] || variables+=("$variable=${!variable}")
    done
    if ! told=$("$bin/ray" job submit --address "$cluster" --submission-id "$try" --no-wait \
        --working-dir . --runtime-env jobs/deploy/runtime_env.yaml -- \
        env "${variables[@]}" "$bin/python" -m jobs.regression "${words[@]}" 2>&1); then
        [[ $told == *"already exists"* ]] || {
            printf '%s\n' "$told" >&2
            refuse "$cluster: $try could not be submitted"
        }
        say "$try was submitted before; what becomes of it is passed on"
    fi
    while true; do
        "$bin/ray" job logs --address "$cluster" --follow "$try" >&2 || true
        status=$("$bin/ray" job status --address "$cluster" "$try" 2>&1) || status="no answer: $status"
        case $status in
        *"Job '$try' succeeded"* | *"Job '$try' failed"* | *"Job '$try' was stopped"*) break ;;
        "no answer"*) silences=$((silences + 1)) ;;
        *) silences=0 ;;
        esac
        if ((silences > MOST_SILENCES)); then
            say "$cluster: $status"
            say "it is not known what becomes of $try; run this again to join it"
            exit 3
        fi
        sleep 30
    done
    "$bin/ray" job logs --address "$cluster" "$try" >"$out"
}

# Say what a try came to, which was read from $1, and end with its exit code.
pass_on() {
    local file
    cat -- "$1"
    if [[ -n ${GITHUB_STEP_SUMMARY:-} && -r ${files[0]:-} ]]; then
        cat -- "${files[0]}" >>"$GITHUB_STEP_SUMMARY" || say "${files[0]}: not added to the workflow's summary"
    fi
    for file in "${files[@]}"; do
        [[ ! -r $file ]] || cp -- "$file" "$kept/latest.${file##*.}" || say "$file: not copied"
    done
    exit "$code"
}

for ((number = 1; number <= MOST_TRIES; number++)); do
    try=$name-$number
    record=$kept/$try.json
    read_line "$record"
    case $code in
    0 | 1)
        say "$try already ran, with exit code $code"
        pass_on "$record"
        ;;
    [0-9]*)
        say "$try ended with exit code $code; this is the next one"
        continue
        ;;
    esac
    printf '%s, process %d on %s' "$try" $$ "$HOSTNAME" >"$kept/lock"
    say "$try begins"
    out=$kept/$try.log
    if [[ -n $cluster ]]; then run_there "$out"; else run_here "$out"; fi
    grep '^{"job":' -- "$out" | tail -n 1 >"$record.new" || true
    read_line "$record.new"
    if [[ ! $code =~ ^[0-9]+$ ]]; then
        say "$try ended without its last line; its output is in $out"
        code=3
        printf '{"job": "regression", "ok": false, "exit_code": 3}\n' >"$record.new"
    fi
    mv -- "$record.new" "$record"
    say "$try ended with exit code $code"
    pass_on "$record"
done
refuse "$name was tried $MOST_TRIES times; see $kept"
