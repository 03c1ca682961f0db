"""``README.md`` of a bundle: a model card, as Hugging Face reads it, from the run's facts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.training.averages.ensemble import num_members
from holdfast.training.runs.shown_text import shown

TAG = re.compile(r"<(?=[A-Za-z/!?])")
SPECIAL = "\\|[]`#"
MAX_NAMES = 20
APOSTROPHE, BAR = "'", "\N{BROKEN BAR}"
USES = {
    "weights": "`model.safetensors`: weights for PyTorch",
    "onnx": "`1/model.onnx`: ONNX, for every ONNX runtime",
    "exported_program": "`exported_program/model.pt2`: `torch.export.load`",
    "torchscript": "`torchscript/model.pt`: TorchScript; legacy, prefer ONNX or `torch.export`",
    "onnx_int8": "`onnx_int8/model.onnx`: 8-bit ONNX, smaller and less exact",
}


def model_card(
    manifest: Mapping[str, Any],
    parity: Mapping[str, Any],
    task: str,
    unused: Sequence[str] = (),
) -> str:
    """The card. Nothing in it depends on when or where the bundle was made."""
    return "\n".join(
        [
            _front_matter(manifest, task),
            f"# {_words(manifest['name'])}",
            "",
            _paragraph(manifest["description"])
            or f"A model of the experiment {_code(manifest['name'])}.",
            "",
            f"Trained by Holdfast in run {_code(manifest['run']['run_id'])}; the champion is the "
            f"candidate {_code(manifest['champion']['name'])}.",
            "",
            *_about_certificate(manifest.get("measured", {}).get("certificate")),
            *_about_members(num_members(manifest["champion"]["name"])),
            *_metrics_table(manifest["champion"]["test_metrics"]),
            *_port_table("Inputs", manifest["interface"]["inputs"], {}),
            *_port_table(
                "Outputs", manifest["interface"]["outputs"], manifest["interface"]["class_names"]
            ),
            _about_inputs(manifest["interface"]["inputs"]),
            "",
            *_file_table(parity),
            *_about_unused(unused),
            *_how_to_use(manifest["formats"]),
            "Measured latencies are in `manifest.json` under `measured`.",
            "",
            f"Licence of the weights: {_words(manifest['licence'])}.",
            "",
        ]
    )


def _about_certificate(certificate: Mapping[str, Any] | None) -> list[str]:
    """Of one that certifies this training, what does not depend on when or where it was made."""
    if certificate is None or certificate["differs_in"] or not certificate["is_exact"]:
        return []
    num_stops = certificate["num_stops"]
    times = "once" if num_stops == 1 else f"{num_stops} times"
    return [
        f"A training of this code and configuration that was stopped {times} in "
        f"{certificate['num_steps']} steps had the bytes of one that was not "
        f"(`measured.certificate` in `manifest.json`).",
        "",
    ]


def _about_members(num: int | None) -> list[str]:
    if num is None:
        return []
    return [
        f"It is an ensemble: {num} models of one training, each in full, and the mean of what they "
        f"return, tensor by tensor; an output that is no floating-point tensor is the last "
        f"model's. Memory and time of a call are {num} times those of one model. In "
        f"`model.safetensors` the names of model i begin with `members.<i>.`.",
        "",
    ]


def _about_unused(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    told = ", ".join(map(_code, names[:MAX_NAMES]))
    return [f"No output depends on these tensors of the weights: {told}{more}.", ""]


def _how_to_use(formats: Mapping[str, Any]) -> list[str]:
    if "onnx" not in formats:
        return [
            "## Check it, use it",
            "",
            "`python verify.py` checks the digests of all files. There is no ONNX model, so "
            "nothing is run by it: load one of the files above with PyTorch.",
            "",
        ]
    return [
        "## Check it, use it",
        "",
        "```sh",
        "pip install onnxruntime numpy",
        "python verify.py                          # digests, then golden samples on this CPU",
        "python verify.py predict . samples.csv    # or .npy, .json",
        "```",
        "",
        "`ranges.json` has the ranges and quantiles of validation data, inputs and outputs; "
        "`predict` warns of values outside of them.",
        "",
        "Triton: this folder is a model folder (`config.pbtxt`, `1/`). "
        "MLflow: `mlflow.pyfunc.load_model('1')`.",
        "",
    ]


def _front_matter(manifest: Mapping[str, Any], task: str) -> str:
    results = [
        {"name": name, "type": name, "value": round(value, 6)}
        for name, value in sorted(manifest["champion"]["test_metrics"].items())
        if value is not None
    ]
    card_task = task or "other"
    header: dict[str, Any] = {
        "library_name": "onnx" if "onnx" in manifest["formats"] else "pytorch",
        "license": manifest["licence"],
        "model-index": [
            {
                "name": manifest["name"],
                "results": [
                    {
                        "dataset": {"name": manifest["name"], "split": "test", "type": "custom"},
                        "metrics": results,
                        "task": {"type": card_task},
                    }
                ],
            }
        ],
        "tags": ["holdfast", *(["onnx"] if "onnx" in manifest["formats"] else []), "pytorch"],
    }
    if task:
        header["pipeline_tag"] = task
    # JSON is YAML; one line a key reads well enough, and no YAML writer is needed.
    lines = [f"{key}: {json.dumps(value)}" for key, value in sorted(header.items())]
    return "\n".join(["---", *lines, "---", ""])


def _metrics_table(metrics: Mapping[str, float | None]) -> list[str]:
    rows = [f"| {_words(name)} | {_number(value)} |" for name, value in sorted(metrics.items())]
    return ["## On the test set", "", "| metric | value |", "|---|---|", *rows, ""]


def _port_table(
    title: str, ports: list[dict[str, Any]], classes: Mapping[str, list[str]]
) -> list[str]:
    rows = []
    for port in ports:
        shape = ", ".join(["samples", *(_words(str(size)) for size in port["shape"])])
        rows.append(
            f"| {_code(port['name'])} | {port['dtype']} | [{shape}] | "
            f"{_words(', '.join(classes.get(port['name'], [])))} |"
        )
    return [f"## {title}", "", "| name | type | shape | classes |", "|---|---|---|---|", *rows, ""]


def _about_inputs(ports: list[dict[str, Any]]) -> str:
    about = "The first dimension counts samples."
    if any(isinstance(size, str) for port in ports for size in port["shape"]):
        about += (
            " A size with a name may be any, the same wherever it has this name: pad the samples "
            "of a batch to one."
        )
    if any(port["dtype"].startswith("float") for port in ports):
        about += (
            " Inputs are raw: what they are scaled with is part of the graph. A sample with a NaN "
            "or an infinity gives NaN in every output and leaves its neighbours alone."
        )
    return about


def _file_table(parity: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in parity["artifacts"]:
        error, bound = row["max_error"], row["bound"]
        proof = "metric and classes"
        if error is not None and bound:
            proof = f"{error:.2g}, {error / bound:.0%} of what may be"
        part, _, form = row["format"].rpartition(".")
        told = f"{_code(row['name'])}: {_words(part.replace('_', ' '))}, {form}"
        use = told if part else USES[form]
        rows.append(f"| {use} | {row['size_bytes']:,} | {proof} |")
    head = ["## Files", "", "| file | bytes | parity |", "|---|---|---|"]
    text = "Parity: the largest error against the champion in fp64, relative to the largest value."
    return [*head, *rows, "", text, ""]


def _paragraph(text: str) -> str:
    """The experiment's own words about itself: one paragraph, in which no tag begins."""
    return TAG.sub("&lt;", shown(" ".join(text.splitlines()), max_chars=len(text)))


def _words(text: object) -> str:
    """Text from elsewhere as words: no table, link, tag or heading can begin in it."""
    return "".join(f"\\{c}" if c in SPECIAL else c for c in shown(text)).replace("<", "&lt;")


def _code(text: object) -> str:
    """Text from elsewhere between backticks, and within one cell of a table."""
    return f"`{shown(text).replace('`', APOSTROPHE).replace('|', BAR)}`"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
