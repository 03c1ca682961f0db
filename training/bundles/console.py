"""The commands of those who use bundles: ``pull``, ``verify``, ``predict``, ``bundles``.

Standard library alone, but for ONNX Runtime and NumPy where a model runs: they work where neither
torch nor click is installed. Results go to stdout, what is being done to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.training.bundles import consumer
from holdfast.training.bundles.continuing import NUM_TOKENS
from holdfast.training.bundles.pull import pull
from holdfast.training.bundles.registry import REGISTRY, BundleReference, Registry
from holdfast.training.bundles.sources import BundleSource
from holdfast.training.bundles.text_prediction import SUFFIX, predict_text
from holdfast.training.errors import BundleError, HoldfastError, InputError
from holdfast.training.runs.shown_text import shown
from holdfast.training.storage.address import is_address, parse_address
from holdfast.training.told_errors import error_line

COMMANDS = ("pull", "verify", "predict", "bundles")
DEFAULT_STORE = os.environ.get("HOLDFAST_STORE", "runs")
STORE_HELP = "folder that holds all runs; default: $HOLDFAST_STORE, or runs"
BUNDLE_HELP = "its folder, its address in a bucket, or its name where --store is given"
MEGABYTE = 1e6

EXAMPLES = """examples:
  holdfast bundles                                what there is, with metrics and aliases
  holdfast pull digits --to digits-model          the champion, verified byte by byte
  holdfast pull digits@3 --to third --only onnx   version 3, without what else PyTorch reads
  holdfast verify digits-model                    does it compute the right numbers here?
  holdfast predict digits-model samples.csv       class by class, as CSV
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 good, 1 refused, 2 wrong input."""
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except HoldfastError as error:
        print(error_line(error), file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace) -> None:
    """Do what parsed options say. Raises BundleError and InputError."""
    try:
        RUNNERS[options.command](options)
    except consumer.RefusedBundleError as error:
        raise BundleError(str(error)) from error
    except consumer.WrongInputError as error:
        raise InputError(str(error)) from error
    except ModuleNotFoundError as error:
        raise InputError(f"this needs {error.name}: pip install onnxruntime numpy") from error


def build_parser() -> argparse.ArgumentParser:
    """The parser of all four commands."""
    parser = argparse.ArgumentParser(
        prog="holdfast",
        description="Take, prove and try the models that others trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pull(commands)
    verifying = commands.add_parser("verify", help="prove a bundle on this machine")
    verifying.add_argument("bundle", help=BUNDLE_HELP)
    predicting = commands.add_parser("predict", help="predict a CSV, NPY or JSON file, or a text")
    predicting.add_argument("bundle", help=BUNDLE_HELP)
    predicting.add_argument("input", type=Path, help="samples: .csv, .npy or .json; or .txt")
    predicting.add_argument("--to", type=Path, metavar="FILE", help="write there, not to stdout")
    predicting.add_argument(
        "--tokens", type=int, default=NUM_TOKENS, metavar="N", help="that a text goes on for"
    )
    for command in (verifying, predicting):
        command.add_argument("--store", help="take NAME[@VERSION|@ALIAS] from there")
        command.add_argument(
            "--time-limit-s",
            type=consumer.time_limit_s,
            default=consumer.TIME_LIMIT_S,
            metavar="SECONDS",
            help=f"end a model that runs longer; default: {consumer.TIME_LIMIT_S:g}",
        )
    listing = commands.add_parser("bundles", help="list bundles with versions and metrics")
    listing.add_argument("name", nargs="?", help="this one alone, with the history of its aliases")
    listing.add_argument("--store", default=DEFAULT_STORE, help=STORE_HELP)
    listing.add_argument("--json", action="store_true", help="for programs")
    return parser


def _add_pull(commands: Any) -> None:
    pulling = commands.add_parser("pull", help="copy a bundle out of a store, verified")
    pulling.add_argument(
        "reference", metavar="NAME[@VERSION|@ALIAS]", help="default alias champion"
    )
    pulling.add_argument("--to", type=Path, required=True, metavar="DIR", help="missing or empty")
    pulling.add_argument(
        "--store", default=DEFAULT_STORE, help=f"{STORE_HELP}; or the http address of one"
    )
    pulling.add_argument(
        "--only", action="append", default=[], metavar="FORMAT", help="leave other formats out"
    )


def _run_pull(options: argparse.Namespace) -> None:
    version, source = _locate(str(options.store), BundleReference.parse(options.reference))
    try:
        manifest = pull(
            source,
            options.to,
            tuple(options.only),
            lambda name, size: print(f"  {size:>12,}  {shown(name)}", file=sys.stderr),
            BundleReference.parse(options.reference).name,
        )
    except KeyboardInterrupt:
        print("the same command goes on where this one stood", file=sys.stderr)
        raise
    print(f"{manifest['name']}@{version} is in {options.to}; every digest is right")


def _locate(store: str, reference: BundleReference) -> tuple[int, BundleSource]:
    """The version that a reference means, and where it is pulled from: a folder or a URL."""
    if not is_url(store):
        registry = _registry(store)
        version = registry.resolve(reference)
        return version, registry.source(reference.name, version)
    try:
        from holdfast.training.bundles.http_store import HttpStore
    except ModuleNotFoundError as error:
        raise InputError(
            f"pulling from {store} needs the package {error.name}: pip install {error.name}; a "
            "store that is mounted as a folder needs nothing"
        ) from error
    remote = HttpStore(store)
    version = remote.resolve(reference)
    return version, remote.source(reference.name, version)


def _registry(store: str) -> Registry:
    """The registry of a store; one in a bucket needs more than the standard library."""
    is_bucket = is_address(store)
    if not is_bucket and not (Path(store) / ".store-address.json").exists():
        return Registry(Path(store))
    from holdfast.training.bundles.bucket_registry import open_registry
    from holdfast.training.tiers.scratch import tier_folder

    return open_registry(tier_folder(parse_address(store), "work") if is_bucket else Path(store))


def is_url(store: str) -> bool:
    """Whether a store is behind HTTP, and not a folder."""
    return store.startswith(("http://", "https://"))


def _bundle_folder(bundle: str, store: str | None) -> Path:
    """A bundle that is named by its folder, its address, or its name in a store."""
    if is_address(bundle):
        return _addressed_bundle(bundle)
    if store is not None:
        registry, reference = _registry(store), BundleReference.parse(bundle)
        return registry.bundle(reference.name, registry.resolve(reference))
    folder = Path(bundle)
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; expected a bundle, as holdfast pull makes, or its name "
            f"with --store"
        )
    return folder


def _addressed_bundle(bundle: str) -> Path:
    """Of ``STORE/EXPERIMENT/RUN/bundle`` or ``STORE/registry/NAME/versions/NUMBER``."""
    address = parse_address(bundle)
    *store, first, second, third = ["", "", "", *address.prefix.split("/")]
    prefix = "/".join(filter(None, store))
    if third == "bundle" and first and second:
        from holdfast.training.bundles.bucket_registry import run_bundle

        return run_bundle(replace(address, prefix=prefix), f"{first}/{second}")
    if store[-1:] == [REGISTRY] and second == "versions" and third.isdecimal():
        prefix = prefix.removesuffix(REGISTRY).rstrip("/")
        reference = f"{first}@{int(third)}"
        return _bundle_folder(reference, str(replace(address, prefix=prefix)))
    raise InputError(
        f"{bundle} is no bundle's address: expected …/EXPERIMENT/RUN/bundle or "
        f"…/registry/NAME/versions/NUMBER, as holdfast status and bundles tell them"
    )


def _run_verify(options: argparse.Namespace) -> None:
    folder = _bundle_folder(options.bundle, options.store)
    print(consumer.proof(folder, options.time_limit_s))


def _run_predict(options: argparse.Namespace) -> None:
    if not options.input.is_file():
        raise InputError(
            f"there is no file {options.input}; expected a CSV, NPY or JSON file, or the beginning "
            f"of a text"
        )
    folder = _bundle_folder(options.bundle, options.store)
    if options.input.suffix.lower() == SUFFIX:
        limits = options.time_limit_s, options.tokens
        predict_text(folder, options.input, options.to, *limits)
        return
    consumer.predict(folder, options.input, options.to, options.time_limit_s)


def _run_bundles(options: argparse.Namespace) -> None:
    registry = _registry(str(options.store))
    names = [options.name] if options.name else registry.names()
    described = [entry for name in names for entry in _described(registry, name)]
    if options.name and not described:
        registry.resolve(BundleReference.parse(options.name))
    if options.json:
        print(json.dumps(described, indent=2, sort_keys=True))
        return
    if not described:
        print(f"no bundles in {registry}", file=sys.stderr)
    for entry in described:
        print(shown(_line(entry)))
    if options.name:
        _print_history(registry, options.name)


def _line(entry: dict[str, Any]) -> str:
    if "error" in entry:
        version = f"@{entry['version']:<4}" if "version" in entry else ""
        return f"{entry['name']}{version} unreadable: {entry['error']}"
    metrics = " ".join(f"{name}={value:.4g}" for name, value in entry["metrics"].items())
    aliases = " ".join(f"@{alias}" for alias in entry["aliases"])
    size = f"{entry['size_bytes'] / MEGABYTE:.1f} MB"
    return f"{entry['name']}@{entry['version']:<4} {size:>9}  {metrics}  {aliases}".rstrip()


def _described(registry: Registry, name: str) -> list[dict[str, Any]]:
    """The versions of a name; what cannot be read of one is told and hides no other."""
    described: list[dict[str, Any]] = []
    aliases: dict[str, int] = {}
    try:
        for alias in registry.alias_names(name):
            position = registry.position(name, alias)
            aliases |= {alias: position.version} if position else {}
    except HoldfastError as error:
        described.append({"error": str(error), "name": name})
    try:
        versions = registry.versions(name)
    except HoldfastError as error:
        return [*described, {"error": str(error), "name": name}]
    return described + _versions(registry, name, versions, aliases)


def _versions(
    registry: Registry, name: str, versions: list[int], aliases: dict[str, int]
) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = []
    for version in versions:
        try:
            manifest = registry.manifest(name, version)
        except BundleError as error:
            described.append({"error": str(error), "name": name, "version": version})
            continue
        metrics = manifest["champion"]["test_metrics"]
        described.append(
            {
                "aliases": sorted(alias for alias, at in aliases.items() if at == version),
                "formats": sorted(manifest["formats"]),
                "metrics": {key: value for key, value in metrics.items() if value is not None},
                "name": name,
                "run_id": manifest["run"]["run_id"],
                "size_bytes": sum(entry["size_bytes"] for entry in manifest["files"].values()),
                "version": version,
            }
        )
    return described


def _print_history(registry: Registry, name: str) -> None:
    for alias in registry.alias_names(name):
        try:
            moves = registry.history(name, alias)
        except HoldfastError as error:
            print(shown(f"  @{alias} unreadable: {error}"))
            continue
        for move in moves:
            print(shown(f"  @{alias} -> {move.version}  {move.moved_at}  {move.reason}"))


RUNNERS = {
    "bundles": _run_bundles,
    "predict": _run_predict,
    "pull": _run_pull,
    "verify": _run_verify,
}

if __name__ == "__main__":
    sys.exit(main())
