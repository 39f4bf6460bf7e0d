"""The 25 verifiable instructions of IFEval (Zhou et al. 2023, 2311.07911, appendix A).

In: a text, an instruction's name and its settings under the names of the public data set. Out:
whether the text follows it. Written from the public description and compared with
lm-evaluation-harness' verifiers on the same texts (tests/unit/test_eval_parity.py).

Two counts are made with NLTK there, whose sentence model is a download: sentences are counted here
by punctuation with a list of abbreviations, which can differ by one where an unusual abbreviation
ends in a point.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Any]
Verifier = Callable[[str, Settings], bool]

_ABBREVIATIONS = re.compile(
    r"mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e\.g|i\.e|u\.s|a\.m|p\.m|no|inc|ltd|co|corp|fig|jan|feb"
    r"|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mt|gen|col|capt|lt|rev|hon"
)
"""Words whose final point ends no sentence."""
_BOUNDARY = re.compile(r"[.!?]+[\"')\]”’]*(?=\s|\Z)")
_SPLITTING = re.compile(r"[\s,;:@#$%&?!()\[\]{}<>\"“”`]+|--+|\.{2,}")
_CONTRACTION = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve))", re.IGNORECASE)
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(text: str, name: str, settings: Settings) -> bool:
    """Return whether a text follows an instruction.

    Raises KeyError for an unknown name or a missing setting, ValueError for an unknown relation.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    return INSTRUCTIONS[name](text, given)


def _holds(count: int, relation: str, limit: int) -> bool:
    if relation == "less than":
        return count < limit
    if relation == "at least":
        return count >= limit
    raise ValueError(f"the relation {relation!r} is unknown; expected 'less than' or 'at least'")


def _matches(pattern: str, text: str) -> list[str]:
    """Return the matches of a keyword, which the data set writes as a regular expression."""
    try:
        return re.findall(pattern, text, re.IGNORECASE)
    except re.error:
        return re.findall(re.escape(pattern), text, re.IGNORECASE)


def _language(text: str) -> str | None:
    """Return the language of a text; None where it has no letters to tell."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None


def _is_in(text: str, language: str) -> bool:
    found = _language(text)
    return found is None or found == language


# ------------------------------------------------------------------------------ keywords, language


def _existence(text: str, settings: Settings) -> bool:
    return all(_matches(word, text) for word in settings["keywords"])


def _frequency(text: str, settings: Settings) -> bool:
    count = len(_matches(settings["keyword"], text))
    return _holds(count, settings["relation"], settings["frequency"])


def _forbidden(text: str, settings: Settings) -> bool:
    return not any(_matches(rf"\b{word}\b", text) for word in settings["forbidden_words"])


def _letter_frequency(text: str, settings: Settings) -> bool:
    count = text.lower().count(settings["letter"].lower())
    return _holds(count, settings["let_relation"], settings["let_frequency"])


def _response_language(text: str, settings: Settings) -> bool:
    return _is_in(text, settings["language"])


# ------------------------------------------------------------------------------------------ lengths


def count_sentences(text: str) -> int:
    """Return the number of sentences: pieces that end in . ! or ?, and the rest."""
    count = 0
    start = 0
    for end in _BOUNDARY.finditer(text):
        piece = text[start : end.end()]
        words = piece.split()
        last = words[-1].rstrip("\"')]”’") if words else ""
        if last.endswith(".") and _ABBREVIATIONS.fullmatch(last.rstrip(".").lstrip("(\"'").lower()):
            continue
        if re.fullmatch(r"[A-Z]\.|\d+\.", last) and text[end.end() :].strip():
            continue  # an initial, or the number of a list item
        count += bool(re.search(r"\w", piece))
        start = end.end()
    return count + bool(re.search(r"\w", text[start:]))


def _sentences(text: str, settings: Settings) -> bool:
    return _holds(count_sentences(text), settings["relation"], settings["num_sentences"])


def _words(text: str, settings: Settings) -> bool:
    count = len(re.findall(r"\w+", text))
    return _holds(count, settings["relation"], settings["num_words"])


def _paragraphs(text: str, settings: Settings) -> bool:
    """Count what *** separates; empty paragraphs are allowed at both ends only."""
    pieces = re.split(r"\s?\*\*\*\s?", text)
    empty = [index for index, piece in enumerate(pieces) if not piece.strip()]
    if any(0 < index < len(pieces) - 1 for index in empty):
        return False
    return len(pieces) - len(empty) == int(settings["num_paragraphs"])


def _first_word(text: str, settings: Settings) -> bool:
    """Check the number of paragraphs, which empty lines separate, and the first word of one."""
    pieces = text.split("\n\n")
    count = sum(bool(piece.strip()) for piece in pieces)
    nth = settings["nth_paragraph"]
    if not 1 <= nth <= count or not pieces[nth - 1].strip():
        return False
    word = pieces[nth - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split("[.,?!'\"]", word, maxsplit=1)[0].lower()
    return count == int(settings["num_paragraphs"]) and word == str(settings["first_word"]).lower()


# ------------------------------------------------------------------------------- content and format


def _placeholders(text: str, settings: Settings) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= int(settings["num_placeholders"])


def _postscript(text: str, settings: Settings) -> bool:
    marker = settings["postscript_marker"]
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, marker.lower())
    return bool(_matches(pattern, text.lower()))


def _bullets(text: str, settings: Settings) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == int(settings["num_bullets"])


def _constrained(text: str, settings: Settings) -> bool:
    return any(answer in text for answer in _ANSWERS)


def _highlights(text: str, settings: Settings) -> bool:
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    count = sum(bool(found.strip("*").strip()) for found in [*single, *double])
    return count >= int(settings["num_highlights"])


def _sections(text: str, settings: Settings) -> bool:
    splitter = rf"\s?{settings['section_spliter']}\s?\d+\s?"
    return len(re.findall(splitter, text)) >= int(settings["num_sections"])


def _json(text: str, settings: Settings) -> bool:
    body = text.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(opening)
    try:
        json.loads(body.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, settings: Settings) -> bool:
    titles = re.findall(r"<<[^\n]+>>", text)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def _two_responses(text: str, settings: Settings) -> bool:
    pieces = text.split("******")
    full = [index for index, piece in enumerate(pieces) if piece.strip()]
    if any(0 < i < len(pieces) - 1 and i not in full for i in range(len(pieces))):
        return False
    return len(full) == 2 and pieces[full[0]].strip() != pieces[full[1]].strip()


def _repeat_prompt(text: str, settings: Settings) -> bool:
    return text.strip().lower().startswith(str(settings["prompt_to_repeat"]).strip().lower())


def _end(text: str, settings: Settings) -> bool:
    return text.strip().strip('"').lower().endswith(str(settings["end_phrase"]).strip().lower())


def _quotation(text: str, settings: Settings) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


# ------------------------------------------------------------------------------ case, punctuation


def capital_words(text: str) -> int:
    """Return the number of words all of whose letters are capitals.

    A contraction is two words, as the Penn Treebank divides them: DON'T is DO and N'T.
    """
    words: list[str] = []
    for token in _SPLITTING.split(text):
        parts = _CONTRACTION.fullmatch(token.rstrip("."))
        words += parts.groups() if parts else [token]
    return sum(word.isupper() for word in words)


def _capital_frequency(text: str, settings: Settings) -> bool:
    return _holds(capital_words(text), settings["capital_relation"], settings["capital_frequency"])


def _all_capital(text: str, settings: Settings) -> bool:
    return text.isupper() and _is_in(text, "en")


def _all_lowercase(text: str, settings: Settings) -> bool:
    return text.islower() and _is_in(text, "en")


def _no_comma(text: str, settings: Settings) -> bool:
    return "," not in text


INSTRUCTIONS: Mapping[str, Verifier] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_frequency,
    "change_case:english_capital": _all_capital,
    "change_case:english_lowercase": _all_lowercase,
    "punctuation:no_comma": _no_comma,
}
NEEDS_LANGUAGE = frozenset(
    {
        "language:response_language",
        "change_case:english_capital",
        "change_case:english_lowercase",
    }
)
"""Instructions for which a text's language is detected."""
