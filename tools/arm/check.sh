#!/usr/bin/env bash
# What must hold on ARM, in the folder that build.sh made: tools/arm/check.sh FOLDER [RECORD.json]
#
# On both builds of llama.cpp: toy tests (EAGLE-3 heads are among them); SmolLM2 trimmed there and here to the same
# bytes, and proven there, with heads in F16, Q8_0 and Q4_0; an answer with each vocabulary equal to the target's own.
set -uo pipefail
project=$(cd "$(dirname "$0")/../.." && pwd)
record=${2:+$(realpath "$2")}
cd "${1:?the folder that build.sh made}"
python=$project/.venv/bin/python
arm() { "$project/tools/arm/enter.py" . sh -c 'cd /share/project && exec "$@"' sh "$@"; }
tests=${TESTS:-tests/test_cut.py tests/test_verify.py tests/test_keep.py tests/test_dynamic.py tests/test_cache.py tests/test_state_fed.py}
results=() failed=0
say() { printf '%s\n' "$1"; results+=("$1"); }
holds() {  # holds WHAT COMMAND...: say whether it does
  local what=$1 begun=$SECONDS; shift
  if "$@" > last.log 2>&1; then say "$what: passed ($((SECONDS - begun)) s)"; else failed=1; say "$what: FAILED"; tail -20 last.log; fi
}

rm -rf share/project && git clone -q "$project" share/project
if [ ! -e share/trimmed-Q4_0.gguf ]; then
  "$python" - share <<'P'
import subprocess, sys
from pathlib import Path
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import fetch
from llamabase.llama.quantize import quantize
share, source = Path(sys.argv[1]), fetch(load_catalog().models["smollm2-135m-instruct"])
for kind in ("F16", "Q8_0", "Q4_0"):
    drafter, trimmed = share / f"drafter-{kind}.gguf", share / f"trimmed-{kind}.gguf"
    quantize(source, drafter, kind)
    for words in (["trim", drafter, "-o", trimmed, "--k", "8192"], ["speculator", trimmed]):
        subprocess.run([sys.executable, "-m", "gguf_trim", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
P
fi

packages=root/usr/local/lib/python3.11/dist-packages
for build in ${BUILDS:-dotprod i8mm}; do
  ln -sfn lib-$build $packages/llama_cpp/lib
  holds "$build: toy tests" arm python3 -m pytest -p no:cacheprovider -o "addopts=-m 'not slow'" $tests
  say "$build: $(tail -1 last.log)"
  for kind in F16 Q8_0 Q4_0; do
    rm -f share/arm.gguf share/arm.vocab.gguf
    holds "$build: trim $kind" arm python3 -m gguf_trim trim /share/drafter-$kind.gguf -o /share/arm.gguf --k 8192
    holds "$build: the same bytes as on x86, $kind" cmp share/arm.gguf share/trimmed-$kind.gguf
    holds "$build: verify $kind" arm python3 -m gguf_trim verify /share/arm.gguf --source /share/drafter-$kind.gguf
    say "$build: $(grep -o 'greatest.*' last.log | head -1)"
  done
  chat() {
    arm python3 -m runner.chat --target /share/drafter-Q8_0.gguf -c 256 -n 12 --temp 0 --prompt "Why is the sky blue?" "$@"
  }
  chat --draft-max 0 > plain.txt 2> last.log || say "$build: plain decoding FAILED"
  for vocab in trim context spec; do
    chat --draft /share/trimmed-Q8_0.gguf --vocab $vocab --draft-max 3 > drafted.txt 2> last.log
    holds "$build: an answer with --vocab $vocab is the target's own" cmp plain.txt drafted.txt
  done
done

if [ -n "$record" ]; then
  printf '%s\n' "${results[@]}" | "$python" -c '
import datetime, json, platform, subprocess, sys
from importlib.metadata import version
commit = subprocess.check_output(["git", "-C", "share/project", "rev-parse", "--short", "HEAD"], text=True).strip()
print(json.dumps({"date": str(datetime.date.today()), "recipe": "tools/arm", "commit": commit, "emulated_by": "qemu-aarch64 on " + platform.machine(),
                  "llama_cpp_python": version("llama-cpp-python"), "results": sys.stdin.read().splitlines()}, indent=1))' > "$record"
fi
exit $failed
