"""The four domains of the generator: names, things, and the ways of saying what happened.

Names, places and connecting words differ between domains; numbers, dates, pronouns and "not" are shared. So what a model
learns about checking transfers only as far as it learned to look things up.

A template's slots: S who, N how many, O of what, P where, D when, R pronoun, X "not " or nothing. `event` templates of a
domain say the same with the slots in another order; so do `attitude` templates. The last ones of each are held out.
"""

from __future__ import annotations

from dataclasses import dataclass

DATES = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
PRONOUNS = ("he", "she", "they", "we")
HELD_OUT_NAMES, HELD_OUT_PLACES, HELD_OUT_TEMPLATES = 5, 3, 1


@dataclass(frozen=True)
class Grammar:
    """One domain's pools and templates. The ends of the pools are kept for shifted items."""

    names: tuple[str, ...]
    places: tuple[str, ...]
    objects: tuple[str, ...]
    event: tuple[str, ...]
    attitude: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GRAMMARS: dict[str, Grammar] = {
    "general": Grammar(
        _words("Anna Boris Clara David Elena Frank Greta Henry Irene Jonas Karla Louis Maria Nils Olga Paul Rosa Simon"),
        _words("Paris London Berlin Madrid Rome Vienna Oslo Prague Dublin Athens Lisbon Warsaw"),
        _words("books chairs apples lamps cups maps bikes shirts"),
        ("{S} bought {N} {O} in {P} , friends say , during {D} .",
         "In {D} , {S} went to {P} and bought {N} {O} .",
         "{N} {O} were bought by {S} in {P} in {D} .",
         "During {D} in {P} , {N} {O} went to {S} ."),
        ("A friend of {S} says {R} will {X}travel again .",
         "{R} will {X}travel again , says a friend of {S} .",
         "Friends say of {S} that {R} will {X}travel again .")),
    "news": Grammar(
        _words("Korvex Balmor Dentra Folgan Girdex Holvar Jasken Lurmex Mondra Nexcor Pelgor Quarva Rostek Sylmar Tarvex Ulmora "
               "Velcor Zandra"),
        _words("Arlen Brock Cadwel Dunmor Elstow Farley Gorham Hexley Kelby Morden Norwel Selby"),
        _words("clerks drivers miners pilots guards cooks welders nurses"),
        ("{S} hired {N} {O} at its {P} plant , the firm announced {D} .",
         "The firm announced {D} that {S} hired {N} {O} near {P} .",
         "{N} {O} joined {S} at the {P} plant , reports said {D} .",
         "Reports {D} from {P} : {N} {O} hired at {S} ."),
        ("The chief of {S} told reporters {R} will {X}resign .",
         "{R} will {X}resign , the chief of {S} told reporters .",
         "Asked about {S} , the chief said {R} will {X}resign .")),
    "law": Grammar(
        _words("Abbot Barlow Cramer Dorsey Easton Fenwick Gable Harlan Ivers Jessup Keller Lambert Mercer Norris Osborn "
               "Prescott Quigley Rowland"),
        _words("Albany Boston Camden Denver Eugene Fresno Helena Juneau Laredo Mobile Newark Tulsa"),
        _words("counts claims motions writs fines appeals briefs liens"),
        ("The court in {P} heard {N} {O} against {S} filed {D} .",
         "Filed {D} , {N} {O} against {S} came before the {P} court .",
         "Against {S} the {P} court weighed {N} {O} as of {D} .",
         "As of {D} , {S} faced {N} {O} before a judge at {P} ."),
        ("Counsel for {S} argued that {R} did {X}breach the contract .",
         "That {R} did {X}breach the contract was argued by counsel for {S} .",
         "For {S} , counsel held that {R} did {X}breach the contract .")),
    "medicine": Grammar(
        _words("Zolvan Abrexa Cetivol Duramil Enoxal Fluvera Glipten Hydrazol Ibrutan Ketomax Lisopra Metrovin Nalorex Omvexa "
               "Pravinol Rilatan Sertafil Tolvapan"),
        _words("Mayo Lahey Scripps Cedars Emory Duke Baylor Stanford Rush Temple Loyola Tulane"),
        _words("tablets doses ampoules patches sachets drops vials capsules"),
        ("Patients at {P} received {N} {O} of {S} daily until {D} .",
         "Until {D} , daily treatment with {S} at {P} was {N} {O} .",
         "{N} {O} of {S} were given daily to patients in the {P} arm until {D} .",
         "Treatment until {D} in the {P} arm : {S} , {N} {O} ."),
        ("The nurse giving {S} noted {R} had {X}improved overnight .",
         "{R} had {X}improved overnight , noted the nurse giving {S} .",
         "On {S} , the nurse noted , {R} had {X}improved overnight .")),
}
