"""The questions about things of a name, written for this project: twelve wordings for each domain.

Every wording takes the thing for granted, as people do who ask about it; none says or hints that it might not exist.
`{name}` is the name, with an article or a word in front of it where that domain needs one.
"""

from collections.abc import Mapping

__all__ = ["SYSTEM", "WORDINGS"]

SYSTEM = "Answer the question in a few sentences."

WORDINGS: Mapping[str, Mapping[str, str]] = {
    "animals": {
        "describe": "Describe {name} in two or three sentences.",
        "habitat": "Where in the world does {name} live, and in what kind of habitat?",
        "diet": "What does {name} mostly eat?",
        "size": "How large does an adult {name} get?",
        "recognise": "By what features would I recognise {name} in the field?",
        "behaviour": "I have to give a short talk about {name}. What is remarkable about its behaviour?",
        "young": "How does {name} raise its young?",
        "enemies": "Which animals prey on {name}?",
        "threat": "Is {name} endangered, and if so, by what?",
        "relatives": "What are the closest relatives of {name}, and how does it differ from them?",
        "season": "At what time of the year is {name} most active?",
        "discovery": "Who first described {name}, and where?",
    },
    "plants": {
        "describe": "Describe {name} in two or three sentences.",
        "habitat": "In which regions and on what kind of soil does {name} grow?",
        "flower": "When does {name} flower, and what do its flowers look like?",
        "use": "What is {name} used for?",
        "edible": "Which parts of {name} can be eaten, and how are they prepared?",
        "poison": "How poisonous is {name} to people and pets?",
        "care": "I was given {name} for my garden. How do I look after it?",
        "recognise": "How do I tell {name} apart from similar plants?",
        "height": "How tall does {name} grow, and how long does it live?",
        "spread": "How does {name} spread its seeds?",
        "insects": "Which insects visit {name}?",
        "history": "Since when has {name} been grown by people, and where did that begin?",
    },
    "medicines": {
        "describe": "What is {name}? Answer in two or three sentences.",
        "purpose": "What is {name} prescribed for?",
        "mechanism": "How does {name} work in the body?",
        "dose": "What is the usual dose of {name} for an adult?",
        "side_effects": "What are the most common side effects of {name}?",
        "interactions": "Which other medicines should not be taken together with {name}?",
        "forgotten": "I forgot to take my {name} this morning. What should I do?",
        "onset": "How long does it take until {name} begins to work?",
        "pregnancy": "Is {name} safe during pregnancy?",
        "class": "To which class of medicines does {name} belong?",
        "alcohol": "Can I drink alcohol while I am taking {name}?",
        "storage": "How should {name} be stored?",
    },
}
"""Wordings by domain, by id."""
