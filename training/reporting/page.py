"""The whole page: one file, no script, nothing that is fetched."""

from __future__ import annotations

from holdfast.training.reporting.choice import candidates_section
from holdfast.training.reporting.facts import RunFacts
from holdfast.training.reporting.headline import headline
from holdfast.training.reporting.learning import learning_section
from holdfast.training.reporting.making import (
    configuration_section,
    provenance_section,
    versions_section,
)
from holdfast.training.reporting.markup import Html, element, joined, text
from holdfast.training.reporting.predictions import predictions_section
from holdfast.training.reporting.script import is_trained_alone
from holdfast.training.reporting.style import STYLE
from holdfast.training.reporting.time_spent import time_section

# Even a page that somebody altered fetches nothing and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(facts: RunFacts) -> str:
    """The report of a run. The same facts give the same bytes: there is no "made at" in it."""
    parts = [
        headline(facts),
        Html("") if is_trained_alone(facts) else candidates_section(facts),
        # A script has no pictures of its own.
        Html("")
        if facts.record.script is not None
        else predictions_section(tuple(facts.figures), facts.champion),
        learning_section(facts),
        time_section(facts),
        provenance_section(facts),
        configuration_section(facts),
        versions_section(facts),
        _footer(facts),
    ]
    title = text(f"{facts.record.run_id} \N{MIDDLE DOT} {facts.record.experiment}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE.strip()}</style></head>"
        f"<body>{element('main', joined(parts))}</body></html>\n"
    )


def _footer(facts: RunFacts) -> Html:
    begun = facts.record.created_at[:19].replace("T", " ")
    return element("footer", text(f"Begun {begun} UTC."), varies=True)
