"""`python -m cvx_io.convert SRC DST --to FORMAT`: weights from any format to any other, none lost."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cvx_core.errors import CvxError, FormatError

EXAMPLES = """examples:
  python -m cvx_io.convert CogVideoX-5b-sat/transformer out/transformer --to hf
  python -m cvx_io.convert out/transformer mm --to megatron --set tp=2 --set pp=[10,11,11,10] --verify
  python -m cvx_io.convert mm out/back --to hf --dtype bfloat16
  python -m cvx_io.convert CogVideoX-5b-sat/vae/3d-vae.pt out/vae --to hf
  python -m cvx_io.convert finetune/transformer lora.safetensors --to comfyui --alpha 1
  python -m cvx_io.convert base/transformer merged --to hf --merge-lora pytorch_lora_weights.safetensors
  python -m cvx_io.convert SRC DST --to sat --dry-run        only say what would be done
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert. Returns 0, or 2 after printing an error that the user can act on.

    Returns 130 when interrupted, 143 when terminated (SIGTERM); either way nothing is left behind.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        with _termination():
            return _convert(args)
    except CvxError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror or error}. Check the path and its permissions.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return 130
    except _Terminated:
        print("terminated; nothing is left behind", file=sys.stderr)
        return 128 + signal.SIGTERM


class _Terminated(BaseException):
    """SIGTERM, which by itself would end the process without removing what it has written."""


@contextmanager
def _termination() -> Iterator[None]:
    """Turn the first SIGTERM into _Terminated, and ignore more of them while that is cleaned up after."""
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _convert(args: argparse.Namespace) -> int:
    from cvx_io.conversion import Request, prepare

    request = Request(
        source=args.source,
        target=args.target,
        to=args.to,
        source_format=args.source_format,
        model=args.model,
        settings=_settings(args.set, "--set"),
        source_settings=_settings(args.set_from, "--set-from"),
        model_settings=_settings(args.set_model, "--set-model"),
        dtype=args.dtype,
        lora=args.merge_lora,
        scale=args.scale,
        alpha=args.alpha,
        overwrite=args.overwrite,
    )
    job = prepare(request)
    print(job.report.text(), flush=True)
    if args.dry_run:
        job.check()
        print("nothing was written (--dry-run)")
        return 0
    report = job.run(verified=args.verify)
    for check in report.checked:
        print(f"  checked  {check}")
    print(f"wrote {request.target}")
    return 0


def _settings(items: Sequence[str], option: str) -> Mapping[str, Any]:
    """Return KEY=VALUE items as fields; values are YAML, which a number or a list is too."""
    fields: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise FormatError(f"{option} {item}: expected KEY=VALUE, such as tp=2.")
        if name in fields:
            raise FormatError(f"{option} {name}: given twice. Leave one out.")
        try:
            fields[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FormatError(f"{option} {item}: {text!r} is no YAML value.") from error
    return fields


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cvx_io.convert",
        description="Convert weights between formats. Format and model of the source are found out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="file or folder of the weights")
    parser.add_argument("target", type=Path, metavar="DST", help="file or folder to write; must not exist")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="hf, sat, megatron, dcp, peft, ...")
    parser.add_argument("--from", dest="source_format", metavar="FORMAT", help="overrule the format found")
    parser.add_argument(
        "--model", metavar="PRESET", help="overrule the model found: a preset, or a config.json"
    )
    for option, of in (("--set", "target format"), ("--set-from", "source format"), ("--set-model", "model")):
        parser.add_argument(
            option, action="append", default=[], metavar="KEY=VALUE", help=f"a field of the {of}; repeatable"
        )
    parser.add_argument("--dtype", help="cast floating point tensors: float32, bfloat16, float16")
    parser.add_argument(
        "--merge-lora", type=Path, metavar="PATH", help="merge these LoRA weights into the model"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the merged LoRA (1)")
    parser.add_argument("--alpha", type=float, help="alpha of a LoRA whose file does not state it")
    parser.add_argument("--dry-run", action="store_true", help="report what would be done, then stop")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare bit for bit")
    parser.add_argument("--overwrite", action="store_true", help="replace a conversion at DST")
    return parser


if __name__ == "__main__":
    sys.exit(main())
