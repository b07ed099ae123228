"""The console script `ds_to_universal`: a step folder → DeepSpeed's universal format, with the flags of DeepSpeed's
own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ckptlab.errors import CkptlabError

WITHOUT_MEANING = {
    "num_merge_workers": "tensors are merged while they are written, by the workers of --num_extract_workers",
    "keep_temp_folder": "no temporary files are made",
    "no_strict": "what a conversion relies on is always checked",
    "inject_missing_state": "nothing needs to be injected; where nothing says how tensors are cut, give --strategy",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of DeepSpeed's script, and `--strategy`."""
    parser = argparse.ArgumentParser(
        prog="ds_to_universal",
        description="Convert a DeepSpeed checkpoint to the universal format, without DeepSpeed.",
    )
    parser.add_argument("--input_folder", required=True, help="the step folder (global_step…)")
    parser.add_argument(
        "--output_folder", required=True, help="the folder to make; latest_universal is written beside it"
    )
    parser.add_argument("--num_extract_workers", type=int, default=4, help="how many files are written at a time (4)")
    parser.add_argument(
        "--strategy",
        help="how tensors are cut, where the checkpoint does not say: megatron, …, or a .json file",
    )
    ignored = parser.add_argument_group("accepted, without meaning here")
    ignored.add_argument("--num_merge_workers", type=int, help=WITHOUT_MEANING["num_merge_workers"])
    for flag in ("keep_temp_folder", "no_strict", "inject_missing_state"):
        ignored.add_argument(f"--{flag}", action="store_true", help=WITHOUT_MEANING[flag])
    return parser.parse_args(arguments)


def main(args: argparse.Namespace | None = None) -> None:
    """Convert as the flags say (those of the command line by default). Exits with 1 and the reason where that
    fails."""
    args = parse_arguments() if args is None else args
    for flag, reason in WITHOUT_MEANING.items():
        if getattr(args, flag, None):
            print(f"--{flag} has no meaning here: {reason}")
    try:
        convert(args.input_folder, args.output_folder, getattr(args, "strategy", None), args.num_extract_workers)
    except CkptlabError as error:
        sys.exit(f"ds_to_universal: {error}")


def convert(input_folder: str, output_folder: str, strategy: str | None = None, workers: int = 4) -> None:
    """Write the universal folder, and print what the user must hear and what was written."""
    from ckptlab import checkpoint

    reshape = checkpoint.open(input_folder, strategy=strategy).reshape()
    for finding in reshape.check():
        print(f"note: {finding.text}")
    report = reshape.save(output_folder, format="universal", on=workers, progress=sys.stderr.isatty())
    print(f"{report.destination}: {report.files} files, {report.bytes_written:,} bytes of tensors")


if __name__ == "__main__":
    main()
