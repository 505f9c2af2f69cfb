#!/usr/bin/env bash
# Compare ldm with diffusers at full size, with random weights, and write a report for each comparison into this folder:
#
#   bash tests/parity/run.sh cuda      # a card of 24 GB or more: the models' own sizes, in three dtypes
#   bash tests/parity/run.sh cpu       # 24 GB of memory: small pictures
#   bash tests/parity/run.sh cuda sdxl float16        # one of them
#
# Exit status 1 if one of them differs; the others are made all the same.
set -u
cd "$(dirname "$0")"
device=${1:?say cuda or cpu}
model=${2:-}
dtype=${3:-}
failed=0

compare() { # NAME DTYPE [further options]
    [ -z "$model" ] || [ "$model" = "$1" ] || return 0
    [ -z "$dtype" ] || [ "$dtype" = "$2" ] || return 0
    local name="$1-$2-$device"
    echo "== $name"
    ldm parity --random-init "$1" --dtype "$2" --device "$device" "${@:3}" --html "$name.html" ||
        failed=1
}

if [ "$device" = cpu ]; then
    compare sd15 float32 --size 128x192 --steps 2
    compare sd21 float32 --size 128x192 --steps 2
    compare sd15-controlnet float32 --size 128x192 --steps 2
    compare sdxl bfloat16 --size 128x192 --steps 2
    compare sdxl-refiner bfloat16 --size 128x192 --steps 2
else
    for each in float32 float16 bfloat16; do
        for name in sd15 sd21 sdxl sdxl-refiner sd15-controlnet sdxl-controlnet; do
            compare "$name" "$each"
        done
    done
    compare flux-schnell bfloat16 --size 1024x1024 # 60 GB: transformer and T5, and a layer in float32
    compare flux-dev bfloat16 --size 1024x1024
fi
exit $failed
