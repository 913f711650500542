#!/usr/bin/env bash
# From a folder of raw tars to everything the real runs need: photographs and drawn scenes as shards, hard negatives,
# benchmark rows and pictures. Three and a half minutes of CPU time.
#   examples/prepare_shared_data.sh [DATA]      DATA: the folder to fill, default data/
# The raw tars (Flickr8k, COCO subset, SugarCrepe rows, CoDraw scenes, ...) lie in $CLIPKIT_SHARED/data.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
raw=$(realpath "${CLIPKIT_SHARED:-$here/../shared}/data")
data=${1:-$here/data}
export PATH="$here/.venv/bin:$PATH"
mkdir -p "$data"

# What is used as it is: evaluation pictures, dev shards, the weights of the locked image tower.
ln -sf "$raw"/*.tar "$raw"/*.safetensors "$data"

# Flickr8k: 6,000 training photographs, five captions each; negatives beside the captions.
clipkit negatives make "$data"/flickr8k_train-*.tar --out "$data/flickr8k" --per-kind 2 --workers 2

# Abstract Scenes: drawn from their pieces; the scenes of the minimal pairs stay out. Once more with exact counterfactuals.
plain=$(mktemp -d "$data/plain.XXXXXX")
trap 'rm -rf "$plain"' EXIT
scenes=(shards build "$data/codraw_scenes.tar" --from abstract_scenes --out "$plain")
clipkit "${scenes[@]}" --set split=train --name train
clipkit "${scenes[@]}" --set split=val --set per_scene=5 --name dev
clipkit negatives make "$plain"/*.tar --out "$data/abstract_scenes" --per-kind 2 --workers 2
exchanges=(--set counterfactuals=true --set names=0.3 --set statements=4 --overwrite)
clipkit shards build "$data/codraw_scenes.tar" --from abstract_scenes --out "$data/abstract_exchanges" --name train "${exchanges[@]}"

# Compositional rows, in the versions that eval/compositional/ describes.
convert() { clipkit bench convert "$@" --out "$data/bench"; }
convert sugarcrepe "$data/sugarcrepe_rows.tar"
convert vsr "$data/sugarcrepe_rows.tar"
convert valse "$data/sugarcrepe_rows.tar" --set "pictures=$data/coco_val2017-000.tar"
convert abstract_scenes_pairs "$data/codraw_scenes.tar"
convert abstract_scenes_choice "$data/codraw_scenes.tar"
convert flickr8k_order "$data/flickr8k_dev-000.tar"

# NLVR: the tar holds the pictures without the folders that its rows name.
for name in nlvr nlvr_pairs; do clipkit bench convert $name "$raw/../annotations/nlvr" --out "$data/published"; done
python - "$data" <<'PYTHON'
import json, sys, tarfile
from pathlib import Path
data = Path(sys.argv[1])
rows = map(json.loads, (data / "published/nlvr.jsonl").read_text().splitlines())
places = {Path(image["path"]).name: data / "nlvr" / image["path"] for row in rows for image in row["images"]}
with tarfile.open(data / "nlvr1.tar") as tar:
    for member in tar:
        if place := places.get(Path(member.name).name):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(tar.extractfile(member).read())
PYTHON

clipkit bench check --root "*=$data" \
  flickr8k_dev flickr8k_order sugarcrepe_subset valse_subset vsr_subset \
  abstract_scenes_dev abstract_scenes_pairs abstract_scenes_choice nlvr nlvr_pairs
