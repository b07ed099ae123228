"""The console script `zero_to_fp32`: consolidated float32 weights, with the flags of the script that DeepSpeed leaves
in a checkpoint. It also reads what that refuses: pipelines, tp > 1, BF16_Optimizer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np

from ckptlab import checkpoint, convert, reshaping
from ckptlab.catalog import Catalog
from ckptlab.cli.options import Size
from ckptlab.errors import CkptlabError
from ckptlab.formats.fileplan import FilePlan
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.torchfile import Pending
from ckptlab.formats.weights import Entry, sharded

WEIGHTS = "pytorch_model.bin"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of DeepSpeed's script, and `--strategy`."""
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32",
        description="Write the consolidated float32 weights of a DeepSpeed checkpoint, without DeepSpeed.",
    )
    parser.add_argument("checkpoint_dir", help="the folder that holds `latest`, or a step folder")
    parser.add_argument("output_dir", help="the folder to make")
    parser.add_argument("--max_shard_size", default="5GB", help="files are cut at this size: digits and a unit (5GB)")
    parser.add_argument(
        "--safe_serialization",
        action="store_true",
        help="write safetensors instead of torch's pytorch_model.bin",
    )
    parser.add_argument("-t", "--tag", help="the step folder in checkpoint_dir; by default what `latest` says")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave frozen parameters out")
    parser.add_argument("-d", "--debug", action="store_true", help="show where an error comes from")
    parser.add_argument(
        "--strategy",
        help="how tensors are cut, where the checkpoint does not say: megatron, …, or a .json file",
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace | None = None) -> None:
    """Convert as the flags say (those of the command line by default). Exits with 1 and the reason where that
    fails."""
    args = parse_arguments() if args is None else args
    try:
        report = convert_zero_checkpoint_to_fp32_state_dict(
            args.checkpoint_dir,
            args.output_dir,
            args.max_shard_size,
            args.safe_serialization,
            args.tag,
            args.exclude_frozen_parameters,
            args.strategy,
        )
    except (CkptlabError, click.BadParameter) as error:
        if args.debug:
            raise
        sys.exit(f"zero_to_fp32: {error}")
    print(f"{report.destination}: {report.files} files, {report.bytes_written:,} bytes of tensors")


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str,
    output_dir: str,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    strategy: Any = None,
) -> convert.Report:
    """Whole tensors in float32 under the model's own names: `pytorch_model.bin` or `model.safetensors`, with an index
    if there are several. Buffers that are no floating-point numbers keep their dtype.

    max_shard_size: bytes, or digits and a unit; None writes one file. click.BadParameter if it is no size,
    DestinationError if `output_dir` exists already.
    """
    folder = checkpoint_dir if tag is None else os.path.join(checkpoint_dir, tag)
    source = checkpoint.open(folder, strategy=strategy).catalog
    if exclude_frozen_parameters:
        source = replace(source, tensors={n: t for n, t in source.tensors.items() if t.kind != "frozen"})
    limit = sys.maxsize if max_shard_size is None else Size().convert(max_shard_size, None, None)
    if safe_serialization:
        return checkpoint.save_weights(source, output_dir, dtype="fp32", max_shard_bytes=limit)
    identity = {"format": "pytorch_model.bin", "source": reshaping.fingerprint(source), "shard": limit}
    plans = sharded(source, np.dtype(np.float32), limit, WEIGHTS, _plan)
    return convert.run(list(plans), output_dir, identity, source=reshaping.source_of(source))


def _plan(name: str, source: Catalog, shard: Sequence[Entry]) -> FilePlan:
    return torchfile.plan(name, {e.name: Pending(e.dtype, e.tensor.shape, (e.elements(source),)) for e in shard})


if __name__ == "__main__":
    main()
