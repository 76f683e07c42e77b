#!/bin/sh
# One branch of a seed for each text in a folder, one after another:
#     examples/branches.sh SEED TEXTS OUT [options of btx branch]
# TEXTS/code.jsonl becomes OUT/code. Branches that are complete are passed over, and one that was interrupted is continued:
# so the same command goes on wherever the loop was ended.
set -eu
seed=$1 texts=$2 out=$3
shift 3
mkdir -p "$out"
experts=
for text in "$texts"/*; do
    domain=$(basename "$text")
    domain=${domain%%.*}
    experts="$experts --expert $domain=$out/$domain"
    [ -e "$out/$domain" ] && continue
    resume=
    for checkpoint in "$out/$domain.btx-training"/checkpoint-*/complete; do
        [ -e "$checkpoint" ] && resume=--resume
    done
    btx branch "$seed" --data "$domain=$text" -o "$out/$domain" $resume "$@"
done
echo "btx merge --seed $seed$experts -o $out/merged"
