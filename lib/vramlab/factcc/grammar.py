"""The four domains of the generator: their names, things, and sentence templates.

Names, places and connecting words differ between domains; numbers, dates, pronouns and "not" are
shared. So a model's skill at checking claims transfers only if it has learned to look things up.

Slots of a template: S who, N how many, O of what, P where, D when, R pronoun, X "not " or nothing.
All `event` templates of a domain state the same, with the slots in another order, and so do its
`attitude` templates. The last ones of each are held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DATES = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = (
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "twelve",
    "twenty",
    "forty",
)
PRONOUNS = ("he", "she", "they", "we")
HELD_OUT_NAMES, HELD_OUT_PLACES, HELD_OUT_TEMPLATES = 4, 3, 1


@dataclass(frozen=True)
class Grammar:
    """Words and templates of one domain. The last names and places are held out for shifted
    items."""

    names: tuple[str, ...]
    places: tuple[str, ...]
    objects: tuple[str, ...]
    event: tuple[str, ...]
    attitude: tuple[str, ...]

    def slot_values(self) -> dict[str, Sequence[str]]:
        """The values of each slot; each is drawn uniformly."""
        return {
            "S": self.names,
            "P": self.places,
            "O": self.objects,
            "N": NUMBERS,
            "D": DATES,
            "R": PRONOUNS,
            "X": ("", "not "),
        }


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GRAMMARS: dict[str, Grammar] = {
    "general": Grammar(
        _words("Anna Ben Carl Dora Emil Finn Gina Hugo Ida Jack Kim Lena Max Nora"),
        _words("Paris London Berlin Rome Oslo Kyiv Bonn Riga Nice Cork"),
        _words("books chairs lamps cups maps bikes"),
        (
            "{S} bought {N} {O} in {P} on {D} .",
            "On {D} {S} went to {P} and bought {N} {O} .",
            "{N} {O} were bought by {S} in {P} on {D} .",
            "On {D} in {P} {N} {O} went to {S} .",
        ),
        (
            "A friend of {S} says {R} will {X}travel .",
            "{R} will {X}travel , says a friend of {S} .",
            "Friends of {S} say {R} will {X}travel .",
        ),
    ),
    "news": Grammar(
        _words("Korv Balm Dent Folg Gird Holv Jask Lurm Mond Nexo Pelg Rost Sylm Zand"),
        _words("Arlen Brock Dunmor Farley Gorham Hexley Kelby Morden Norwel Selby"),
        _words("clerks drivers miners pilots guards cooks"),
        (
            "{S} hired {N} {O} at its {P} plant {D} .",
            "The firm said {D} that {S} hired {N} {O} near {P} .",
            "{N} {O} joined {S} at the {P} plant {D} .",
            "Reports {D} from {P} : {N} {O} hired at {S} .",
        ),
        (
            "The chief of {S} told reporters {R} will {X}resign .",
            "{R} will {X}resign , the chief of {S} told reporters .",
            "Asked about {S} the chief said {R} will {X}resign .",
        ),
    ),
    "law": Grammar(
        _words(
            "Abbot Barlow Cramer Dorsey Easton Fenwick Gable Harlan Jessup Keller Mercer Norris"
            " Osborn Rowland"
        ),
        _words("Albany Boston Camden Denver Fresno Helena Juneau Laredo Newark Tulsa"),
        _words("counts claims motions writs fines appeals"),
        (
            "The court in {P} heard {N} {O} against {S} filed {D} .",
            "Filed {D} , {N} {O} against {S} came before the {P} court .",
            "Against {S} the {P} court weighed {N} {O} as of {D} .",
            "As of {D} {S} faced {N} {O} before a judge at {P} .",
        ),
        (
            "Counsel for {S} argued {R} did {X}breach the contract .",
            "That {R} did {X}breach the contract was argued for {S} .",
            "For {S} counsel held that {R} did {X}breach the contract .",
        ),
    ),
    "medicine": Grammar(
        _words(
            "Zolvan Abrexa Cetivol Duramil Enoxal Fluvera Glipten Ketomax Lisopra Metrovin Nalorex"
            " Omvexa Rilatan Sertaf"
        ),
        _words("Mayo Lahey Scripps Cedars Emory Duke Baylor Rush Temple Loyola"),
        _words("tablets doses ampoules patches drops vials"),
        (
            "Patients at {P} received {N} {O} of {S} daily until {D} .",
            "Until {D} daily treatment with {S} at {P} was {N} {O} .",
            "{N} {O} of {S} were given daily in the {P} arm until {D} .",
            "Treatment until {D} in the {P} arm : {S} , {N} {O} .",
        ),
        (
            "The nurse giving {S} noted {R} had {X}improved .",
            "{R} had {X}improved , noted the nurse giving {S} .",
            "On {S} the nurse noted {R} had {X}improved .",
        ),
    ),
}

QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "general": (
        ("did {S} buy {N} {O} in {P} on {D}", "were {N} {O} bought by {S} in {P} on {D}"),
        (
            "does a friend of {S} say {R} will {X}travel",
            "will {R} {X}travel as a friend of {S} says",
        ),
    ),
    "news": (
        ("did {S} hire {N} {O} at its {P} plant {D}", "were {N} {O} hired at {S} near {P} {D}"),
        (
            "did the chief of {S} say {R} will {X}resign",
            "will {R} {X}resign as the chief of {S} told reporters",
        ),
    ),
    "law": (
        (
            "did the court in {P} hear {N} {O} against {S} filed {D}",
            "were {N} {O} against {S} filed {D} before the {P} court",
        ),
        (
            "did counsel for {S} say {R} did {X}breach the contract",
            "was it argued for {S} that {R} did {X}breach the contract",
        ),
    ),
    "medicine": (
        (
            "did patients at {P} have {N} {O} of {S} daily until {D}",
            "were {N} {O} of {S} given daily at {P} until {D}",
        ),
        (
            "did the nurse giving {S} say {R} had {X}improved",
            "had {R} {X}improved as the nurse giving {S} noted",
        ),
    ),
}
"""Domain -> (questions about an event, questions about an attitude), with the slots of the
templates."""
