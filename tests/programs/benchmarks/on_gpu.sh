#!/bin/sh
# Passes on one GPU in bfloat16, relative to a plain run: models of half a billion and of 8 billion parameters. Under ten
# minutes on a GPU with 80 GB.
#
#     sh tests/programs/benchmarks/on_gpu.sh hh_harmless_test.jsonl.gz
set -e
pairs=${1:?a file of pairs}
gpu="--device cuda --dtype bfloat16"
run="python tests/programs/benchmarks/passes.py --pairs $pairs --passes-only --runs 3 $gpu"
$run --n 1840 --layers 16 --width 1536
# 32 layers of width 4,096: the sizes of Llama-3.1-8B without its vocabulary and with as many key as query heads.
$run --n 460 --layers 32 --width 4096
