"""Whether a guide compiles. The worker runs this, so it imports nothing slow or large but llguidance."""

from __future__ import annotations

import re
from typing import Any

STATES = 50_000  # most states of a lexer, each 1 to 2 kB


def reason_against(guide: str) -> str:
    """Why a guide cannot be used, "" if it can."""
    from llguidance import LLMatcher, LLTokenizer

    bytes_ = LLTokenizer("byte")
    _, problems = LLMatcher.validate_grammar_with_warnings(guide, bytes_, limits=limits())
    if problems:
        return _plain(problems[0])
    matcher = LLMatcher(bytes_, guide, log_level=0, limits=limits())
    matcher.compute_logit_bias()
    if not matcher.is_error():
        return ""
    first = matcher.get_error().partition("\n")[0]
    return "no answer obeys it" if first.startswith("NoExtension") else _plain(first)


def _plain(reason: str) -> str:
    """llguidance's reason, in our words if those name the keyword better."""
    if (unknown := re.fullmatch(r"Unimplemented keys: \[(.*)\]", reason)) is not None:
        return f"{unknown[1].replace(chr(34), '')} cannot be enforced; leave it out"
    if reason.startswith("oneOf constraints are not supported"):
        return "oneOf cannot be enforced if a value may match several of its schemas; use anyOf"
    if reason.startswith("regex parse error"):
        reason = f"pattern: {reason.rpartition('error: ')[2]}"
    if "range" in reason and "minimum" not in reason:
        reason = f"minimum and maximum: {reason}"
    reason = " ".join(reason.split())
    return reason[:300] + ("; simplify it" if "too big" in reason or "too large" in reason else "")


def limits() -> Any:
    """What compiling a guide may take."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=STATES, verbose_errors=False)
