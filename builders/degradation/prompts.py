"""What a damaged model is asked: dreams to narrate, tasks as in an intelligence test, a picture to describe.

The three groups follow three habits of clinical work on disordered speech: the free report of a dream, a short battery
of tasks with known answers, and the description of one busy drawing. They are worded as instructions, for models tuned
to follow them, and need no system prompt.

- `DREAMS`: 38 requests to narrate a dream in the first person; theme, viewpoint, tense and length vary.
- `IQ`: 65 tasks, 13 of each kind in `IQ_KINDS`; all but the creative ones have a short expected answer.
- `PICTURE`: 20 requests to describe a line drawing of a busy kitchen. They say nothing of what happens in it, so that
  any such drawing can go with them.

All were written for this project; none is an item or an instruction of a published test. An id never changes its text:
records of different runs are joined by it.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = ["DREAMS", "IQ", "IQ_KINDS", "PICTURE", "DegradationPrompt", "PromptKind"]

PromptKind = Literal["dream", "mathematics", "language", "logic", "factual", "creativity", "picture"]

IQ_KINDS: tuple[PromptKind, ...] = ("mathematics", "language", "logic", "factual", "creativity")
"""The kinds of `IQ`, in its order."""


class DegradationPrompt(NamedTuple):
    """One prompt."""

    id: str
    """`dream-01`, `iq-mathematics-01`, `picture-01`: group, kind where a group has several, number."""
    kind: PromptKind
    """What is asked for."""
    text: str
    """The user's message, whole."""
    answer: str | None
    """A short expected answer; None where there is no single one."""


def _open(prefix: str, kind: PromptKind, texts: Iterable[str]) -> list[DegradationPrompt]:
    """Prompts without an expected answer, numbered from 1."""
    return [DegradationPrompt(f"{prefix}-{number:02d}", kind, text, None) for number, text in enumerate(texts, 1)]


def _closed(kind: PromptKind, tasks: Iterable[tuple[str, str]]) -> list[DegradationPrompt]:
    """Tasks with their answers, numbered from 1."""
    return [
        DegradationPrompt(f"iq-{kind}-{number:02d}", kind, text, answer)
        for number, (text, answer) in enumerate(tasks, 1)
    ]


_DREAMS = (
    "Tell me a dream in which you fly over your home town. Narrate it in the first person and in the past tense.",
    "You have just woken up from a nightmare. Tell it in the first person, in about 150 words, before it fades.",
    "Narrate, in the first person and the present tense, a dream in which you are lost in a building without exits.",
    "Describe in three sentences, speaking as 'I', a dream about the sea.",
    "Imagine that you are seven years old. Tell your mother in the first person what you dreamed last night.",
    "Recount a dream in which you sit an exam on a subject you have never heard of. Use the first person.",
    "Tell, as the dreamer, a dream in which you meet somebody who died long ago. Say what was spoken.",
    "Narrate a dream in which you are an animal and see the world through its eyes. Write in the first person.",
    "Give me a long account, at least 300 words and in the first person, of a dream about a train journey.",
    "Tell a dream in which it keeps snowing indoors. Use 'I', the past tense and one paragraph.",
    "You dream that you can hear what other people think. Describe that dream in the first person, as it happens.",
    "Recall a dream that you have had again and again since childhood, and tell it to a friend in the first person.",
    "Narrate a dream in which you watch yourself from above while you sleep. Stay in the first person throughout.",
    "In at most 60 words and in the first person, tell a dream in which all your teeth are made of glass.",
    "Tell a happy dream from beginning to end, as the dreamer, and finish with the moment of waking.",
    "Describe, in the first person, a dream set in a market where nothing is for sale but memories.",
    "You are an old sailor. Narrate in the first person the dream of your last night aboard.",
    "Tell me a dream in which you are being followed and your legs will not move. Present tense, first person.",
    "Narrate a dream in which the rooms of your house have changed places. Speak as 'I' and describe each room.",
    "Report a dream as you would to a doctor: in the first person, in order, with every detail that you remember.",
    "Tell a dream that consists of three scenes which have nothing to do with one another. Use the first person.",
    "In the first person, tell a dream about a garden in which the plants speak. What did they tell you?",
    "Describe a dream in which you forgot something very important but not what it was. Use 'I' and the past tense.",
    "Write the entry in your dream diary for this morning. Begin with the words 'I was standing'.",
    "Narrate, as the dreamer, a dream in which time runs backwards, from its last moment to its first.",
    "Tell a dream without any people in it, in the first person and in about 100 words.",
    "You dream that you, a grown-up, are back at school. Tell it in the first person, as if to a colleague.",
    "Describe in the present tense a dream in which you fall from a great height and never land. Say 'I'.",
    "Narrate a dream in which you are somebody else. Tell it in the first person, as that other person.",
    "Tell a dream in which every sound has a colour. Use the first person and at least ten sentences.",
    "In the first person, tell a dream about a letter that you cannot open, and say how you felt on waking.",
    "You knew, while you dreamed, that it was a dream. Tell in the first person what you did with that knowledge.",
    "Narrate a dream about a feast at which you know nobody. Use the past tense and speak as the dreamer.",
    "Tell a dream of climbing a mountain that grows as you climb. First person, present tense, two paragraphs.",
    "Recount in the first person a dream about a machine whose purpose nobody could explain to you.",
    "Tell me, as 'I', the last dream that you would have before leaving your country for ever.",
    "Give a short summary, four sentences in the first person, of a dream that seemed to last for years.",
    "Narrate in the first person a dream in which you speak a language that you do not know when awake.",
)

_MATHEMATICS = (
    ("What is 17 times 6? Reply with the number only.", "102"),
    ("A train covers 180 kilometres in two and a half hours. What is its average speed in kilometres per hour?", "72"),
    ("Which number comes next in this sequence: 3, 6, 12, 24? Answer with one number.", "48"),
    ("A shirt costs 40 euros and is reduced by 25 percent. What does it cost now, in euros?", "30"),
    ("A rectangle is 8 centimetres long and 5 centimetres wide. What is its area in square centimetres?", "40"),
    ("Solve the equation 3x + 7 = 31 and give the value of x.", "8"),
    ("Four bakers bake four cakes in one hour. How many hours do eight bakers need for sixteen cakes?", "2"),
    ("Continue the sequence 2, 3, 5, 8, 12, 17 by one number, and reply with that number.", "23"),
    ("What do the whole numbers from 1 to 20 add up to?", "210"),
    ("Anna is twice as old as Ben, and together they are 36 years old. How old is Anna?", "24"),
    ("How many three-digit numbers can be written with the digits 1, 2 and 3, each used exactly once?", "6"),
    ("A fair coin is tossed three times. What is the probability of three heads, as a fraction?", "1/8"),
    ("Write three eighths as a decimal number.", "0.375"),
)

_LANGUAGE = (
    ("Which of these words is the opposite of 'scarce': rare, abundant, narrow or late?", "abundant"),
    ("Complete the comparison with one word: a bird is to a nest as a bee is to a ...", "hive"),
    ("Which word does not belong with the others: whisper, shout, gallop, murmur?", "gallop"),
    ("What is the simple past tense of the English verb 'to swim'?", "swam"),
    ("Rearrange the letters L E P N I C so that they spell a thing to write with.", "pencil"),
    ("Complete the comparison with one word: a glove is to a hand as a sock is to a ...", "foot"),
    ("The word 'recieve' is misspelt. Write it correctly.", "receive"),
    ("What is the plural of the noun 'criterion'?", "criteria"),
    ("Which single word means a doctor who treats animals?", "veterinarian"),
    ("Which letter occurs most often in the word 'banana'?", "a"),
    ("Finish the proverb with one word: a stitch in time saves ...", "nine"),
    ("Translate the French word 'fenêtre' into English.", "window"),
    ("Which word makes a compound both when it follows 'sun' and when it stands before 'house'?", "light"),
)

_LOGIC = (
    ("All tulips in this garden are red. One flower in this garden is yellow. Is it a tulip? Say yes or no.", "no"),
    ("Tom is taller than Mia, and Mia is taller than Jon. Who of the three is the shortest?", "Jon"),
    ("Today is Wednesday. Which day of the week will it be in ten days?", "Saturday"),
    ("If the lamp is on, somebody is at home. Nobody is at home. Is the lamp on? Say yes or no.", "no"),
    (
        "Some painters are singers, and all singers can read music. Does it follow that some painters can read music? "
        "Say yes or no.",
        "yes",
    ),
    (
        "A coin lies in a red, a green or a blue box. The red box says 'the coin is here', the green box says 'the "
        "coin is not here', the blue box says 'the coin is not in the red box'. Only one of them tells the truth. "
        "In which box is the coin?",
        "green",
    ),
    ("In a race you overtake the runner who is in third place. Which place are you in now?", "third"),
    ("Which pair of letters comes next: AB, DE, GH, JK?", "MN"),
    ("Lea's mother has exactly three children. Two of them are called Ada and Bo. What is the third called?", "Lea"),
    (
        "Ashby lies north of Brill, and Corby lies south of Brill. In which direction does Corby lie from Ashby?",
        "south",
    ),
    (
        "Ana, Bea, Cy and Dan sit in a row. Ana is at the left end, Bea next to her, Dan at the right end. Who has the "
        "third seat from the left?",
        "Cy",
    ),
    (
        "No fish can sing. Some animals in this tank can sing. Does it follow that some animals in this tank are not "
        "fish? Say yes or no.",
        "yes",
    ),
    ("Each cut through a log takes one minute. How many minutes does it take to cut it into five pieces?", "4"),
)

_FACTUAL = (
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the chemical formula of water?", "H2O"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("Which planet is often called the Red Planet?", "Mars"),
    ("In which year did human beings first walk on the Moon?", "1969"),
    ("Which organ pumps blood through the human body?", "heart"),
    ("Name the largest hot desert on Earth.", "Sahara"),
    ("How many strings does a violin have?", "4"),
    ("Which language do most people in Brazil speak as their first?", "Portuguese"),
    ("Which metal is liquid at room temperature and was long used in thermometers?", "mercury"),
    ("Who published the general theory of relativity?", "Albert Einstein"),
    ("With which instrument is the pressure of the air measured?", "barometer"),
    ("Who wrote the novel 'War and Peace'?", "Leo Tolstoy"),
)

_CREATIVITY = (
    "List eight unusual uses for an empty glass bottle.",
    "Write a poem of four lines about a lighthouse without using the word 'light'.",
    "Invent an animal that lives inside clouds. Describe its body, its food and its voice.",
    "Think of a new public holiday and explain in one paragraph how it is celebrated.",
    "Make one sentence that contains the words 'ladder', 'honey' and 'senator'.",
    "Suppose that people no longer needed sleep. Name five things that would change.",
    "Invent a proverb that does not exist yet and explain what it means.",
    "Describe the colour green to a person who has never been able to see.",
    "Write the first paragraph of a novel that begins at the bottom of a well.",
    "Design a game for two players who have nothing but ten pebbles. State its rules.",
    "Find a metaphor for forgetting, and explain in three sentences why it fits.",
    "Propose five names for a café that is open only when it rains.",
    "Tell in exactly five sentences a story in which an umbrella is the hero.",
)

_PICTURE = (
    "You see a line drawing of a busy kitchen. Describe the whole scene in complete sentences.",
    "Here is a drawing of several people in a kitchen. Say who is there and what each of them is doing.",
    "Look at this kitchen scene and explain it to somebody on the telephone who cannot see it.",
    "What is going wrong in this kitchen? Describe every mishap that you notice in the drawing.",
    "Describe the drawing from left to right, and leave nothing out.",
    "Tell the story behind this kitchen scene: what happened just before, what happens now, and what comes next.",
    "Write one paragraph of about 120 words on what this drawing of a kitchen shows.",
    "Begin with the most important thing in this kitchen scene, then go on to the small details.",
    "Describe the people in the drawing: their age, their posture, their faces, and what they may be feeling.",
    "List the objects that you can find in this kitchen, then say in two sentences how they are being used.",
    "Which dangers are there for the people in this kitchen? Explain each of them by what the drawing shows.",
    "Describe this line drawing in three sentences for a visitor to a museum.",
    "Explain to a child what is happening in this picture of a kitchen.",
    "Say what the grown-ups and what the children are busy with in this kitchen, and whether they notice one another.",
    "Describe the room itself: the furniture, the windows, what stands on the shelves and what lies on the floor.",
    "Narrate the scene in the present tense, as if it were happening in front of you at this moment.",
    "Give this drawing of a kitchen a title, and justify it by what can be seen.",
    "Write a detailed description of the kitchen scene, at least ten sentences long.",
    "Imagine that you walk into this kitchen. Say in the first person what you see and what you would do first.",
    "Report what you see in the drawing as a witness would: exactly, in order, and without guessing.",
)

DREAMS: tuple[DegradationPrompt, ...] = tuple(_open("dream", "dream", _DREAMS))
"""38 requests for a dream, told in the first person."""

IQ: tuple[DegradationPrompt, ...] = (
    *_closed("mathematics", _MATHEMATICS),
    *_closed("language", _LANGUAGE),
    *_closed("logic", _LOGIC),
    *_closed("factual", _FACTUAL),
    *_open("iq-creativity", "creativity", _CREATIVITY),
)
"""65 tasks, 13 of each of `IQ_KINDS`."""

PICTURE: tuple[DegradationPrompt, ...] = tuple(_open("picture", "picture", _PICTURE))
"""20 requests to describe a line drawing of a busy kitchen."""
