#!/usr/bin/env bash
# SPICE on this machine, from nothing to a trained model: installs, fetches a small model and its texts, converts and
# indexes them, and starts the main job. Whatever is already done is skipped. No accelerator is needed.
#
#   bash examples/quickstart.sh [key.sub=value ...]        such as train.iterations=50 run.dir=runs/long
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe=examples/quickstart.yaml
assets=assets
python="${SPICE_VENV:-.venv}/bin/python"
model="$assets/smollm2-135m-instruct"
checkpoint="$assets/smollm2-135m-megatron"
texts="$assets/factbook.jsonl"
corpus="$assets/factbook"

say() { printf '\n[%4d s] %s\n' "$SECONDS" "$*"; }

# build NAME COMMAND...: runs COMMAND with {} replaced by a temporary name, and gives the result its name when it is whole.
build() {
  local name="$1" partial="$1.partial.$$"
  shift
  rm -rf "$name".partial.*
  if ! "${@//\{\}/$partial}"; then
    rm -rf "$partial"
    echo "quickstart.sh: $name could not be made; the reason stands above" >&2
    exit 1
  fi
  mv "$partial" "$name"
}

say "Installing"
bash install.sh
mkdir -p "$assets"

if [ ! -e "$model" ]; then
  say "Fetching SmolLM2-135M-Instruct (93 MB) -> $model"
  "$python" examples/fetch_assets.py model "$model"
fi
if [ ! -e "$texts" ]; then
  say "Fetching the World Factbook (3 MB) -> $texts"
  "$python" examples/fetch_assets.py texts "$texts"
fi
if [ ! -e "$checkpoint" ]; then
  say "Converting the model to a Megatron checkpoint -> $checkpoint"
  build "$checkpoint" "$python" tools/convert_checkpoint.py hf-to-megatron "$model" {}
fi
if [ ! -e "$corpus" ]; then
  say "Cutting the texts into passages -> $corpus"
  build "$corpus" "$python" tools/preprocess_corpus.py "$texts" --tokenizer "$model" --output {} \
    --max-tokens 160 --min-tokens 60 --source factbook
fi

SPICE_RUN_DIR=''
environment="$("$python" -m megatron_spice launch-env "$recipe" "$@")" || exit $?
eval "$environment"
say "Training: bash slurm/spice.sh $recipe $*"
bash slurm/spice.sh "$recipe" "$@"

say "What happened"
"$python" tools/report.py "$SPICE_RUN_DIR"
others=()
for override in "$@"; do
  [[ "$override" == train.iterations=* ]] || others+=("$override")
done
cat <<END

Where it lies:
  $SPICE_RUN_DIR/metrics.jsonl     a line an iteration
  $SPICE_RUN_DIR/episodes.jsonl    every passage played: attempts, tasks, answers, rewards
  $SPICE_RUN_DIR/tensorboard/      the same numbers for TensorBoard
To go on: bash slurm/spice.sh $recipe ${others[*]:+${others[*]} }train.iterations=50   (a run goes on from its newest checkpoint)
To read, in a browser: $SPICE_RUN_DIR/report.html
END
