"""What the Hugging Face Trainer, accelerate and Lightning leave beside a step folder, and what of it is still true of
the checkpoint on another mesh."""

from __future__ import annotations

import os
import re

from ckptlab import paths
from ckptlab.catalog import Catalog
from ckptlab.findings import Finding, Where
from ckptlab.formats.format import Beside
from ckptlab.words import some

# of the model, the tokenizer and the run as a whole, whatever the mesh
_OF_THE_RUN = re.compile(
    r"(?:generation_|preprocessor_|processor_|adapter_)?config\.json|trainer_state\.json|training_args\.bin"
    r"|scheduler\.(?:pt|bin)|scaler\.pt|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt"
    r"|\w+\.model|chat_template.*|zero_to_(?:fp32|torch)\.py|custom_checkpoint_\d+\.pkl|README\.md"
)
# of each rank: the n-th of as many as there are ranks
_OF_RANKS = re.compile(r"(?:rng_state|random_states)(?:_\d+)?\.(?:pth|pkl)")
# how far each dp rank's data loader was
_OF_DATA = re.compile(r"(?:dl_|sampler)\w*(?:\.bin|\.pkl)?")
# the weights once more, in the dtype that the model computes in
_WEIGHTS = re.compile(
    r"(?:(?:adapter_)?model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)|(?:model\.safetensors|pytorch_model\.bin)"
    r"\.index\.json"
)


def beside(source: Catalog, target: Catalog) -> Beside:
    """The files beside a source that go along to the target, and findings on those that do not."""
    folder = paths.parent(paths.real(source.path))
    names = sorted(e.name for e in paths.entries(folder) if e.is_file)
    trained = source.training.mesh
    same_ranks = trained is not None and trained.size == target.mesh.size and trained == target.mesh
    same_dtype = source.training.dtype == target.training.dtype
    keeps = [(_OF_THE_RUN, True, ""), (_OF_RANKS, same_ranks, f"there is one for each rank of {trained}")]
    keeps.append((_OF_DATA, same_ranks, f"it is of the data loaders of {trained}"))
    keeps.append((_WEIGHTS, same_dtype, f"they are in {source.training.dtype}"))
    along: list[str] = []
    findings: list[Finding] = []
    for pattern, stays, reason in keeps:
        found = [name for name in names if pattern.fullmatch(name) and name not in along]
        if stays:
            along += found
        elif found:
            text = f"{some(found, 4)} beside the step folder cannot go along: {reason}"
            todo = "the target begins with what its program sets, or makes them anew"
            findings.append(Finding("left-behind", "info", Where(tuple(found)), "", text, todo, "target"))
    return Beside(tuple(os.path.join(folder, name) for name in along), tuple(findings))
