"""Names of things that do not exist, made of real names; and the lists of real names that they are made of.

    animals     a real epithet with another genus of the same class      Turdus + chrysaetos -> Turdus chrysaetos
    plants      likewise, of the same family where the list names it
    medicines   one real name's beginning, the end of another of as many words: Metformin + Losartan: Metfosartan

Forms of the lists:

    animals     TSV with columns class, genus, scientific_name, english_name
    plants      JSON {"plants": [{"name": "Alder", "species": "Alnus glutinosa, Alnus incana", "family": "..."}]}; the
                family may be left out: then any genus of the list will do
    medicines   JSON {"drugs": ["Abacavir Sulfate", ...]}

A name is kept only if no list knows it, whatever the case, as a name of any kind; of animals and plants neither with
another ending of the epithet (`alba` for `albus`: the same name under another genus). Left out, too, are epithets of
very many species (`vulgaris`), epithets that are names by themselves (`orca`) or whose ending does not agree with the
genus, medicines that end in a salt or form (`XR`), and well-known brands: see `nonsense_exclusions.json`. Lists
are never complete: a name that is made here may be that of something real. Everything is drawn by seed.
"""

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from tracekit.errors import SourceError

__all__ = [
    "DOMAINS",
    "SAMPLES",
    "Invented",
    "Known",
    "Name",
    "RealNames",
    "draw_real",
    "invent",
    "known_names",
    "read_names",
]

DOMAINS = ("animals", "plants", "medicines")
"""What is invented."""
_FOLDER = Path(__file__).parent
SAMPLES: Mapping[str, Path] = {
    "animals": _FOLDER / "nonsense_animals.tsv",
    "plants": _FOLDER / "nonsense_plants.json",
    "medicines": _FOLDER / "nonsense_medicines.json",
}
"""The small lists packaged here, by domain."""
_BINOMIAL = re.compile(r"(?P<genus>[A-Z][a-z-]+) (?P<epithet>[a-z][a-z-]{2,})")
_ENDING = re.compile(r"(?:ensis|ense|ius|ia|ium|us|a|um|is|e|or|ii|i|ae)$")
_TRIES_EACH = 400
_TRIES_IN_VAIN = 500
"""Tries without a new name after which the list is taken to be used up."""
_MAX_GENERA = 4
"""Genera that may share an epithet; one that more have is likely to go with others that no list holds."""
_GENITIVE = re.compile(r"(?:i|ii|ae|orum|arum|cola|gena|ops|ns|or|x|oides|fer)$")
"""Endings that are the same whatever the gender of the genus."""
_GENDERS: Mapping[str, frozenset[str]] = {"us": frozenset("m"), "a": frozenset("f"), "um": frozenset("n")}
_EPITHET_GENDERS: Mapping[str, frozenset[str]] = {**_GENDERS, "is": frozenset("mf"), "e": frozenset("n")}


class _Exclusions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What no name is made with, of our own: `nonsense_exclusions.json`."""

    general_epithets: list[str]
    """Epithets of very many species: places, colours, sizes, habitats."""
    nouns: list[str]
    """Epithets that are names of animals or plants by themselves."""
    forms: list[str]
    """Words that stand for a form of a medicine: with another one it is still real."""
    brands: list[str]
    """Well-known medicines that lists of substances leave out."""


_EXCLUSIONS = msgspec.json.decode((_FOLDER / "nonsense_exclusions.json").read_bytes(), type=_Exclusions)
_FORM_WORDS = frozenset(_EXCLUSIONS.forms)


class Name(NamedTuple):
    """A name, real or invented."""

    domain: str
    """Its domain."""
    name: str
    """The name."""
    made_of: list[str]
    """The real names that it is made of; of a real one that alone."""
    group: str
    """Class, family or word count, within which it was made."""
    is_invented: bool
    """False for a real one."""


class RealNames(NamedTuple):
    """One list of real names."""

    domain: str
    """Its domain."""
    names: list[tuple[str, str]]
    """Names that others can be made of, each with its group."""
    all_names: list[str]
    """Every name that the list holds, synonyms and names in English too."""


class Known(NamedTuple):
    """All real names, in the forms in which names are compared."""

    names: set[str]
    """Whole names; those of genus and epithet without the epithet's ending too."""
    genera: dict[str, Counter[str]]
    """Epithets' genders of each genus, as far as their endings tell: m, f, n."""
    genera_of_stem: dict[str, set[str]]
    """Genera that have an epithet, by the epithet without its ending."""


class Invented(NamedTuple):
    """What came of inventing."""

    names: list[Name]
    """The names that were kept."""
    rejected: dict[str, int]
    """Names that were not, by the reason."""


def read_names(domain: str, path: Path) -> RealNames:
    """Read a list of real names.

    Raises:
        SourceError: the file cannot be read, has another form, or holds fewer than two names to make others of.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = _READERS[domain](text)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{str(path)!r} cannot be read: {error}; give another --{_FLAGS[domain]}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SourceError(
            f"{str(path)!r} is no list of {domain}: {type(error).__name__}: {error}; expected {_FORMS[domain]}"
        ) from error
    if len(found.names) < 2:
        raise SourceError(f"{str(path)!r} holds {len(found.names)} usable names of {domain}; expected two or more")
    return found


def known_names(lists: Iterable[RealNames]) -> Known:
    """Every name of these lists, and the well-known brands, in the form in which names are compared."""
    names = {_folded(name) for name in _EXCLUSIONS.brands}
    genera: dict[str, Counter[str]] = {}
    genera_of_stem: dict[str, set[str]] = {}
    for name in (name for one in lists for name in one.all_names):
        names |= {_folded(name), _stemmed(name)}
        match = _BINOMIAL.fullmatch(name.strip())
        if match:
            genera.setdefault(match["genus"].lower(), Counter()).update(_gender(match["epithet"]))
            genera_of_stem.setdefault(_stem(match["epithet"]), set()).add(match["genus"].lower())
    return Known(names, genera, genera_of_stem)


def invent(real: RealNames, known: Known, *, num_names: int, seed: int) -> Invented:
    """Draw names that are made of real ones and that no list knows.

    Args:
        real: What they are made of.
        known: Every real name, by `known_names`.
        num_names: How many.
        seed: Of what is drawn.

    Raises:
        SourceError: the list is too small for so many.
    """
    rng = random.Random(f"{seed} {real.domain}")
    by_group: dict[str, list[str]] = {}
    for name, group in real.names:
        by_group.setdefault(group, []).append(name)
    combine = _blend if real.domain == "medicines" else _transplant
    names: dict[str, Name] = {}
    rejected: Counter[str] = Counter()
    num_in_vain = 0
    for _ in range(_TRIES_EACH * num_names):
        if len(names) == num_names or num_in_vain == _TRIES_IN_VAIN:
            break
        num_in_vain += 1
        first, group = rng.choice(real.names)
        second = rng.choice(by_group[group])
        made = combine(first, second, rng)
        reason = _objection(made, first, second, known)
        if reason is None and _folded(made) not in names:
            names[_folded(made)] = Name(real.domain, made, [first, second], group, True)
            num_in_vain = 0
        elif reason is not None:
            rejected[reason] += 1
    if len(names) < num_names:
        raise SourceError(
            f"{len(names)} of {num_names} names could be made of the {len(real.names)} of the list of {real.domain} "
            f"({dict(rejected)} rejected); lower --num-names, or give a longer list with --{_FLAGS[real.domain]}"
        )
    return Invented(list(names.values()), dict(sorted(rejected.items())))


def draw_real(real: RealNames, *, num_names: int, seed: int) -> list[Name]:
    """Draw real names, as controls.

    Raises:
        SourceError: the list does not hold so many.
    """
    names = sorted(set(real.names))
    if num_names > len(names):
        raise SourceError(f"--controls {num_names}: the list of {real.domain} holds {len(names)} names")
    rng = random.Random(f"{seed} {real.domain} real")
    return [Name(real.domain, name, [name], group, False) for name, group in rng.sample(names, num_names)]


def _transplant(first: str, second: str, rng: random.Random) -> str:
    """The genus of one species with the epithet of another."""
    return f"{first.split()[0]} {second.split()[1]}"


def _blend(first: str, second: str, rng: random.Random) -> str:
    """The beginning of one name and the end of another; of one word each, cut between a vowel and a consonant."""
    words, others = first.split(), second.split()
    if len(words) > 1:
        cut = rng.randrange(1, len(words))
        return " ".join([*words[:cut], *others[cut:]])
    head, tail = words[0], others[0]
    cuts, stops = _cuts(head), _cuts(tail)
    return (head[: rng.choice(cuts)] + tail[rng.choice(stops) :]).capitalize() if cuts and stops else head


def _cuts(word: str) -> list[int]:
    """Places in the middle of a word where a vowel is followed by a consonant."""
    letters = word.lower()
    return [
        place
        for place in range(3, len(word) - 2)
        if letters[place - 1] in "aeiouy" and letters[place].isalpha() and letters[place] not in "aeiouy"
    ]


def _objection(made: str, first: str, second: str, known: Known) -> str | None:
    """Why a name is not kept; None where it is."""
    if _folded(made) in known.names:
        return "is a known name"
    if _stemmed(made) in known.names:
        return "is a known name with another ending"
    if _folded(made) in (_folded(first), _folded(second)):
        return "is one of its parts"
    match = _BINOMIAL.fullmatch(made)
    if match:
        return _objection_to_epithet(match["genus"].lower(), match["epithet"], known)
    words = made.lower().split()
    if len(words) > 1 and words[-1] in _FORM_WORDS:
        return "names a salt or form, and a medicine may have others than the known ones"
    return None


def _objection_to_epithet(genus: str, epithet: str, known: Known) -> str | None:
    """Why an epithet does not go with another genus; None where it does."""
    if _stem(epithet) in _GENERAL_STEMS or len(known.genera_of_stem.get(_stem(epithet), ())) > _MAX_GENERA:
        return "has an epithet of very many species"
    if epithet in known.genera or epithet in _EXCLUSIONS.nouns:
        return "has an epithet that is a name by itself"
    genders = set(_gender(epithet))
    if genders and not genders & _gender_of_genus(genus, known):
        return "has an epithet whose ending does not agree"
    return None


def _gender(epithet: str) -> frozenset[str]:
    """Genders that an adjective of this ending may have; none where the ending does not tell."""
    if _GENITIVE.search(epithet):
        return frozenset()
    return next((genders for ending, genders in _EPITHET_GENDERS.items() if epithet.endswith(ending)), frozenset())


def _gender_of_genus(genus: str, known: Known) -> set[str]:
    """Gender of a genus: as most of its known epithets have it, else by its ending, else any."""
    counts = known.genera.get(genus)
    if counts:
        return {gender for gender, count in counts.items() if count == max(counts.values())}
    return next((set(genders) for ending, genders in _GENDERS.items() if genus.endswith(ending)), set("mfn"))


def _folded(name: str) -> str:
    """A name as names are compared: case, hyphens and white space do not count."""
    return " ".join(name.casefold().replace("-", " ").split())


def _stemmed(name: str) -> str:
    """A name of genus and epithet without the epithet's ending, marked so that it equals no whole name."""
    match = _BINOMIAL.fullmatch(name.strip())
    return f"{match['genus'].lower()} {_stem(match['epithet'])}*" if match else _folded(name)


def _stem(epithet: str) -> str:
    """An epithet without its ending: `nigr` of niger, nigra and nigrum, `mir` of mirus, mira and mirensis."""
    return f"{epithet[:-2]}r" if epithet.endswith("er") else _ENDING.sub("", epithet)


_GENERAL_STEMS = frozenset(_stem(epithet) for epithet in _EXCLUSIONS.general_epithets)


# The lists


def _read_animals(text: str) -> RealNames:
    names, all_names = [], []
    for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        scientific = row["scientific_name"].strip()
        all_names += [scientific, *_listed(row["english_name"] or "")]
        match = _BINOMIAL.match(scientific)
        if match:
            all_names.append(match[0])
            names.append((match[0], row["class"].strip()))
    return RealNames("animals", list(dict.fromkeys(names)), all_names)


def _read_plants(text: str) -> RealNames:
    names, all_names = [], []
    for row in json.loads(text)["plants"]:
        all_names += [row["name"], *_listed(row["species"])]
        for species in _listed(row["species"]):
            match = _BINOMIAL.fullmatch(species)
            if match and match["epithet"] not in ("spp", "sp", "species", "genera"):
                names.append((species, row.get("family") or "plants"))
    return RealNames("plants", list(dict.fromkeys(names)), all_names)


def _read_medicines(text: str) -> RealNames:
    drugs = [name.strip() for name in json.loads(text)["drugs"]]
    usable = [name for name in drugs if all(re.fullmatch(r"[A-Za-z]{2,}", word) for word in name.split())]
    names = [(name, f"{len(name.split())} words" if " " in name else "1 word") for name in usable]
    return RealNames("medicines", list(dict.fromkeys(names)), drugs)


def _listed(text: str) -> list[str]:
    """Names between commas or semicolons."""
    return [name for name in (part.strip(" '\"") for part in re.split("[,;/]", text)) if name]


_READERS: Mapping[str, Callable[[str], RealNames]] = {
    "animals": _read_animals,
    "plants": _read_plants,
    "medicines": _read_medicines,
}
_FLAGS: Mapping[str, str] = {"animals": "species", "plants": "plants", "medicines": "medicines"}
_FORMS: Mapping[str, str] = {
    "animals": "TSV with columns class, genus, scientific_name and english_name",
    "plants": 'JSON {"plants": [{"name": ..., "species": ...}]}',
    "medicines": 'JSON {"drugs": ["...", ...]}',
}
