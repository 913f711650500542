#!/usr/bin/env bash
# Which kind of negatives teaches what: short runs with one kind (or a few) each beside plain CLIP, one table a data set.
#   examples/by_kind.sh world|scenes|flickr8k      after `make demo` or prepare_shared_data.sh and the runs they start from
# Everything lies in by_kind/; what is there already is not done again. Five to ten minutes of one core each.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$here/.venv/bin:$PATH"
kinds=reshuffle,swap_nouns,swap_noun_phrases,swap_adjectives,replace_nouns,replace_adjectives,replace_relations,replace_verbs,negate
swaps=swap_nouns+swap_noun_phrases relations=replace_relations+replace_verbs
groups=reshuffle,$swaps+swap_adjectives,replace_nouns+replace_adjectives,$relations

case ${1:-} in
  world)
    clipkit negatives make 'demo/world/train-*.tar' --out by_kind/shards/world --kinds "$kinds" --usual 3
    groups=reshuffle,$swaps,swap_adjectives,replace_nouns,replace_adjectives,$relations,negate
    clipkit sweep clip negclip --by-kind "$groups" --on world_sweep --out by_kind/world samples=16_000 suite=world_dev \
      'data.train=[by_kind/shards/world/*.tar]' data.negatives=1 ;;
  scenes)
    clipkit negatives make 'data/abstract_scenes/train-*.tar' --out by_kind/shards/scenes --kinds "$kinds"
    clipkit sweep clip negclip --by-kind "$groups" --on abstract_scenes_clip --out by_kind/scenes samples=7_680 optim.lr=5e-4 \
      'data.train=[by_kind/shards/scenes/*.tar]' data.negatives=1 ;;
  flickr8k)
    clipkit negatives make data/flickr8k_train-*.tar --out by_kind/shards/flickr8k --kinds "$kinds"
    clipkit sweep flickr8k_clip flickr8k_degla --by-kind "$groups,negate" --on flickr8k_clip --out by_kind/flickr8k samples=15_360 \
      'data.train=[by_kind/shards/flickr8k/*.tar]' data.negatives=1 batch_size=256 model.start=runs/flickr8k_clip \
      optim.lr=5e-4 optim.warmup=0 ;;
  *) sed -n '2,4p' "$0"; exit 2 ;;
esac
