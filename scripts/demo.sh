#!/usr/bin/env bash
# From an empty clone to detections: set up, build the archive, serve it, send an image with curl.
#   ./scripts/demo.sh                  ends the server when done
#   ./scripts/demo.sh --keep-serving   leaves it running until Ctrl-C
set -euo pipefail
cd "$(dirname "$0")/.."
keep_serving=no
case "${1:-}" in
    "") ;;
    --keep-serving) keep_serving=yes ;;
    *) echo "usage: $0 [--keep-serving]" >&2; exit 2 ;;
esac
trap 'exit 130' INT # what was running says that it was interrupted
trap 'exit 143' TERM
command -v curl >/dev/null || { echo "demo: curl is needed and was not found" >&2; exit 1; }

. scripts/setup_environment.sh
setup_environment requirements.txt

echo "== Building model_store/damoyolo.mar from the embedded demo weights"
python scripts/build_archive.py

sample=tests/data/smears/smear_3.jpg
drawn=output/smear_3_detected.jpg
mkdir -p output
ready_file=$(mktemp)
partial=$drawn.$$  # moved into place when complete: another demo may write the same image
server=
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
    rm -f "$ready_file" "$partial"
}
trap finish EXIT

# A proxy cannot reach this machine's own addresses, and options of ~/.curlrc are for other calls.
ask() { curl -q --noproxy '*' --silent --show-error --fail-with-body --max-time 120 -X POST "$@"; }

echo "== Starting TorchServe"
# One demo at a time until it listens: two could find the same port free.
exec 8<"${TMPDIR:-/tmp}"
if command -v flock >/dev/null; then flock 8; fi
# In a session of its own: Ctrl-C reaches it once, by way of `finish`, and so lets it answer what it accepted.
setsid python scripts/serve.py --any-port --ready-file "$ready_file" 8<&- &
server=$!
until [ -s "$ready_file" ]; do
    kill -0 "$server" 2>/dev/null || { server=; echo "demo: the server did not start, see above" >&2; exit 1; }
    sleep 0.2
done
exec 8<&-
url=$(cat "$ready_file")/predictions/damoyolo

echo "== curl -X POST $url -T $sample"
ask "$url" -T "$sample" | python -c '
import json, sys
answer = json.load(sys.stdin)
print("%d x %d pixels, %d detections:" % (answer["width"], answer["height"], len(answer["detections"])))
for found in answer["detections"]:
    label = found["label"].encode("unicode_escape").decode()  # data, not for the terminal to obey
    print("  %-10s %.3f  x1 %6.1f  y1 %6.1f  x2 %6.1f  y2 %6.1f" % (label, found["score"], *found["bbox"]))'
ask "$url" -T "$sample" -H 'Accept: image/jpeg' -o "$partial"
mv "$partial" "$drawn"
echo "== The image with its detections drawn: $drawn"

if [ "$keep_serving" = yes ]; then
    echo "== Serving on until Ctrl-C"
    wait "$server"
else
    echo "== Ending the server. To serve on: .venv/bin/python scripts/serve.py"
fi
