"""Checkpoints whose tensors were changed on disk."""

import json
import math

from safetensors.torch import load_file, save_file


def with_tensors(source, folder, tensors, n_shards=1):
    """Write the checkpoint of `source` to `folder` with more tensors, in one file or in shards with an index."""
    weights = load_file(source / "model.safetensors") | tensors
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    if n_shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(weights)
    size = math.ceil(len(names) / n_shards)
    weight_map = {}
    for number in range(n_shards):
        file = f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: weights[name] for name in names[number * size : (number + 1) * size]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
