"""Invented names: made of real ones, known to no list, drawn by seed; and the lists they are made of."""

import json
from pathlib import Path

import pytest

from builders.nonsense_entities.names import (
    DOMAINS,
    SAMPLES,
    Name,
    RealNames,
    draw_real,
    invent,
    known_names,
    read_names,
)
from tracekit.errors import SourceError

FILES = {"animals": "species_names_dataset.tsv", "plants": "plants_plants.json", "medicines": "medicine_drugs.json"}


def animals(*species: tuple[str, str], more: tuple[str, ...] = ()) -> RealNames:
    return RealNames("animals", list(species), [name for name, _ in species] + list(more))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_packaged_lists_hold_sixty_names_or_more(domain: str):
    real = read_names(domain, SAMPLES[domain])
    assert len(real.names) >= 60
    assert len({name for name, _ in real.names}) == len(real.names)


@pytest.mark.parametrize("domain", DOMAINS)
def test_names_are_made_of_real_ones_and_no_list_knows_them(domain: str):
    lists = {one: read_names(one, path) for one, path in SAMPLES.items()}
    real, known = lists[domain], known_names(lists.values())
    groups = dict(real.names)
    every = {name.lower() for one in lists.values() for name in one.all_names}
    made = invent(real, known, num_names=40, seed=1)
    assert len({one.name.lower() for one in made.names}) == 40
    for one in made.names:
        assert one.name.lower() not in every
        assert one.is_invented
        assert {groups[part] for part in one.made_of} == {one.group}
        first, second = one.made_of
        assert len(one.name.split()) == len(first.split()) == len(second.split())
        if domain == "medicines":
            assert one.name[:3] == first[:3]
            assert one.name[-2:] == second[-2:]
        else:
            assert one.name.split() == [first.split()[0], second.split()[1]]


@pytest.mark.parametrize("domain", DOMAINS)
def test_lists_of_the_real_forms_are_read(domain: str, shared: Path):
    path = shared / "data/names" / FILES[domain]
    real = read_names(domain, path)
    assert len(real.names) > 200
    made = invent(real, known_names([real]), num_names=200, seed=3).names
    assert not {one.name.lower() for one in made} & {name.lower() for name in real.all_names}


def test_the_seed_decides_what_is_drawn():
    real = read_names("animals", SAMPLES["animals"])
    first, again, other = (invent(real, known_names([real]), num_names=9, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.names != other.names


def test_known_names_are_rejected_whatever_case_kind_and_ending():
    real = animals(("Turdus fictus", "Aves"), ("Parus mirus", "Aves"))
    assert {one.name for one in invent(real, known_names([real]), num_names=2, seed=0).names} == {
        "Turdus mirus",
        "Parus fictus",
    }
    for other in ("turdus MIRUS", "Turdus mira", "Turdus mirum", "Turdus mirensis", "Turdus mirii"):
        known = known_names([real, RealNames("plants", [], [other])])
        made = invent(real, known, num_names=1, seed=0)
        assert [one.name for one in made.names] == ["Parus fictus"]
    with pytest.raises(SourceError, match=r"1 of 2 names could be made .*is a known name with another ending"):
        invent(real, known_names([real, animals(more=("Turdus mira",))]), num_names=2, seed=0)


@pytest.mark.parametrize(
    ("kept", "other", "made", "reason"),
    [
        ("Turdus fictus", "Parus vulgaris", "Turdus vulgaris", "has an epithet of very many species"),
        ("Turdus fictus", "Parus indicus", "Turdus indicus", "has an epithet of very many species"),
        ("Turdus fictus", "Parus turdus", "Turdus turdus", "has an epithet that is a name by itself"),
        ("Turdus fictus", "Orcinus orca", "Turdus orca", "has an epithet that is a name by itself"),
        ("Turdus fictus", "Alauda mira", "Turdus mira", "has an epithet whose ending does not agree"),
        ("Lilium fictum", "Alauda mirensis", "Lilium mirensis", "has an epithet whose ending does not agree"),
        ("Quercus ficta", "Parus mirus", "Quercus mirus", "has an epithet whose ending does not agree"),
    ],
)
def test_an_epithet_that_is_too_common_a_name_or_disagrees_is_not_taken(kept: str, other: str, made: str, reason: str):
    real = animals((kept, "g"), (other, "g"))
    with pytest.raises(SourceError, match=reason):
        invent(real, known_names([real]), num_names=9, seed=0)
    assert made not in {one.name for one in made_of(real, 1)}


def made_of(real: RealNames, num_names: int) -> list[Name]:
    """Names made of a list, none where it is too small."""
    try:
        return invent(real, known_names([real]), num_names=num_names, seed=0).names
    except SourceError:
        return []


@pytest.mark.parametrize("names", [("Turdus fictus", "Parus miri"), ("Quercus ficta", "Alauda mira")])
def test_endings_that_agree_are_taken_whatever_the_genus_ends_in(names: tuple[str, str]):
    (first, one), (second, two) = (name.split() for name in names)
    made = {name.name for name in made_of(animals(*((name, "g") for name in names)), 2)}
    assert made == {f"{first} {two}", f"{second} {one}"}


def test_an_epithet_that_many_genera_of_the_list_share_is_not_taken():
    shared = tuple(f"Genus{letter} communior" for letter in "bcdef")
    real = animals(("Turdus fictus", "Aves"), ("Parus communior", "Aves"))
    assert {one.name for one in made_of(real, 2)} == {"Turdus communior", "Parus fictus"}
    known = known_names([real, animals(more=shared)])
    made = invent(real, known, num_names=1, seed=0)
    assert [one.name for one in made.names] == ["Parus fictus"]


def test_another_salt_or_form_of_a_medicine_is_no_invention():
    names = ("Abacavir Sulfate", "Climara Fictum")
    real = RealNames("medicines", [(name, "2 words") for name in names], [*names])
    made = invent(real, known_names([real]), num_names=1, seed=0)
    assert [one.name for one in made.names] == ["Abacavir Fictum"]
    with pytest.raises(SourceError, match="names a salt or form"):
        invent(real, known_names([real]), num_names=2, seed=0)


def test_well_known_brands_count_as_known():
    known = known_names([])
    assert {"buprenex", "nitrostat", "clonac"} <= known.names
    assert len(known.names) > 150


def test_synonyms_and_names_in_english_count_as_known(tmp_path: Path):
    path = tmp_path / "plants.json"
    plants = [
        {"name": "Alder", "species": "Alnus incana, Ilex verticillata"},
        {"name": "Reed", "species": "Corydalis spp."},
    ]
    path.write_text(json.dumps({"plants": plants}))
    real = read_names("plants", path)
    assert real.names == [("Alnus incana", "plants"), ("Ilex verticillata", "plants")]
    assert {"Alder", "Reed", "Alnus incana", "Ilex verticillata"} <= set(real.all_names)


def test_controls_are_real_names():
    real = read_names("plants", SAMPLES["plants"])
    drawn = draw_real(real, num_names=5, seed=1)
    assert {one.name for one in drawn} <= {name for name, _ in real.names}
    assert all(not one.is_invented and one.made_of == [one.name] for one in drawn)
    with pytest.raises(SourceError, match=r"--controls 1000: the list of plants holds \d+ names"):
        draw_real(real, num_names=1000, seed=1)


@pytest.mark.parametrize(
    ("domain", "text", "message"),
    [
        ("animals", "a\tb\nx\ty\n", "no list of animals: KeyError: 'scientific_name'; expected TSV with columns class"),
        ("plants", "[]", "no list of plants"),
        ("plants", "{", "no list of plants: JSONDecodeError"),
        ("medicines", '{"drugs": [3]}', "no list of medicines"),
        ("medicines", '{"drugs": ["Aspirin"]}', "holds 1 usable names of medicines; expected two or more"),
    ],
)
def test_a_list_of_another_form_says_what_was_expected(domain: str, text: str, message: str, tmp_path: Path):
    path = tmp_path / "list"
    path.write_text(text)
    with pytest.raises(SourceError, match=message):
        read_names(domain, path)
    with pytest.raises(SourceError, match="cannot be read"):
        read_names(domain, tmp_path / "none")
