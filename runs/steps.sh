# What the runs share. They source this file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}

run() { # run SCRIPT FLAGS..
  "$python" "$here/$1" "${@:2}"
}

result() { :; } # result LOG: what a step's line says behind its seconds

step() { # step FOLDER NAME COMMAND..: run it once, into a log in FOLDER; one line when it is done
  local start=$SECONDS log
  log=$1/$(tr -cs 'A-Za-z0-9\n' '-' <<<"$2").log
  mkdir -p "$1"
  exec 9>"$log.lock"
  ! command -v flock >/dev/null || flock 9 # another copy may be at this step: it is done then
  if [[ -f $log.done && $(<"$log.done") == "${*:3}" ]]; then
    printf '%-56s done before%s\n' "$2" "$(result "$log")"
  elif "${@:3}" >>"$log" 2>&1; then
    printf '%s' "${*:3}" >"$log.done"
    printf '%-56s %5d s%s\n' "$2" $((SECONDS - start)) "$(result "$log")"
  else
    printf '%-56s failed: %s (%s)\n' "$2" \
      "$(tail -n 5 "$log" | grep -a 'error:' || tail -n 1 "$log")" "$log"
    return 1
  fi
}
